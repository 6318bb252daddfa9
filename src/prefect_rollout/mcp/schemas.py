"""Schemas of tools, and arguments as clients send them. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefect_rollout.errors import InputError

_LISTS = ("images", "clusters", "plan", "newest")  # arguments that some clients send as JSON text
_ID = [{"type": "integer"}, {"type": "string"}]


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a short schema of arguments that every client can read: without `$ref`, titles and null.

    Null means not given, and `given` accepts a number for an ID. Limits are in the error of a wrong value.
    """
    return _slim(schema, schema.get("$defs", {}), ("description", "type", "enum", "required"))


def answer_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names and types in the schema of an answer, each kind of object once."""
    return _slim(schema, dict(schema.get("$defs", {})), ("type",))


def _slim(schema: Mapping[str, Any], definitions: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    answer = "description" not in kept
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        schema = {**definitions[name], "description": None, **schema}
        if answer:
            definitions[name] = {"type": schema["type"]}
    found = {key: schema[key] for key in kept if schema.get(key) is not None}
    if "properties" in schema:
        properties = schema["properties"].items()
        found["properties"] = {name: _slim(each, definitions, kept) for name, each in properties}
    for key in ("items", "additionalProperties"):
        if schema.get(key) and (key == "items" or not answer):
            found[key] = _slim(schema[key], definitions, kept)
    kinds = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if len(kinds) == 1:
        return {**_slim(kinds[0], definitions, kept), **found}
    if kinds == _ID:
        return found if answer else found | {"type": "string"}
    return found | ({"anyOf": [_slim(each, definitions, kept) for each in kinds]} if kinds else {})


def given(arguments: Mapping[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are given: without null, without outer blanks, ids as text.

    Raises:
        InputError: a list of clusters is empty.
    """
    return {
        name: _given(name, value, text=properties.get(name, {}).get("type") == "string")
        for name, value in arguments.items()
        if value is not None
    }


def _given(name: str, value: Any, *, text: bool = False) -> Any:
    if text and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        value = value.strip()
        if name in _LISTS and value[:1] in {"[", "{"}:
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value
    if name == "clusters" and isinstance(value, str | list):
        return _clusters(value)
    if isinstance(value, dict):
        # A container without an image is a mistake, not an image that is left out.
        return {key: _given(key, each) for key, each in value.items() if each is not None or name == "images"}
    return [_given("", each) for each in value] if isinstance(value, list) else value


def _clusters(value: str | list[Any]) -> list[Any]:
    """Return a list of clusters, whose names may be joined by commas."""
    listed = [value] if isinstance(value, str) else value
    parts = [part for each in listed for part in (each.split(",") if isinstance(each, str) else [each])]
    clusters = [part.strip() if isinstance(part, str) else part for part in parts]
    if not [cluster for cluster in clusters if cluster != ""]:
        raise InputError(
            "clusters: the list is empty",
            advice="Name the clusters, or leave it out for all clusters of the deployment.",
            field="clusters",
        )
    return clusters
