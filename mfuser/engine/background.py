"""Work beside a training, one piece after the other, whose errors are not lost."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Background:
    """A thread that does what it is given, in order; nothing more after a piece that failed.

    The end of the process does not wait for it: what it does must leave files whole at any moment.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def put(self, work: Callable[[], object]) -> None:
        """Begin it once what came before it is done; returns at once."""
        before = self._thread

        def run() -> None:
            if before is not None:
                before.join()
            if self._error is None:
                try:
                    work()
                except BaseException as error:
                    self._error = error

        self._thread = Thread(target=run, name="mfuser-background", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a piece has failed, which `wait` will raise."""
        return self._error is not None

    def wait(self, seconds: float | None = None) -> None:
        """Until all is done, or for so long. Raises what a piece has raised, once."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = self._thread if self._thread.is_alive() else None
        error, self._error = self._error, None
        if error is not None:
            raise error
