"""Files that are whole or not there, and folders that take them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from mfuser.errors import CheckpointError


def check_writable(folder: Path) -> None:
    """Raises CheckpointError where the folder takes no files or cannot be made; makes nothing."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        reason = "a file of that name is there" if folder.is_file() else error.strerror
        raise CheckpointError(
            f"the folder {folder} cannot be written: {reason}; choose another --out"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def lives(process: int) -> bool:
    """Whether there is such a process on this machine; yes where that cannot be told."""
    if sys.platform == "win32":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; no number of a process
        return True
    return True
