"""Labels and tags that this package adds to flow runs for its own use."""

from prefect_rollout.release.images import ALLOW

CLOUD, TARGET = "rollout.cloud", "rollout.target"
"""Labels: address of the run's cloud, and the block with its credentials."""

LEASE, LOCKS, LOCKED_AT = "rollout.lease", "rollout.locks", "rollout.locked-at"
"""Labels: the run's lease, the names of its locks, and when it acquired them."""

HOST, PROCESS = "rollout.host", "rollout.process"
"""Labels: machine with the results of the run's steps, and process that executes or last executed it."""

ROLLED_BACK = "rollout.rolled-back"
"""Label of a run that began to roll back: it cannot be continued."""

TRIGGER = "trigger:"
"""Prefix of the tag that says how a run was started."""

BATCH_TAG = "batch:"
"""Prefix of the tag of a batch's releases; the id of the batch's run follows."""

UNLISTED = "names-unlisted"
"""Tag of a run whose errors do not list known names: its starter may not be allowed to see them."""

INHERITED = (ALLOW, UNLISTED)
"""Prefixes of the tags that a batch's run passes on to its releases."""
