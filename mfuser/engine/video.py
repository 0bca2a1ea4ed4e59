"""Videos in and out, through OpenCV's own copy of FFmpeg."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from mfuser.data.images import UnreadableImage
from mfuser.errors import DataError, legible
from mfuser.files import utf8_name


class VideoReader:
    """Frames (H, W, 3) uint8 RGB of a video. Raises UnreadableImage naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with utf8_name(path) as name:
            self._capture = cv2.VideoCapture(str(name))
        if not self._capture.isOpened():
            raise UnreadableImage(f"{path} is not a video that OpenCV can read")
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        """As the container states it; 0 if it does not."""
        self.size = (
            int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
            int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        read = 0
        while True:
            there, frame = self._capture.read()
            if not there:
                break
            read += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        self._capture.release()
        if read == 0:
            raise UnreadableImage(f"{self.path} holds no frame that can be read")


class VideoWriter:
    """An MP4 (color) or a lossless FFV1 file (class ids, ending in .mkv) at `path`.

    Raises DataError where OpenCV's FFmpeg lacks the codec or the folder takes no file.
    """

    def __init__(self, path: Path, rate: float, size: tuple[int, int], *, ids: bool) -> None:
        code = cv2.VideoWriter.fourcc(*("FFV1" if ids else "mp4v"))
        self.ids = ids
        self._path = path
        # OpenCV tells the container by the ending, whatever the file is to be called.
        ending = ".mkv" if ids else ".mp4"
        self._part = path.with_name(f"{path.name}{ending}")
        self._beside: tempfile.TemporaryDirectory[str] | None = None
        if legible(str(self._part)) != str(self._part):  # OpenCV would crash
            self._beside = tempfile.TemporaryDirectory()
            self._part = Path(self._beside.name) / f"part{ending}"
        self._writer = cv2.VideoWriter(str(self._part), code, rate, size[::-1], isColor=not ids)
        if not self._writer.isOpened():
            raise DataError(f"{path} cannot be written as a video of {size[1]}x{size[0]}")

    def write(self, frame: np.ndarray) -> None:
        self._writer.write(frame if self.ids else cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()
        if self._part.is_file():
            shutil.move(self._part, self._path)
        if self._beside is not None:
            self._beside.cleanup()
