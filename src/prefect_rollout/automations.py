"""Automations that notify, from files as `prefect automation create --from-file` reads them.

But for the notification block: its id differs from server to server, so the files leave
`block_document_id` out, and `apply` fills it in.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError

from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.models import first_mistake
from prefect_rollout.text import one_line
from prefect_rollout.yaml_lines import read_yaml

_NOTIFY = "send-notification"


async def apply(client: PrefectClient, files: Sequence[Path], block: str) -> list[tuple[str, bool]]:
    """Creates the automations of the files; one whose name exists is renewed, and stays off where it was.

    Nothing is created before all files have been read and checked.

    Args:
        client: of the server.
        files: each with one automation, a list of them, or a mapping `automations:` to a list.
        block: the notification block, as type-slug/name.

    Returns:
        The name of each automation, and whether it was created.

    Raises:
        InputError: a file is not there, or holds something else than automations that notify.
        ConfigurationError: there is no such block, or it does not notify.
    """
    document = await _block(client, block)
    wanted = [
        (file, automation)
        for file in files
        for automation in automations_of(_read(file), document, file.name)
    ]
    for file, automation in wanted:
        for action in automation.actions:
            if isinstance(action, SendNotification):
                await _check_template(client, action.subject, f"{file.name}: subject")
                await _check_template(client, action.body, f"{file.name}: body")
    return [(automation.name, await _put(client, automation)) for _, automation in wanted]


def automations_of(raw: bytes, block: UUID, source: str) -> list[AutomationCore]:
    """The automations in `raw`, notifying through `block`; `source` names it in errors.

    Raises:
        InputError: it is not YAML or JSON, or something in it is no automation that notifies.
    """
    document = read_yaml(raw)
    if document.flaws:
        flaw = document.flaws[0]
        raise _wrong(source, f"line {flaw.line}: {flaw.problem}")
    values = document.value
    if isinstance(values, dict) and "automations" in values:
        values = values["automations"]
    listed = values if isinstance(values, list) else [values]
    if not listed:
        raise _wrong(source, "it names no automation")
    return [_automation(value, block, source) for value in listed]


def _automation(value: Any, block: UUID, source: str) -> AutomationCore:
    if not isinstance(value, dict):
        raise _wrong(source, "an automation is a mapping with name, trigger and actions")
    value = copy.deepcopy(value)
    actions = value.get("actions")
    notifying = [
        action
        for action in (actions if isinstance(actions, list) else [])
        if isinstance(action, dict) and action.get("type") == _NOTIFY
    ]
    if not notifying:
        raise _wrong(source, f"actions: none is of the type {_NOTIFY}")
    for action in notifying:
        action.setdefault("block_document_id", block)
    try:
        return AutomationCore.model_validate(value)
    except ValidationError as error:
        raise _wrong(source, first_mistake(error)) from None


async def _check_template(client: PrefectClient, template: str, source: str) -> None:
    """Has the server read the template: it alone knows the language."""
    try:
        await client.request("POST", "/templates/validate", json=template)
    except PrefectHTTPStatusError as error:
        if error.response.status_code != httpx.codes.UNPROCESSABLE_ENTITY:
            raise
        mistake = error.response.json()["error"]
        raise _wrong(source, f"line {mistake['line']} of the template: {mistake['message']}") from error


async def _put(client: PrefectClient, automation: AutomationCore) -> bool:
    """Creates the automation, or renews the one of its name; whether it was created."""
    found = await client.read_automations_by_name(automation.name)
    if len(found) > 1:
        raise ConfigurationError(
            f"there are {len(found)} automations of the name {one_line(automation.name, 120)!r}",
            advice="Delete all but one of them in the Prefect UI, and start again.",
        )
    if not found:
        await client.create_automation(automation)
        return True
    if "enabled" not in automation.model_fields_set:
        automation.enabled = found[0].enabled
    await client.update_automation(found[0].id, automation)
    return False


async def _block(client: PrefectClient, block: str) -> UUID:
    slug, _, name = block.partition("/")
    if not slug or not name:
        raise InputError(
            f"block: {one_line(block, 120)!r} is not type-slug/name, such as slack-webhook/ops", field="block"
        )
    try:
        found = await client.read_block_document_by_name(name, slug, include_secrets=False)
    except ObjectNotFound:
        raise ConfigurationError(
            f"block: there is no block {one_line(block, 120)}",
            advice="Create it in the Prefect UI (Blocks, one that sends notifications), and name it as "
            "type-slug/name.",
            field="block",
        ) from None
    if found.block_schema is None or "notify" not in found.block_schema.capabilities:
        raise ConfigurationError(
            f"block: {one_line(block, 120)} does not send notifications",
            advice="Name a block that does, such as one of the type slack-webhook or custom-webhook.",
            field="block",
        )
    return found.id


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _wrong(str(file), f"it cannot be read: {error.strerror}") from error


def _wrong(source: str, problem: str) -> InputError:
    return InputError(
        f"{one_line(source, 120)}: {one_line(problem)}",
        advice="Correct the file and start again; docs/automations has examples.",
        field="files",
    )
