"""Errors of images and image registries."""

from prefect_rollout.errors import NotFoundError, RolloutError
from prefect_rollout.verdict.diagnosis import Category


class ImageNotFoundError(NotFoundError):
    """The registry has no such repository, tag or digest, or no tag that a policy accepts."""

    category = Category.IMAGE_PULL_ERROR
    kind = "tag"
    passes = True
    advice = "Was the image built and pushed, and is its name spelt right? Nothing was written."


class UnsuitableImageError(RolloutError):
    """The registry has the image, but not for the nodes' platform, or it is no container image."""

    category = Category.IMAGE_PULL_ERROR
    passes = True
    advice = "Build and push the image for the nodes' platform. Nothing was written."


class RegistryError(RolloutError):
    """The registry did not say whether it has an image. `data` has `registry` and `status`."""

    category = Category.UNUSABLE_ANSWER
    passes = True
    advice = "Check that the address is a registry and not a login page or a proxy."


class RegistryAccessError(RegistryError):
    """401 or 403: no credentials, wrong ones, or they may not pull from the repository."""

    category = Category.ACCESS_DENIED
    advice = "Save the registry's credentials as a block image-registry, or run `docker login`."


class RegistryLimitError(RegistryError):
    """429: the registry's rate limit is reached. `retry_after` has the seconds that it asked to wait."""

    category = Category.OVERLOADED
    retryable = True
    advice = "Wait until the limit is reset, or use credentials with a higher limit."


class RegistryUnreachableError(RegistryError):
    """The registry gave no answer, or failed with 5xx."""

    category = Category.UNREACHABLE
    retryable = True
    advice = "Check the network and the name of the registry."
