"""Files that are whole or not there, and folders that take them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from mfuser.errors import CheckpointError, legible

CACHE = "MFUSER_CACHE_DIR"
"""The variable that names the cache folder."""
TEMPORARY = re.compile(r"\.(.+)\.([1-9][0-9]*)\.tmp")


def unwritable(folder: Path) -> str | None:
    """Why the folder takes no files or cannot be made, if so; nothing is made."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        with tempfile.TemporaryFile(dir=above):
            return None
    except OSError as error:
        reason = "a file of that name is there" if folder.is_file() else error.strerror
        return f"the folder {folder} cannot be written: {reason}"


def check_writable(folder: Path) -> None:
    """Raises CheckpointError where the folder takes no files or cannot be made; makes nothing."""
    if reason := unwritable(folder):
        raise CheckpointError(f"{reason}; choose another --out")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write to; afterwards `path` is that file, or what it was before.

    The file reaches the disk before it gets its name, and has the mode that the umask says,
    whatever wrote it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # not emptied: it may be a second name of a file in use
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        # Also where all went well: of two names of one file, replacing removes none.
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def utf8_name(path: Path) -> Iterator[Path]:
    """A name by which libraries can read a file that open no name but UTF-8: a link, if need be."""
    if legible(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"file{legible(path.suffix)}"
        link.symlink_to(path.absolute())
        yield link


def clear_leftovers(folder: Path, of: str | None = None) -> None:
    """Remove temporary files left behind by processes that were killed while writing.

    of: the name of that file; any by default.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be read is the writer's to report
        for file in folder.iterdir():
            match = TEMPORARY.fullmatch(file.name)
            if match is None or of not in (None, match[1]):
                continue
            if file.is_file() and not file.is_symlink() and not lives(int(match[2])):
                file.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def cache_folder() -> Path | None:
    """MFUSER_CACHE_DIR, or mfuser in the user's cache folder; None for a user without a home."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    try:
        folder = user_cache_path("mfuser", appauthor=False)
    except RuntimeError:
        return None
    # Older releases of platformdirs answer with a "~" that stands for nothing.
    return None if folder.parts[:1] == ("~",) else folder


def lives(process: int) -> bool:
    """Whether there is such a process on this machine; yes where that cannot be told."""
    if sys.platform == "win32":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or not the number of a process
        return True
    return True
