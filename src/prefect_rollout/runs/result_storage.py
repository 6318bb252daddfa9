"""Check that the results of a run's steps can be stored, and that a retry can read them."""

from prefect.client.schemas.objects import FlowRun
from prefect.results import aget_default_result_storage, get_result_store

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.runs.labels import BATCH_TAG, HOST
from prefect_rollout.text import one_line


async def check_result_storage(run: FlowRun) -> None:
    """Write a file to the result storage, or read the file that an earlier attempt of the run wrote.

    A retry on a machine that does not see the results of the first attempt would repeat the steps, and
    would not know what ran before the release.

    Raises:
        ConfigurationError: results cannot be stored, or those of an earlier attempt cannot be read.
    """
    storage = get_result_store().result_storage or await aget_default_result_storage()
    key, host = f"prefect-rollout-{run.id}", run.labels.get(HOST)
    problem = f"results cannot be stored in {storage.get_block_type_slug()}"
    advice = (
        "Store results where every machine that runs releases finds them: set "
        "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK to a storage block that all machines share."
    )
    try:
        if (batch := _batch_of(run)) is not None:
            problem = f"the results of the batch that started this run ({batch}) are out of reach here"
            await storage.read_path(f"prefect-rollout-{batch}")
        if host:
            problem = (
                f"the results of this run on {one_line(host, 80)}, by an earlier attempt, are out of reach"
            )
            advice += " Until then, retry the run on that machine, or start a new release."
            await storage.read_path(key)
        else:
            await storage.write_path(key, content=b"{}")
    except Exception as error:  # a storage block may raise anything, even for a missing file
        raise ConfigurationError(
            f"{problem}: {type(error).__name__} {one_line(error, 120)}", advice=advice
        ) from error


def _batch_of(run: FlowRun) -> str | None:
    """Return the id of the batch run that started this release, which has checked its own results."""
    if run.parent_task_run_id is None:
        return None
    return next((tag.removeprefix(BATCH_TAG) for tag in run.tags if tag.startswith(BATCH_TAG)), None)
