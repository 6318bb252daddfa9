"""Release windows as a Prefect block, and their lookup by target."""

from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, field_validator

from prefect_rollout.blocks.load import load
from prefect_rollout.blocks.target import opened_as
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import Id
from prefect_rollout.release import windows
from prefect_rollout.release.windows import Closed, Rule
from prefect_rollout.text import one_line


class ReleaseWindows(Block):
    """Rules that decide when releases may start.

    Example:
        Close all clusters from Friday evening to Monday morning:
        ```python
        from prefect_rollout.blocks import ReleaseWindows

        freeze = {"name": "weekend freeze", "cron": "0 22 * * FRI", "duration_minutes": 3480}
        ReleaseWindows(timezone="Asia/Shanghai", rules=[freeze]).save("BLOCK_NAME")
        ```
        Load a saved block and print what is closed now:
        ```python
        from datetime import UTC, datetime
        from prefect_rollout.blocks import ReleaseWindows

        windows = ReleaseWindows.load("BLOCK_NAME")
        print(windows.judge(3290, ["pub-bjwdt"], datetime.now(UTC)))
        ```
    """

    _block_type_name: ClassVar[str] = "Release Windows"
    _block_type_slug: ClassVar[str] = "release-windows"
    _description = "Times at which releases of apps and clusters may start: freezes and open hours."
    _logo_url = HttpUrl(
        "https://cdn.sanity.io/images/3ugk85nk/production/"
        "2d0b896006ad463b49c28aaac14f31e00e32cfab-250x250.png"
    )
    _documentation_url = HttpUrl("https://pypi.org/project/prefect-rollout/")

    # A misspelled field must not leave everything open.
    model_config = ConfigDict(extra="forbid")

    timezone: str = Field(
        default="UTC",
        title="Time zone",
        description="IANA name of the time zone of the rules, such as Asia/Shanghai.",
    )
    rules: list[Rule] = Field(
        default_factory=list,
        title="Rules",
        description="Times that close apps and clusters to releases, or (effect allow) alone open them: "
        'JSON such as [{"name": "weekend", "cron": "0 22 * * FRI", "duration_minutes": 3480}].',
    )
    rollback_exempt: bool = Field(
        default=True,
        title="Rollbacks at any time",
        description="Allow rollbacks while a window is closed.",
    )

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        windows.zone(value)
        return value

    @field_validator("rules")
    @classmethod
    def _unique_names(cls, value: list[Rule]) -> list[Rule]:
        names = [rule.name for rule in value]
        twice = sorted({one_line(name, 80) for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each rule needs its own name; given twice: {', '.join(twice)}")
        return value

    def judge(self, app_id: Id, clusters: Sequence[str], at: datetime) -> Closed | None:
        """Return the closed clusters of an app at an aware moment; `None` if all are open."""
        return windows.judge(self.rules, self.timezone, app_id, clusters, at)


async def load_windows(target: str) -> tuple[str, ReleaseWindows] | None:
    """Return the block, as type-slug/name, and the release windows that releases of `target` obey.

    Return `None` if the target names no block, or names `default` and that block is not saved.

    Raises:
        ConfigurationError: the block does not exist or cannot be used, or (retryable) the Prefect API did not
            return it.
    """
    chosen = await opened_as(target)
    name = chosen.block.windows
    if not name:
        return None
    block = f"{ReleaseWindows.get_block_type_slug()}/{name}"
    found = await load(ReleaseWindows, name, field="windows")
    if found is None:
        if name == "default":
            return None
        raise ConfigurationError(
            f"windows: there is no block {block}, which the block {chosen.name} names",
            advice="Save release windows of that name, or correct the name, in the Prefect UI.",
            field="windows",
        )
    return block, found
