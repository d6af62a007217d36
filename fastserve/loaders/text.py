"""Text and JSON files that come with a model, read with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .spec import ModelError


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error


def read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object; `missing` when there is no such file and that is fine."""
    if missing is not None and not path.is_file():
        return missing
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value
