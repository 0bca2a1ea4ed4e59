"""Building and calling an inference or a loss, with stand-ins for a model; every kind's bench."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mfuser.errors import MFuserError
from mfuser.inference import Inference, Network
from mfuser.interfaces import DecoderOutput
from mfuser.losses import Loss, LossInputs, LossParts
from mfuser.plugins.contracts import built
from mfuser.specs import InferenceSpec, LossSpec
from mfuser.testing.bench import (
    BackboneBench,
    Bench,
    DecoderBench,
    EnhancerBench,
    FusionBench,
    Inputs,
    TuningBench,
)
from mfuser.testing.partners import CLASSES, labels_for


class StandIn(Network, nn.Module):
    """A small network of two convolutions, which any size suits, in place of a model."""

    window = (24, 32)
    patch = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, len(CLASSES), 3, padding=1)
        ).requires_grad_(False)

    def scores(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        if size != self.window and (size[0] % self.patch[0] or size[1] % self.patch[1]):
            raise MFuserError(
                f"the network was given images of {size[0]}x{size[1]}: neither its window nor "
                "whole patches (network.window, network.patch)"
            )
        scores: Tensor = self.layers(images.to(next(self.parameters()).dtype))
        return scores

    def confidence(self, scores: Tensor) -> Tensor:
        return scores.softmax(1).amax(1)


class AskedNetwork(nn.Module):
    """A stand-in, asked by an inference."""

    def __init__(self, inference: Inference) -> None:
        super().__init__()
        self.inference, self.network = inference, StandIn()

    def forward(self, images: Tensor) -> Tensor:
        self.inference.check(self.network, (images.shape[-2], images.shape[-1]))
        return self.inference(self.network, images)


class InferenceBench(Bench):
    """A case: an image size."""

    spec: InferenceSpec

    def cases(self) -> Iterator[tuple[int, int]]:
        yield from [(41, 67), StandIn.window, (48, 32)]

    def describe(self, case: Any) -> str:
        return f"images of {case[0]}x{case[1]}, window {StandIn.window[0]}x{StandIn.window[1]}"

    def make(self, case: Any) -> AskedNetwork:
        return AskedNetwork(built(self.spec, Inference, self.spec.build))

    def inputs(self, case: Any, batch: int) -> Inputs:
        return {"images": torch.rand(batch, 3, *case)}

    def call(self, module: Any, inputs: Inputs) -> dict[str, Tensor]:
        return {"scores": module(inputs["images"])}

    def expected(self, case: Any, inputs: Inputs) -> dict[str, tuple[int, ...]]:
        return {"scores": (len(inputs["images"]), len(CLASSES), *case)}


class LossBench(Bench):
    """A case: (classes, text width, image size)."""

    spec: LossSpec
    CHANNELS = (16, 16, 16, 16)
    GRID = (3, 4)

    def cases(self) -> Iterator[Any]:
        yield from [(3, 24, (32, 48)), (19, 40, (17, 29)), (1, 24, (16, 8))]

    def describe(self, case: Any) -> str:
        return f"{case[0]} classes, text_dim {case[1]}, images of {case[2][0]}x{case[2][1]}"

    def make(self, case: Any) -> Loss:
        classes, width, _ = case

        def encode(texts: list[str], slots: int | None = None) -> Tensor:
            return torch.randn(len(texts), width, generator=torch.Generator().manual_seed(0))

        names = tuple(f"class {k}" for k in range(classes))
        parts = LossParts(names, self.CHANNELS, width, encode)
        return built(self.spec, Loss, lambda: self.spec.build(parts))

    def inputs(self, case: Any, batch: int) -> Inputs:
        classes, width, size = case
        patches = self.GRID[0] * self.GRID[1]
        given: Inputs = {
            "images": torch.rand(batch, 3, *size),
            "labels": labels_for(batch, size, classes),
            "pyramid": [torch.randn(batch, 16, 16 // 2**i, 24 // 2**i) for i in range(4)],
            "masks": torch.randn(batch, classes, 16, 24),
            "log_probs": torch.randn(batch, classes, *size).log_softmax(1),
            "queries": torch.randn(batch, classes, width),
            "visual": torch.randn(batch, 1 + patches, width),
            "alignment": 2 * torch.rand(batch, classes, *self.GRID) - 1,
            "frozen": torch.randn(batch, 1 + patches, width),
        }
        if "view" in self.spec.needs:
            given["second"] = {
                name: torch.randn_like(value).log_softmax(1)
                if name == "log_probs"
                else torch.randn_like(value)
                for name, value in given.items()
                if isinstance(value, Tensor) and value.is_floating_point()
            }
        return given

    def call(self, module: Any, inputs: Inputs) -> dict[str, Tensor]:
        given = self._given(inputs, inputs["images"])
        if "view" in self.spec.needs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(2)
                seen = module.view(inputs["images"])
            if seen.shape != inputs["images"].shape:
                raise MFuserError(f"view() returned shape {tuple(seen.shape)}")
            given.view = self._given({**inputs, **inputs["second"]}, seen)
        return dict(module(given))

    losses = call

    def _given(self, inputs: Inputs, images: Tensor) -> LossInputs:
        output = DecoderOutput([inputs["masks"]])
        given = LossInputs(images, inputs["labels"], output, inputs["pyramid"])
        names = {
            "log_probs": ("log_probs",),
            "text": ("queries", "visual", "alignment"),
            "frozen": ("frozen",),
            "view": (),
        }
        for need in self.spec.needs:
            for name in names[need]:
                setattr(given, name, inputs[name])
        return given

    def expected(self, case: Any, inputs: Inputs) -> dict[str, tuple[int, ...]]:
        return {name: () for name in self.call(self.build(case), inputs)}


BENCHES: dict[str, type[Bench]] = {
    "vision": BackboneBench,
    "vision_language": BackboneBench,
    "fusion": FusionBench,
    "tuning": TuningBench,
    "enhancer": EnhancerBench,
    "decoder": DecoderBench,
    "loss": LossBench,
    "inference": InferenceBench,
}
