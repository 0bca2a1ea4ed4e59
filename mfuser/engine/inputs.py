"""The inputs of `predict`: files and folders, images and videos, and what is neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mfuser.errors import DataError, listed

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
OURS = (".mask", ".overlay", ".confidence", ".pca", ".similarity", ".compare")
"""Precedes the suffix of the files that `predict` and `visualize` write."""
LEGEND = "legend.png"
NOT_PICTURES = {".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib"}
"""Endings that Pillow registers for documents, films and fields."""


@dataclass
class Inputs:
    """images, videos: to segment. unknown: files of folders that are neither."""

    images: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)


def picture_endings() -> frozenset[str]:
    """Endings of the raster formats that Pillow reads here."""
    Image.init()
    known = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(known - NOT_PICTURES)


def find(paths: Iterable[str | Path], recursive: bool = False) -> Inputs:
    """Files as given, and what lies in folders: hidden files and earlier outputs are passed over.

    recursive: also in folders below. Raises DataError for what is missing, and for a folder
    without anything to segment.
    """
    found, endings = Inputs(), picture_endings()
    for path in map(Path, paths):
        if path.is_file():
            (found.videos if path.suffix.lower() in VIDEOS else found.images).append(path)
            continue
        if not path.is_dir():
            raise DataError(f"there is no image or folder {path}")
        before = len(found.images) + len(found.videos)
        for inside in _files(path, recursive):
            ending = inside.suffix.lower()
            if _never_ends(inside):
                found.unknown.append(inside)
            elif ending in VIDEOS:
                found.videos.append(inside)
            elif ending in endings:
                found.images.append(inside)
            else:
                found.unknown.append(inside)
        if len(found.images) + len(found.videos) == before:
            below = "" if recursive else "; --recursive looks in the folders below, too"
            raise DataError(f"the folder {path} holds no images{below}")
    return found


def tell(passed: Sequence[Path], what: str, say: Callable[[str], object]) -> None:
    """Say how many files were passed over, and name the first."""
    if passed:
        names = listed([str(path) for path in passed])
        say(f"{len(passed)} files are {what} and were skipped: {names}")


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if recursive:
                yield from _files(entry, recursive)
        elif not _is_ours(entry):
            yield entry


def _never_ends(path: Path) -> bool:
    """Pipes, sockets and devices: reading one waits for somebody who writes."""
    return path.is_fifo() or path.is_socket() or path.is_char_device() or path.is_block_device()


def _is_ours(path: Path) -> bool:
    return path.name == LEGEND or Path(path.stem).suffix in OURS or path.name.endswith(".npz")


def file_names(paths: Sequence[Path]) -> list[str]:
    """A name of its own for each: the file's, with as many of its folders as tell it apart."""
    names = [path.stem for path in paths]
    for depth in range(1, max((len(p.parts) for p in paths), default=0) + 1):
        count = Counter(names)
        twins = [i for i, name in enumerate(names) if count[name] > 1]
        if not twins:
            break
        for i in twins:
            names[i] = "_".join(part.strip("/\\:") for part in paths[i].parts[-depth:])
    count = Counter(names)
    return [f"{n}_{i}" if count[n] > 1 else n for i, n in enumerate(names)]
