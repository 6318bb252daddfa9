"""Ids, numbers of pods and JSON objects, as platforms write them."""

from typing import Annotated, Any, TypeVar

from annotated_types import Ge
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.alias_generators import to_camel

from prefect_rollout.text import one_line


class CamelCase(BaseModel):
    """A JSON object with camelCase keys, as Kubernetes writes it. Unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", alias_generator=to_camel, populate_by_name=True)


def _printable(value: int | str) -> int | str:
    if not str(value).isprintable():
        raise ValueError("an id is printable text")
    return value


Id = Annotated[Annotated[int, Strict()] | Annotated[str, Strict()], AfterValidator(_printable)]
"""An id as the platform writes it. Ids are compared as text: `same_id`. Names of runs contain them."""

Count = Annotated[int, Strict(), Ge(0)]
"""A number of pods. JSON `true` or `"1"` is not one."""


def _absent_if_wrong(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        return None


T = TypeVar("T")
Lenient = Annotated[T | None, WrapValidator(_absent_if_wrong)]
"""An optional field of a status: a value of the wrong type counts as absent."""


def same_id(one: object, other: object) -> bool:
    """Return whether two ids are the same as text (article, step 3: `String(tpl.id) === template_id`)."""
    return str(one) == str(other)


def same_or_none(one: Id | None, other: Id | None) -> bool:
    """Return whether two ids are the same, or both are `None`."""
    return one is other is None or (one is not None and other is not None and same_id(one, other))


def names_deployment(asked: str, name: str) -> bool:
    """Return whether `asked` names a deployment; `web` also names `statefulset/web`, of any kind."""
    return asked in {name, name.rpartition("/")[2]}


def template_name(revision: Id | None) -> str:
    """Return such as `template 1343170`, or `nothing`; safe for a log."""
    return "nothing" if revision is None else f"template {one_line(revision, 40)}"


def by_age(revision: Id) -> tuple[int, int, str]:
    """Return a sort key, oldest first: numbers by value, then other text by its letters."""
    text = str(revision)
    number = text.isascii() and text.isdigit() and len(text) < 100
    return (0, int(text), "") if number else (1, 0, text)


def first_mistake(error: ValidationError) -> str:
    """Return the first mistake of a pydantic error as `field: mistake`, without the value."""
    mistake = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in mistake["loc"])
    return one_line(f"{field}: {mistake['msg']}" if field else mistake["msg"])


def usable_id(value: int | str) -> int | str:
    """Return `value` if it is usable as a percent-encoded path segment of the platform's API.

    Raises:
        ValueError: it is negative, longer than 253 characters, has control characters, or is `.` or
            `..`, which proxies resolve as a step in the path even if they are encoded.
    """
    text = str(value)
    if isinstance(value, int) and value < 0:
        raise ValueError("an id is a whole number from 0 up, or text")
    if not text or len(text) > 253:
        raise ValueError("an id has 1 to 253 characters")
    if text in {".", ".."} or not text.isprintable() or text != text.strip():
        raise ValueError("an id is printable text without outer blanks, and neither '.' nor '..'")
    return value


def usable_cluster(name: str) -> str:
    """Return `name` if the platform's API accepts it as the name of a cluster.

    Raises:
        ValueError: it is not a usable id, or contains a comma, which separates names in a query.
    """
    if "," in name:
        raise ValueError("a cluster's name must not contain a comma; give several clusters as a list")
    return str(usable_id(name))
