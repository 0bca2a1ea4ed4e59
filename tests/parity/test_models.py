"""Whole models from released state dicts, against plain float64 and the released outputs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import below, golden
from torch import Tensor

from mfuser import DGSSModel, PairingSpec, load_registry
from mfuser.engine.checkpoints import load_released
from mfuser.engine.train import parameter_groups
from mfuser.model.alignment import score_map
from mfuser.model.sliding_window import sliding_window
from mfuser.released import recognize, translate

KINDS = ("eva", "clip", "siglip")


def build(reference: ModuleType, kind: str, **changes: Any) -> DGSSModel:
    table = {**reference.spec(kind), **{k: v for k, v in changes.items() if k != "vlm"}}
    table["vlm"] = {**table["vlm"], **changes.get("vlm", {})}
    return load_released(reference.state(kind), PairingSpec.model_validate(table))


def computed(model: DGSSModel, images: Tensor) -> dict[str, Tensor]:
    encoded = model.encoder(images)
    assert encoded.visual is not None
    levels = model.pyramid(encoded.taps)
    raw = model.text()
    text = model.enhancer(raw.expand(len(images), -1, -1), encoded.visual)
    output = model.decoder(levels, text)
    return {
        "text_raw": raw,
        "text": text,
        "visual": encoded.visual,
        "alignment": score_map(encoded.visual[:, 1:], text, encoded.grid),
        "scores": model.segment(images),
        **{f"level{i}": level for i, level in enumerate(levels)},
        **{f"mask{i}": m for i, m in enumerate(output.masks)},
        **{f"class{i}": c for i, c in enumerate(output.classes)},
    }


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


DECAY = {
    "eva": ("paper", ("level_embed", "query_embed", "norm")),
    "clip": ("paper-clip", ("norm",)),
    "siglip": ("paper", ("level_embed", "query_embed", "norm")),
}
"""The shipped recipe, and the released configuration's keys with decay_mult 0 (mmcv's custom_keys,
looked for in the released names)."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_parameters_are_exempt_from_decay(reference: ModuleType, kind: str) -> None:
    recipe_name, keys = DECAY[kind]
    model, state = build(reference, kind), reference.state(kind)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sources = translate(state, shapes, recognize(state)).sources
    exempt = {
        parameter: group["weight_decay"] == 0.0
        for group in parameter_groups(model, load_registry().recipe(recipe_name))
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            released = {any(key in source for key in keys) for source in sources[name]}
            assert released == {exempt[parameter]}, (name, sources[name])
    assert not exempt[model.decoder.pixel_decoder.level_encoding.weight]  # type: ignore[union-attr,index]


@pytest.mark.parametrize("beyond", [0, 5], ids=["patches fit", "pixels left over"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(reference: ModuleType, kind: str, beyond: int) -> None:
    size = reference.SIZES[kind]["image"] + beyond
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        released = reference.Released(kind, reference.state(kind), size)
        wanted = released.run(images, reference.class_ids(kind))
        got = computed(build(reference, kind, image_size=size), images.float())
    assert got.keys() == wanted.keys()
    # float32 against float64; measured up to 4e-6.
    assert {name: e for name in wanted if (e := error(got[name], wanted[name])) > 1e-4} == {}
    assert torch.equal(got["scores"].argmax(1), wanted["scores"].argmax(1))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("clip", {"vlm": {"class_embeddings": 1}}),
        ("clip", {"vlm": {"model": "ViT-L-14-336"}}),  # GELU in place of QuickGELU
        ("clip", {"merge": {"vfm_norm": True, "project": True}}),
        ("siglip", {"vlm": {"tanh_gelu": False}}),
        ("eva", {"merge": {"vfm_norm": False}}),
    ],
)
def test_every_released_option_shows(
    reference: ModuleType, kind: str, changes: dict[str, Any]
) -> None:
    size = reference.SIZES[kind]["image"]
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        as_released = computed(build(reference, kind), images)
        other = computed(build(reference, kind, **changes), images)
    # Ten times what rounding does above.
    assert error(other["visual"], as_released["visual"]) > 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_the_reference(
    reference: ModuleType, kind: str, dtype: torch.dtype
) -> None:
    size = reference.SIZES[kind]["image"]
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, size // 8, size // 8)).repeat_interleave(8, 1)
    labels = labels.repeat_interleave(8, 2)
    labels[0, :9] = 255
    present = sum(len(set(image.flatten().tolist()) - {255}) for image in labels)
    points = [torch.rand(present, 50, 2, dtype=dtype) for _ in range(4)]
    scale, bias = (2.0, -3.0) if kind == "siglip" else (None, None)
    model = build(
        reference, kind, alignment={"weight": 0.5, "logit_scale": scale, "logit_bias": bias}
    ).to(dtype)

    output = model(images.to(dtype))
    losses = model.losses(output, labels)
    losses |= model.decoder.loss(output.decoder, labels, points)  # type: ignore[call-arg]
    sum(losses.values()).backward()  # type: ignore[union-attr]

    state = reference.state(kind)
    released = reference.Released(kind, state)
    form = recognize(state)
    names = translate(state, {n: t.shape for n, t in model.state_dict().items()}, form).sources
    trained = {n: names[n][0] for n, p in model.named_parameters() if p.requires_grad}
    for name in trained.values():
        released.p[name].requires_grad_()
    results = released.run(images, reference.class_ids(kind))
    wanted = released.head.loss(released.output, labels, [p.double() for p in points])
    factor = 1 / 0.07 if scale is None else torch.tensor(scale).double().exp()
    logits = F.interpolate(results["alignment"] * factor, (size, size), mode="bilinear")
    summed = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    wanted["loss_align"] = 0.5 * summed / labels.numel()
    sum(wanted.values()).backward()

    assert losses.keys() == wanted.keys()
    for name, loss in losses.items():
        # Measured: 2e-7 and 6e-10.
        assert error(loss, wanted[name]) < (1e-5 if dtype == torch.float32 else 1e-8), name

    # Measured in float64: 3e-14, 3e-6 with EVA's rotations, whose angles timm rounds to float32.
    relative, floor = (1e-4, 1e-7) if dtype == torch.float32 else (1e-5, 1e-12)
    wrong = {}
    largest = max(float(released.p[n].grad.abs().max()) for n in trained.values())
    for ours, theirs in trained.items():
        got, want = model.get_parameter(ours).grad, released.p[theirs].grad
        assert got is not None, ours
        # A bias in front of a norm with one channel per group has no gradient, but for rounding.
        limit = max(relative * float(want.abs().max()), floor * largest)
        if float((got.double() - want.reshape(got.shape)).abs().max()) > limit:
            wrong[theirs] = error(got, want.reshape(got.shape))
    assert wrong == {}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_sliding_windows_equal_the_reference(reference: ModuleType) -> None:
    size = reference.SIZES["clip"]["image"]
    images = torch.rand(1, 3, size + 17, size + 50)
    model = build(reference, "clip")
    released = reference.Released("clip", reference.state("clip"))
    total = torch.zeros(1, 5, *images.shape[-2:], dtype=torch.float64)
    count = torch.zeros(images.shape[-2:], dtype=torch.float64)
    with torch.no_grad():
        for y in (0, 17):
            for x in (0, 43, 50):  # stride 43 = two thirds of 64
                window = images[..., y : y + size, x : x + size].double()
                part = released.run(window, reference.class_ids("clip"))["scores"]
                total[..., y : y + size, x : x + size] += part
                count[y : y + size, x : x + size] += 1
    got = model.segment(images)
    assert error(got, total / count) < 1e-4
    assert torch.equal(got.argmax(1), (total / count).argmax(1))
    both = model.segment(images, window_batch=4)
    assert error(both, got) < 1e-6  # products of another batch size round otherwise


def test_class_texts_without_ids_are_asked_for_when_needed(reference: ModuleType) -> None:
    table = reference.spec("eva")
    table["prompt"] = {"context": 8, "slots": 5}
    model = load_released(reference.state("eva"), PairingSpec.model_validate(table))
    with pytest.raises(Exception, match=r"no prompt.ids, and .* knows 64 tokens"):
        model.text()
    model.ids = reference.class_ids("eva")
    with torch.no_grad():
        assert torch.equal(model.text(), build(reference, "eva").text())


def test_equals_the_released_tiny_model() -> None:
    file = golden("fullmodel_tiny")
    towers = {"embed_dim": 64, "depth": 4, "num_heads": 4}
    text = {"width": 48, "heads": 4, "layers": 2, "vocab_size": 512}
    spec = PairingSpec.model_validate(
        {
            "vfm": {
                "name": "timm",
                "model": "vit_large_patch14_dinov2",
                "weights": "random",
                "options": towers,
            },
            "vlm": {
                "name": "open_clip",
                "model": "EVA02-L-14-336",
                "weights": "random",
                "context_length": 13,
                "options": {
                    "embed_dim": 48,
                    "vision_cfg": {"timm_model_kwargs": {**towers, "mlp_ratio": 2.6667}},
                    "text_cfg": text,
                },
            },
            "fusion": {"name": "mvfuser"},
            "enhancer": {"name": "mtenhancer", "width": 32},
            "decoder": {
                "name": "text_mask2former",
                "width": 32,
                "pixel_layers": 2,
                "pixel_ffn": 48,
                "layers": 3,
                "ffn": 64,
            },
            "image_size": 112,
            "prompt": {"context": 8, "slots": 5, "ids": file["texts"].tolist()},
        }
    )
    model = load_released(below(file, "param."), spec)
    # The released data pipeline normalizes by CLIP's statistics; each encoder here by its own.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        got = computed(model, file["A.img"] * std + mean)
    got["feat0_b0"] = got["level0"][:1]
    got |= {f"feat{i}": got[f"level{i}"] for i in (1, 2, 3)}
    got["global_feat"] = got["visual"][:, :1]
    got["visual_emb"] = got["visual"][:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    got |= {"text_emb": got["text"], "score_map": got["alignment"], "seg_logit": got["scores"]}
    got |= {f"cls{i}": got[f"class{i}"] for i in range(4)}
    wanted = {k: v for k, v in below(file, "A.").items() if k != "img"}
    # The file holds every n-th row and column of the large maps.
    sampled = {"feat0_b0": 4, "feat1": 2, "seg_logit": 4} | {f"mask{i}": 2 for i in range(4)}
    got |= {name: got[name][..., ::step, ::step] for name, step in sampled.items()}
    assert {k: got[k].shape for k in wanted} == {k: v.shape for k, v in wanted.items()}
    assert {k: e for k, v in wanted.items() if (e := error(got[k], v)) > 1e-4} == {}
    assert torch.equal(got["seg_logit"].argmax(1), wanted["seg_logit"].argmax(1))


def test_windows_of_any_count_are_averaged() -> None:
    images = torch.rand(1, 3, 20, 30)
    got = sliding_window(lambda x: x, images, (16, 16), (5, 5))
    assert torch.allclose(got, images)
