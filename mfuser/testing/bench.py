"""Building and calling a single component, with random inputs of unusual shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mfuser.errors import PluginError
from mfuser.interfaces import (
    Decoder,
    FusionAdapter,
    JoiningDecoder,
    LastBlocks,
    ManyFusionAdapter,
    TextEnhancer,
    VisionBackbone,
    VisionLanguageBackbone,
)
from mfuser.plugins.contracts import built
from mfuser.specs import (
    DecoderSpec,
    EnhancerSpec,
    FusionSpec,
    Spec,
    TokenShape,
    TuningSpec,
    VisionLanguageSpec,
    VisionSpec,
)
from mfuser.testing.partners import CLASSES, IMAGE, everything, labels_for, partners

Inputs = dict[str, Any]


class Bench(ABC):
    """How a component of one kind is built and called.

    A case is a set of sizes it is built for (widths, grids, classes). Most checks use the first
    one, "shapes at odd sizes" uses all.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @abstractmethod
    def cases(self) -> Iterator[Any]: ...

    @abstractmethod
    def make(self, case: Any) -> nn.Module | None:
        """The component's module; None where its build returns None."""

    @abstractmethod
    def inputs(self, case: Any, batch: int) -> Inputs:
        """Random inputs, float32 on the CPU."""

    @abstractmethod
    def call(self, module: Any, inputs: Inputs) -> dict[str, Tensor]:
        """Outputs by name."""

    @abstractmethod
    def expected(self, case: Any, inputs: Inputs) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs."""

    def build(self, case: Any, seed: int = 0) -> Any:
        """A module from this seed; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(case)

    def feed(self, case: Any, batch: int = 2, seed: int = 1) -> Inputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs(case, batch)

    def describe(self, case: Any) -> str:
        return str(case)


Pair = tuple[TokenShape | None, TokenShape | None]
Many = dict[str, TokenShape]
"""More than one VFM: role -> shape."""


class FusionBench(Bench):
    spec: FusionSpec

    def cases(self) -> Iterator[Pair | Many]:
        wide, narrow = TokenShape(48, (3, 5), 1), TokenShape(32, (2, 4), 0)
        yield wide, narrow
        yield narrow, TokenShape(32, (2, 4), 0)
        yield TokenShape(32, (7, 3), 5), wide
        if self.spec.single_tower:
            yield wide, None
            yield None, narrow
        if self.spec.any_number:
            yield {"vfm_1": wide, "vfm_2": TokenShape(32, (7, 3), 5), "vlm": narrow}
            yield {"vfm_1": narrow, "vfm_2": wide}

    def describe(self, case: Pair | Many) -> str:
        def one(shape: TokenShape | None) -> str:
            if shape is None:
                return "none"
            prefix = f" + {shape.num_prefix_tokens}" if shape.num_prefix_tokens else ""
            return f"width {shape.embed_dim}, {shape.grid[0]}x{shape.grid[1]}{prefix} tokens"

        return "; ".join(f"{role} {one(shape)}" for role, shape in self._by_role(case).items())

    @staticmethod
    def _by_role(case: Pair | Many) -> Mapping[str, TokenShape | None]:
        return case if isinstance(case, dict) else dict(zip(("vfm", "vlm"), case, strict=True))

    def make(self, case: Pair | Many) -> FusionAdapter | ManyFusionAdapter | None:
        if isinstance(case, dict):
            return built(
                self.spec, ManyFusionAdapter, lambda: self.spec.build_many(case), optional=True
            )
        return built(self.spec, FusionAdapter, lambda: self.spec.build(*case), optional=True)

    def inputs(self, case: Pair | Many, batch: int) -> Inputs:
        shapes = self._by_role(case)
        tokens = [
            torch.randn(batch, s.num_tokens, s.embed_dim) if s else None for s in shapes.values()
        ]
        grids = [s.grid if s else None for s in shapes.values()]
        return {"tokens": tokens, "grids": grids, "roles": tuple(shapes)}

    def call(self, module: Any, inputs: Inputs) -> dict[str, Tensor]:
        if isinstance(module, ManyFusionAdapter):
            offsets = module(inputs["tokens"], inputs["grids"])
        else:
            offsets = module(*inputs["tokens"], *inputs["grids"])
        named = zip(inputs["roles"], offsets, strict=True)
        return {f"{r}_offset": o for r, o in named if o is not None}

    def expected(self, case: Pair | Many, inputs: Inputs) -> dict[str, tuple[int, ...]]:
        given = zip(inputs["roles"], inputs["tokens"], strict=True)
        return {f"{r}_offset": tuple(t.shape) for r, t in given if t is not None}


class EnhancerBench(Bench):
    spec: EnhancerSpec

    def cases(self) -> Iterator[tuple[int, int, int]]:
        yield from [(24, 3, 15), (24, 1, 6), (40, 19, 35)]

    def describe(self, case: Any) -> str:
        return f"text_dim {case[0]}, {case[1]} classes, {case[2]} patches"

    def make(self, case: Any) -> TextEnhancer:
        return built(self.spec, TextEnhancer, lambda: self.spec.build(case[0], case[1]))

    def inputs(self, case: Any, batch: int) -> Inputs:
        width, classes, patches = case
        return {
            "text": torch.randn(batch, classes, width),
            "visual": torch.randn(batch, 1 + patches, width),
        }

    def call(self, module: Any, inputs: Inputs) -> dict[str, Tensor]:
        return {"queries": module(inputs["text"], inputs["visual"])}

    def expected(self, case: Any, inputs: Inputs) -> dict[str, tuple[int, ...]]:
        return {"queries": tuple(inputs["text"].shape)}


class DecoderBench(Bench):
    """A case: (channels of the levels, classes, text width, size of the finest level)."""

    spec: DecoderSpec
    SIZE = (37, 61)
    """Size of the requested scores: odd, and not a multiple of a level's."""

    def cases(self) -> Iterator[Any]:
        if self.spec.joins():
            wide = TokenShape(32, (3, 5), 1)
            yield wide, 3, 24, (8, 8)
            yield TokenShape(48, (4, 2), 0), 5, 40, (16, 16)
            if not self.spec.needs_text:
                yield wide, 1, None, (14, 14)
            return
        yield (16, 16, 16, 16), 3, 24, (12, 20)
        yield (16, 16, 16, 16), 19, 40, (9, 17)
        yield (24, 16, 16, 8), 1, 24, (16, 8)
        if not self.spec.needs_text:
            yield (16, 16, 16, 16), 3, None, (17, 19)

    def describe(self, case: Any) -> str:
        channels, classes, text, size = case
        if isinstance(channels, TokenShape):
            return (
                f"tokens {channels}, {classes} classes, text_dim {text}, patches of "
                f"{size[0]}x{size[1]}"
            )
        return (
            f"channels {channels}, {classes} classes, text_dim {text}, finest level "
            f"{size[0]}x{size[1]}"
        )

    def make(self, case: Any) -> Decoder:
        first, classes, text, size = case
        if isinstance(first, TokenShape):
            joining = partial(self.spec.build_joining, first, size, classes, text)
            return built(self.spec, JoiningDecoder, joining)
        return built(self.spec, Decoder, lambda: self.spec.build(case[0], case[1], case[2]))

    def inputs(self, case: Any, batch: int) -> Inputs:
        channels, classes, text, size = case
        if isinstance(channels, TokenShape):
            return {
                "tokens": torch.randn(batch, channels.num_tokens, channels.embed_dim),
                "grid": channels.grid,
                "queries": torch.randn(batch, classes, text) if text else None,
                "labels": labels_for(batch, self.SIZE, classes),
            }
        sizes = [size]
        for _ in channels[1:]:
            sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
        return {
            "pyramid": [torch.randn(batch, c, *s) for c, s in zip(channels, sizes, strict=True)],
            "queries": torch.randn(batch, classes, text) if text else None,
            "alignment": 2 * torch.rand(batch, classes, *sizes[-1]) - 1 if text else None,
            "labels": labels_for(batch, self.SIZE, classes),
        }

    def call(self, module: Any, inputs: Inputs) -> dict[str, Tensor]:
        output = self._output(module, inputs)
        return {"scores": module.semantic_logits(output, self.SIZE)}

    def _output(self, module: Any, inputs: Inputs) -> Any:
        if "tokens" in inputs:
            blocks = ToyBlocks(inputs["tokens"], inputs["grid"], self.spec.joins())
            return module(blocks, inputs["queries"])
        read = [inputs["alignment"]] if module.reads_alignment else []
        return module(inputs["pyramid"], inputs["queries"], *read)

    def losses(self, module: Any, inputs: Inputs) -> dict[str, Tensor]:
        """Named losses, their random points drawn from one seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            output = self._output(module, inputs)
            return dict(module.loss(output, inputs["labels"]))

    def expected(self, case: Any, inputs: Inputs) -> dict[str, tuple[int, ...]]:
        return {"scores": (len(inputs["labels"]), case[1], *self.SIZE)}


class ToyBlocks(LastBlocks):
    """Blocks without weights: each token moves toward the mean of what it sees."""

    def __init__(self, tokens: Tensor, grid: tuple[int, int], count: int) -> None:
        self.tokens, self.grid, self.count, self.batch = tokens, grid, count, len(tokens)

    def look(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        width = (self.tokens.shape[-1],)
        patches = layer_norm(self.tokens[:, -self.grid[0] * self.grid[1] :], width)
        return layer_norm(extra, width), patches.transpose(1, 2).unflatten(2, self.grid)

    def step(self, extra: Tensor, visible: Tensor | None = None) -> Tensor:
        if self.count == 0:
            raise PluginError("the decoder steps further than the blocks that it declares to join")
        patches = self.tokens[:, -self.grid[0] * self.grid[1] :]
        if visible is None:
            visible = extra.new_ones(*extra.shape[:2], patches.shape[1], dtype=torch.bool)
        weight = visible.to(patches.dtype)
        read = weight @ patches / weight.sum(-1, keepdim=True).clamp(min=1)
        self.tokens = self.tokens + 0.5 * torch.tanh(extra.mean(1, keepdim=True))
        self.count -= 1
        return extra + 0.5 * torch.tanh(read)


class BackboneBench(Bench):
    """A case: an image size."""

    spec: VisionSpec | VisionLanguageSpec

    def cases(self) -> Iterator[tuple[int, int]]:
        yield from [IMAGE, (64, 64), (53, 71)]

    def describe(self, case: Any) -> str:
        return f"images of {case[0]}x{case[1]}"

    def make(self, case: Any) -> VisionBackbone:
        text = isinstance(self.spec, VisionLanguageSpec)
        kind = VisionLanguageBackbone if text else VisionBackbone
        backbone: VisionBackbone = built(self.spec, kind, lambda: self.spec.build(case))
        return backbone

    def inputs(self, case: Any, batch: int) -> Inputs:
        return {"images": torch.rand(batch, 3, *case)}

    def call(self, module: Any, inputs: Inputs) -> dict[str, Tensor]:
        stream = module.embed(module.normalize(inputs["images"]))
        outputs = {"embed": stream.tokens}
        tokens = stream.tokens
        for i in range(module.depth):
            tokens = module.step(i, tokens, stream.state)
            outputs[f"block {i}"] = tokens
        outputs["finish"] = tokens = module.finish(tokens, stream.state)
        if isinstance(module, VisionLanguageBackbone):
            outputs["global"], outputs["dense"] = module.project(tokens, stream.state)
            ids = module.tokenize(list(CLASSES), 5).to(tokens.device)
            outputs["text"] = module.encode_text(ids)
            context = torch.zeros(2, module.context_dim, dtype=tokens.dtype, device=tokens.device)
            outputs["prompted text"] = module.encode_text(ids, context)
        return outputs

    def expected(self, case: Any, inputs: Inputs) -> dict[str, tuple[int, ...]]:
        module = self.build(case)
        batch = len(inputs["images"])
        sequence = (batch, module.token_shape.num_tokens, module.embed_dim)
        shapes: dict[str, tuple[int, ...]] = {n: sequence for n in ("embed", "finish")}
        shapes |= {f"block {i}": sequence for i in range(module.depth)}
        if isinstance(module, VisionLanguageBackbone):
            patches = module.grid[0] * module.grid[1]
            shapes["global"] = (batch, 1, module.text_dim)
            shapes["dense"] = (batch, patches, module.text_dim)
            shapes["text"] = shapes["prompted text"] = (len(CLASSES), module.text_dim)
        return shapes


class TuningBench(BackboneBench):
    """A frozen backbone, changed by the component."""

    spec: TuningSpec  # type: ignore[assignment]

    def make(self, case: Any) -> VisionBackbone:
        partner = next(iter(partners("vision", everything()).values()))
        assert isinstance(partner, VisionSpec)
        backbone = partner.build(case)
        built(self.spec, type(None), lambda: self.spec.build(backbone))
        return backbone


def moved(inputs: Any, how: Any) -> Any:
    """Floating tensors in nested inputs after `how`, others moved to the same device only."""
    if isinstance(inputs, Tensor):
        if inputs.is_floating_point():
            return inputs.to(how)
        return inputs.to(how) if isinstance(how, torch.device) else inputs
    if isinstance(inputs, dict):
        return {k: moved(v, how) for k, v in inputs.items()}
    if isinstance(inputs, list):
        return [moved(v, how) for v in inputs]
    return inputs
