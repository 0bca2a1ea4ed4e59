from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mfuser import MFuserError, build_model, components
from mfuser.engine import checkpoints
from mfuser.model.assembly import sketch
from mfuser_plugins.tuning.rein import Rein, ReinSpec

DECODER = {"name": "mask2former", "queries": 20, "width": 32, "pixel_layers": 1, "pixel_ffn": 32,
           "layers": 2, "ffn": 32, "num_points": 64}  # fmt: skip
REIN = {"name": "rein", "tokens": 20, "rank": 2}


def refiner(depth: int = 3, width: int = 8, **options: Any) -> Rein:
    module = Rein(ReinSpec(**{"tokens": 5, "rank": 2, **options}), depth, width)
    with torch.no_grad():
        module.scale.fill_(0.7)
    return module


def test_refinement_is_that_of_the_paper() -> None:
    module, f = refiner(), torch.randn(2, 6, 8)
    for i in range(3):
        tokens = module.tokens.A[i] @ module.tokens.B[i]
        similarity = (f @ tokens.T / 8**0.5).softmax(-1)[..., 1:]
        found = similarity @ module.map_tokens(tokens[1:])
        expected = f + 0.7 * module.map_patches(f + found)
        torch.testing.assert_close(module(i, f, (2, 3)), expected)


def test_queries_are_those_of_the_paper() -> None:
    module = refiner()
    assert module.link(5, 4) and module.each is not None and module.join is not None
    each = torch.stack([module.each(module.tokens.A[i] @ module.tokens.B[i]) for i in range(3)])
    expected = module.join(torch.cat([each.max(0).values, each.mean(0), each[2]], -1))
    torch.testing.assert_close(module.queries(), expected)
    assert not refiner(link=False).link(7, 4)


def test_published_size() -> None:
    """3 M for DINOv2-L, by the paper; to the last one as its configuration counts."""
    with torch.device("meta"):
        module = Rein(ReinSpec(), 24, 1024)
        module.link(100, 256)
    assert sum(p.numel() for p in module.parameters()) == 2_990_081


def test_prefix_tokens_stay_and_patches_change() -> None:
    spec = components("vision")["timm"](
        model="vit_tiny_patch16_224", weights="random",
        options={"embed_dim": 32, "depth": 2, "num_heads": 2},
    )  # fmt: skip
    tower = spec.build((64, 96))  # type: ignore[attr-defined]
    ReinSpec(tokens=5, rank=2).build(tower)
    stream = tower.embed(torch.rand(1, 3, 64, 96))
    plain = tower.block(0, stream.tokens, stream.state)
    refined = tower.step(0, stream.tokens, stream.state)
    assert torch.equal(refined[:, :1], plain[:, :1])
    assert torch.equal(refined[:, 1:], tower.refiner(0, plain[:, 1:], tower.grid))
    assert not torch.equal(refined[:, 1:], plain[:, 1:])


def step(model: Any) -> tuple[float, set[str]]:
    """The loss of one step, and which parameters it changed."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    torch.manual_seed(0)
    losses = model(torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96)))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    optimizer.step()
    return float(total.detach()), {n for n, p in model.named_parameters() if (p != before[n]).any()}


def test_tokens_make_the_decoders_queries(tiny: Any, tmp_path: Any) -> None:
    model = build_model("lone", tiny, tuning=REIN, decoder=DECODER)
    assert not {"query_feat", "query_embed"} & {  # maps of what is given, no embeddings
        n.split(".")[0]
        for n, m in model.decoder.named_modules()
        if isinstance(m, torch.nn.Embedding)
    }
    loss, changed = step(model)
    assert loss > 0
    names = {n.removeprefix("encoder.vfm.refiner.") for n in changed if ".refiner." in n}
    assert {
        "tokens.A",
        "tokens.B",
        "map_tokens.weight",
        "scale",
        "each.weight",
        "join.bias",
    } <= names
    path = tmp_path / "model.safetensors"
    state = checkpoints.trained_state(model)
    checkpoints.write(
        path, checkpoints.Checkpoint(state, {}, {"step": 1, "run": {}, "pairing": {}})
    )
    fresh = build_model("lone", tiny, tuning=REIN, decoder=DECODER)
    checkpoints.restore(fresh, checkpoints.read(path), path)
    images = torch.rand(1, 3, 64, 96)
    assert torch.equal(fresh.segment(images), model.segment(images))
    spec = tiny.pairing("lone", {"tuning": REIN, "decoder": DECODER})
    shapes = {n: p.shape for n, p in model.state_dict().items()}
    assert {n: p.shape for n, p in sketch(spec).state_dict().items()} == shapes


def test_the_first_encoder_is_linked_and_the_others_only_refined(tiny: Any) -> None:
    model = build_model("plain", tiny, tuning=REIN, decoder=DECODER)
    step(model)
    joins = [n for n, _ in model.named_parameters() if "refiner.join" in n]
    assert joins == ["encoder.vfm.refiner.join.weight", "encoder.vfm.refiner.join.bias"]


def test_without_a_link(tiny: Any) -> None:
    for options in ({"decoder": DECODER, "tuning": {**REIN, "link": False}}, {"tuning": REIN}):
        model = build_model("lone", tiny, **options)
        step(model)
        assert model.encoder.queries() is None
        assert not [n for n, _ in model.named_parameters() if "refiner.join" in n]


def test_other_numbers_of_tokens_and_queries_are_refused(tiny: Any) -> None:
    with pytest.raises(MFuserError, match="100 tokens, and the decoder 20 queries.*link = false"):
        build_model("lone", tiny, tuning="rein", decoder=DECODER)


def test_patches_are_refined_where_queries_join_the_last_blocks(tiny: Any) -> None:
    table = {"name": "eomt", **components("decoder")["eomt"].tiny}
    model = build_model("lone", tiny, tuning=REIN, decoder=table)
    seen: list[int] = []
    model.encoder.backbones["vfm"].refiner.register_forward_hook(
        lambda module, given, result: seen.append(given[0])
    )
    step(model)
    assert seen == [0, 1, 2]


def test_checkpointed_blocks_give_the_same(tiny: Any) -> None:
    one, other = (build_model("lone", tiny, tuning=REIN, decoder=DECODER) for _ in range(2))
    other.encoder.checkpointing = True
    gradients: list[dict[str, Tensor]] = []
    for model in (one, other):
        step(model)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
