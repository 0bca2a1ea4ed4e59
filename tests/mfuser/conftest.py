"""For tests of the framework: the drawn images that it trains on come from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

_samples: dict[tuple[Any, ...], Any] = {}
_labels: dict[tuple[Any, ...], Any] = {}


@pytest.fixture(autouse=True, scope="module")
def _drawn_once() -> Iterator[None]:
    """Each image is drawn once in a process, whoever asks: a tenth of the time of these tests.

    That drawing it again gives the same is tested where it is drawn (tests/plugins).
    """
    from mfuser import Sample
    from mfuser_plugins.datasets.streets import Streets

    def remembered(draw: Callable[[Streets, int], Any], kept: dict[Any, Any]) -> Any:
        def call(self: Streets, index: int) -> Any:
            what = (self.domain, self.split, self.seed, self.size, str(self.style))
            key = (*what, self._index(index))
            if key not in kept:
                kept[key] = draw(self, index)
            return kept[key]

        return call

    sample = remembered(Streets._draw, _samples)
    label = remembered(Streets.label, _labels)

    def drawn(self: Streets, index: int) -> Sample:
        found = sample(self, index)
        return Sample(found.image.copy(), found.label.copy(), found.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streets, "_draw", drawn)
        patch.setattr(Streets, "label", lambda self, index: label(self, index).copy())
        yield
