"""Inference: what a trained model is to one, and what one has to return.

Letters in shapes as in `interfaces`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Network(ABC):
    """A trained model as an inference sees it: class scores of images of a size that it chooses."""

    window: tuple[int, int]
    """(height, width) that the model was trained on."""
    patch: tuple[int, int]
    """(height, width); images of any other size must be of whole patches of all its encoders."""

    @abstractmethod
    def scores(self, images: Tensor) -> Tensor:
        """RGB in [0, 1] (B, 3, h, w), of the window's size or of multiples of `patch` -> class
        scores (B, K, h, w).

        Raises MFuserError where a part of the model works at the window's size alone.
        """

    @abstractmethod
    def confidence(self, scores: Tensor) -> Tensor:
        """Class scores (B, K, h, w) -> the probability of the best class (B, h, w)."""


class Inference(ABC):
    """How images of any size become class scores: what a trained model is asked, and how the
    answers are put together."""

    @abstractmethod
    def __call__(self, network: Network, images: Tensor) -> Tensor:
        """RGB in [0, 1] (B, 3, H, W) -> class scores (B, K, H, W), float32 at least.

        Each image by itself: what is in the batch beside it changes nothing. Raises MFuserError
        as `check` does.
        """

    def check(self, network: Network, size: tuple[int, int]) -> None:
        """Raises MFuserError for images of `size` (height, width) that it cannot segment."""
        return None
