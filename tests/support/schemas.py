# SPDX-License-Identifier: Apache-2.0
"""docs/schemas/: what the JSON of each command is checked against, strictly: a key that is not described
there is a mistake, which it is not for others, since keys are added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

DIRECTORY = Path(__file__).resolve().parents[2] / "docs/schemas"
COMMANDS = tuple(sorted(path.stem for path in DIRECTORY.glob("*.json")))


def read(command: str) -> dict[str, Any]:
    """The schema of what a command prints with --json."""
    schema: dict[str, Any] = json.loads((DIRECTORY / f"{command}.json").read_text())
    Draft202012Validator.check_schema(schema)
    return schema


def _close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: value if key in ("if", "then", "else") else _close(value) for key, value in schema.items()}
    if closed.get("type") == "object" and "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def check(command: str, document: Any) -> None:
    """Raises AssertionError that names all places where a document is not as its schema says."""
    wrong = Draft202012Validator(_close(read(command))).iter_errors(document)
    found = [f"{'/'.join(map(str, each.path)) or 'the document'}: {each.message[:300]}" for each in wrong]
    assert not found, f"splicer {command} --json: " + "; ".join(found)
