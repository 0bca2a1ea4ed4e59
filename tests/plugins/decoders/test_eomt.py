"""EoMT against the implementation in transformers, which is the authors' port; its masks, its
annealing, what it refuses, and a training that goes on after an interruption."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfuser import DGSSModel, MFuserError, Registry, TokenShape, build_model, load_registry
from mfuser.config.run import RunSpec
from mfuser.engine import train as training
from mfuser.engine.signals import Asked
from mfuser.engine.train import Interrupted
from mfuser.reporting.describe import describe, render
from mfuser.testing.bench import ToyBlocks
from mfuser_plugins.decoders.eomt import EoMT, EomtSpec, TextEomtSpec, seen

EOMT = {"name": "eomt", "queries": 20, "blocks": 2, "num_points": 64}
TEXT = {"name": "text_eomt", "blocks": 2, "num_points": 64}
SIZE = (64, 96)


def batch() -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 19, (2, *SIZE))
    labels[:, :5] = 255
    return torch.rand(2, 3, *SIZE), labels


# ---- the published model

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    "layer_norm_eps": 1e-6,
}
TOWERS: dict[str, dict[str, Any]] = {
    "eomt": {
        "config": {"model_type": "dinov2_with_registers", "mlp_ratio": 2},
        "names": {"encoder.layer.": "layers.", "attention.o_proj": "attention.out_proj"},
    },
    "eomt_dinov3": {
        "config": {"model_type": "dinov3_vit", "intermediate_size": 64},
        "names": {"model.layer.": "layers."},
    },
}
HEAD = {
    "q.weight": "query.weight",
    "class_head": "class_predictor",
    "mask_head.0": "mask_head.fc1",
    "mask_head.2": "mask_head.fc2",
    "mask_head.4": "mask_head.fc3",
    **{f"upscale.{i}.conv{c}": f"upscale_block.block.{i}.conv{c}" for i in (0, 1) for c in (1, 2)},
    **{f"upscale.{i}.norm": f"upscale_block.block.{i}.layernorm2d" for i in (0, 1)},
}


def published(kind: str, masks: str) -> tuple[DGSSModel, Any]:
    """A small EoMT here, and transformers' with the same weights."""
    transformers = pytest.importorskip("transformers")
    tower = TOWERS[kind]
    size = {"image_size": 64, "patch_size": 16, "num_register_tokens": 4, **SIZES}
    config = {**size, **tower["config"]}
    registry = load_registry()
    spec = registry.pairing(
        "eomt-dinov3-l",
        {
            "vfm": {"name": "transformers", "model": "random", "config": config},
            "decoder": {**EOMT, "masks": masks},
            "image_size": 64,
        },
    )
    model = build_model(spec)
    own = {k: v for k, v in config.items() if k != "model_type"}
    theirs = transformers.AutoConfig.for_model(
        kind, **own, num_blocks=2, num_queries=20, num_labels=19, num_upscale_blocks=2
    )
    other = transformers.AutoModelForUniversalSegmentation.from_config(theirs)
    vfm = model.encoder.vfm.model.state_dict()  # type: ignore[union-attr, operator]
    renamed = {}
    for name, value in vfm.items():
        for old, new in tower["names"].items():
            name = name.replace(old, new)
        renamed[f"layer{name}" if name.startswith("norm.") else name] = value
    for name, value in model.decoder.state_dict().items():
        start = next(part for part in HEAD if name == part or name.startswith(f"{part}."))
        renamed[name.replace(start, HEAD[start], 1)] = value
    if kind == "eomt":
        table = renamed.pop("embeddings.position_embeddings")
        with torch.no_grad():  # EoMT's class token has no position
            model.encoder.vfm.model.embeddings.position_embeddings[:, 0] = 0  # type: ignore
        renamed["embeddings.position_embeddings.weight"] = table[0, 1:]
    missing, unexpected = other.load_state_dict(renamed, strict=False)
    assert {m for m in missing if "attn_mask_probs" not in m and "criterion" not in m} <= {
        "embeddings.mask_token"
    }
    assert not [u for u in unexpected if "mask_token" not in u]
    return model.eval(), other.eval()


@pytest.mark.parametrize("kind", ["eomt", "eomt_dinov3"])
@pytest.mark.parametrize("masks", ["annealed", "always"])
def test_it_is_the_published_model(kind: str, masks: str) -> None:
    model, other = published(kind, masks)
    other.attn_mask_probs.fill_(float(masks == "always"))  # annealed: 0 once trained
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours = model(images).decoder
        theirs = other(model.encoder.vfm.normalize(images))  # type: ignore[union-attr]
    assert ours.masks[-1].shape == (2, 20, 16, 16)
    torch.testing.assert_close(ours.masks[-1], theirs.masks_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.classes[-1], theirs.class_queries_logits, atol=1e-4, rtol=1e-4)
    assert len(ours.masks) == (3 if masks == "always" else 1)


def test_the_shipped_pairing_has_the_published_number_of_parameters() -> None:
    transformers = pytest.importorskip("transformers")
    spec = load_registry().pairing("eomt-dinov3-l")
    facts = describe(spec)
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = transformers.AutoConfig.for_model(
        "eomt_dinov3",
        **large,
        **{"intermediate_size": 4096, "num_labels": 19, "num_queries": 100},
    )
    with torch.device("meta"):
        other = transformers.AutoModelForUniversalSegmentation.from_config(config)
    assert abs(facts["trained"] / sum(p.numel() for p in other.parameters()) - 1) < 0.01
    lines = "\n".join(x for x in render("eomt", facts) if isinstance(x, str))
    assert "the decoder's tokens join the last 4 blocks of the vfm" in lines


# ---- masks and their annealing


def test_masks_vanish_block_after_block() -> None:
    """As in the authors' configurations: 4 blocks, one sixth of the training each."""
    decoder = EoMT(EomtSpec(), 8, 16, 20, 3, None).train()

    def shares(progress: float) -> list[float]:
        decoder.progress = progress
        return [round(decoder.masked_share(k), 4) for k in range(4)]

    assert shares(0.0) == shares(1 / 6) == [1, 1, 1, 1]
    assert shares(1.5 / 6) == [round(0.5**0.9, 4), 1, 1, 1]
    assert shares(3 / 6) == [0, 0, 1, 1] and shares(5 / 6) == shares(1.0) == [0, 0, 0, 0]
    assert decoder.eval().masked_share(0) == 0  # of an untrained model, too
    given = EomtSpec(blocks=1, annealing=((0.0, 0.5),), power=1)
    decoder = EoMT(given, 8, 16, 20, 3, None).train()
    decoder.progress = 0.25
    assert decoder.masked_share(0) == 0.5
    always, never = (
        EoMT(EomtSpec(masks=m), 8, 16, 20, 3, None).masked_share(0)  # type: ignore[arg-type]
        for m in ("always", "never")
    )
    assert (always, never) == (1, 0)


def test_what_a_query_sees() -> None:
    masks = torch.full((1, 400, 4, 4), -1.0)
    masks[..., :2] = 1.0
    visible = seen(masks, (2, 2), 1.0)
    assert visible.shape == (1, 400, 4) and visible[0, 0].tolist() == [True, False, True, False]
    free = seen(masks, (2, 2), 0.3).all(-1)
    assert 0.6 < float(free.float().mean()) < 0.8
    assert seen(masks, (2, 2), 1e-9).all()


@pytest.mark.parametrize("masks", ["annealed", "always", "never"])
def test_predictions_that_are_supervised(masks: str) -> None:
    decoder = EoMT(EomtSpec(blocks=2, masks=masks, num_points=64), 8, 16, 20, 3, None)  # type: ignore
    decoder.progress = 0.5

    def predictions(training: bool) -> int:
        blocks = ToyBlocks(torch.randn(2, 7, 8), (2, 3), 2)
        output = decoder.train(training)(blocks)
        losses = decoder.loss(output, torch.randint(0, 3, (2, 32, 48)))
        assert len(losses) == 3 * len(output.masks)
        return len(output.masks)

    assert predictions(True) == (1 if masks == "never" else 3)
    assert predictions(False) == (3 if masks == "always" else 1)


# ---- in a pairing


@pytest.mark.parametrize("decoder", [EOMT, TEXT])
@pytest.mark.parametrize("towers", ["vfm", "vlm", "both", "list"])
def test_every_trained_parameter_gets_a_gradient(
    tiny: Registry, decoder: dict[str, Any], towers: str
) -> None:
    """Beside fusion too: adapters between the blocks, unequal depths, the tower frozen or not."""
    changes: dict[str, Any] = {"enhancer": "none", "decoder": decoder}
    vfm = tiny.pairing("tiny").model_dump(mode="json")["vfm"]
    changes |= {
        "vfm": {"vlm": "none", "vfm": {**vfm, "freeze": False}},
        "vlm": {"vfm": "none"},
        "both": {},
        "list": {"vfm": [vfm, {**vfm, "options": {**vfm["options"], "embed_dim": 16}}]},
    }[towers]
    if towers == "vfm" and decoder is TEXT:
        with pytest.raises(MFuserError, match="'text_eomt' takes class queries from text"):
            tiny.pairing("tiny", changes)
        return
    model = build_model("tiny", tiny, **changes).train()
    assert model.pyramid is None and model.encoder.taps == ()
    model.decoder.progress = 0.2
    reached: set[str] = set()
    for _ in range(2):
        losses = model(*batch())
        assert all(v.isfinite() for v in losses.values())
        assert ("loss_align" in losses) == (towers != "vfm")
        sum(losses.values()).backward()
        reached |= {n for n, p in model.named_parameters() if p.grad is not None}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained - reached == set()
    assert any("adapters" in n for n in reached)
    scores = model.segment(torch.rand(3, 70, 100))
    assert scores.shape == (1, 19, 70, 100) and scores.isfinite().all()


def test_adapters_act_between_the_joined_blocks(tiny: Registry) -> None:
    """Without fusion and queries that nothing attends to, the towers' way is the usual one."""
    changes: dict[str, Any] = {"enhancer": "none", "decoder": {**EOMT, "blocks": 3}}
    model = build_model("tiny", tiny, **changes).eval()
    plain = build_model("tiny", tiny, enhancer="none", decoder="linear").eval()
    plain.encoder.load_state_dict(model.encoder.state_dict())
    assert plain.prompt is not None and model.prompt is not None
    plain.prompt.load_state_dict(model.prompt.state_dict())
    calls: list[Tensor] = []
    for adapter in model.encoder.adapters.values():
        adapter.register_forward_hook(lambda m, args, out: calls.append(args[0]))
    vfm = model.encoder.vfm
    assert vfm is not None

    def alone(i: int, tokens: Tensor, state: Any, extra: Tensor, visible: Any) -> Any:
        return vfm.block(i, tokens, state), extra

    vfm.block_with = alone  # type: ignore[method-assign, assignment]
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        alignment = model(images).alignment
        expected = plain(images).alignment
    assert torch.equal(alignment, expected)
    tokens = vfm.token_shape.num_tokens
    assert len(calls) == 2 and all(given.shape[1] == tokens for given in calls)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vfm": {"name": "timm", "model": "swin_tiny_patch4_window7_224"}},
            "joins the last 2 blocks of the vfm, and vision 'timm' .* no further tokens there: its "
            "blocks attend within windows",
        ),
        (
            {"vfm": {"name": "timm", "model": "beitv2_base_patch16_224"}},
            "the bias of its attention is of a fixed number of tokens; plain vision transformers",
        ),
        (
            {"vfm": {"name": "timm", "model": "convnext_tiny"}},
            "its blocks are convolutions",
        ),
        (
            {"decoder": {**EOMT, "blocks": 4}},
            "decoder 'eomt' joins the last 4 blocks of the vfm, which has 3",
        ),
        ({"enhancer": "mtenhancer"}, "enhancer 'mtenhancer' reads what comes after them"),
        ({"taps": [0, 0, 1, 1]}, "reads no 'taps'"),
        ({"decoder": {**EOMT, "queries": 18}}, "18 queries cannot answer for 19 classes"),
        ({"decoder": {**EOMT, "annealing": [[0, 0.5]]}}, "annealing gives 1 spans for 2 blocks"),
        (
            {"decoder": {**EOMT, "annealing": [[0, 0.5], [0.7, 0.7]]}},
            r"the span \[0.7, 0.7\] does not end after it starts",
        ),
    ],
)
def test_what_is_refused_before_weights_are_read(
    tiny: Registry, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mfuser_plugins.backbones.timm as timm_component

    def read(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(timm_component, "published", read)
    monkeypatch.setattr(timm_component, "load", read)
    with pytest.raises(MFuserError, match=said):
        build_model("tiny", tiny, **{"enhancer": "none", "decoder": EOMT, **changes})


def test_parts_that_do_not_keep_to_the_blocks(tiny: Registry) -> None:
    model = build_model("lone", tiny, decoder=EOMT)

    class Short(EoMT):
        def masked_share(self, block: int) -> float:
            return 0.0

        def join(self, blocks: Any, queries: Any = None) -> Any:
            steps, blocks.count = blocks.count, blocks.count - 1
            output = super().join(blocks, queries)
            blocks.count = steps - blocks.count - 1
            return output

    tower = model.encoder.vfm
    assert tower is not None
    model.decoder.__class__ = Short
    with pytest.raises(MFuserError, match="left 1 of the blocks that it declares to join"):
        model.eval()(torch.rand(1, 3, *SIZE))
    blocks = ToyBlocks(torch.randn(1, 7, 8), (2, 3), 1)
    blocks.step(torch.randn(1, 2, 8))
    with pytest.raises(MFuserError, match="steps further than the blocks"):
        blocks.step(torch.randn(1, 2, 8))


def test_text_queries_start_from_the_texts() -> None:
    spec = TextEomtSpec(blocks=1, num_points=64)
    decoder = spec.build_joining(TokenShape(8, (2, 3), 1), (16, 16), 3, 5).eval()
    tokens, texts = torch.randn(1, 7, 8), torch.randn(1, 3, 5)
    scores = [
        decoder.semantic_logits(decoder(ToyBlocks(tokens, (2, 3), 1), t), (8, 8))
        for t in (texts, texts + 1)
    ]
    assert not torch.allclose(scores[0], scores[1])
    with pytest.raises(MFuserError, match="text_eomt takes class queries from text"):
        decoder(ToyBlocks(tokens, (2, 3), 1), None)


# ---- training


@pytest.fixture(scope="module")
def run(tiny: Registry) -> RunSpec:
    """20 steps of a reduced EoMT whose tower trains; masks anneal on the way."""
    pairing = tiny.pairing(
        "lone", {"decoder": EOMT, "vfm": {"freeze": False}, "image_size": [32, 32]}
    )
    recipe = tiny.recipe("tiny", ["steps=20", "save_every=10", "lr=2e-3", "batch_size=2"])
    return RunSpec.of(tiny, "lone", "tiny", pairing=pairing, recipe=recipe)


def test_a_reduced_one_learns_and_resumes_to_the_bit(
    tiny: Registry, run: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, float]] = []
    losses: list[float] = []
    step_of = training.Trainer._step

    def watched(self: Any, step: int, batches: Any) -> Any:
        found = step_of(self, step, batches)
        told.append((step, self.model.decoder.progress))
        losses.append(sum(found.values()))
        return found

    monkeypatch.setattr(training.Trainer, "_step", watched)
    whole = training.train(tiny, run, tmp_path / "whole").model
    assert told == [(s, s / 20) for s in range(20)]
    assert whole.decoder.progress == 1.0
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    told.clear()

    asked = itertools.count()

    class After(Asked):
        def __call__(self) -> bool:
            return next(asked) == 8

    monkeypatch.setattr(
        "mfuser.engine.train.interruptible", lambda: contextlib.nullcontext(After())
    )
    with pytest.raises(Interrupted):
        training.train(tiny, run, tmp_path / "cut")
    resumed = training.train(tiny, run, tmp_path / "cut", resume=True).model
    assert [step for step, _ in told] == [*range(20)] and told[9] == (9, 9 / 20)
    one, other = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
