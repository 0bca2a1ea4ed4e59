"""Every fusion x enhancer x decoder x towers x tuning x inference x loss: refused with the reason,
or it works.

All combinations of the first four are validated; of those that hold, as few are run as make every
pair of choices meet in one that is built, trained for a step and asked for a segmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch

from mfuser import InferenceSpec, MFuserError, build_model, components
from mfuser.config.registry import Registry

AXES = ("fusion", "enhancer", "decoder")
TOWERS = {"both": {}, "vfm": {"vlm": "none"}, "vlm": {"vfm": "none"}}
Row = tuple[str, ...]
"""fusion, enhancer, decoder and towers; then tuning, inference and loss."""


def own(kind: str) -> list[str]:
    """The built-in components of a kind."""
    found = components(kind).items()
    return sorted(n for n, spec in found if spec.__module__.startswith("mfuser_plugins."))


def overrides(row: Row) -> dict[str, Any]:
    tables: dict[str, Any] = {
        kind: {"name": name, **components(kind)[name].tiny}
        for kind, name in zip((*AXES, "towers", "tuning"), row, strict=False)
        if kind != "towers" and (kind in AXES or name != "none")
    }
    for name in row[6:]:
        if name != "none":
            tables["losses"] = [{"name": name, **components("loss")[name].tiny}]
    return {**tables, **TOWERS[row[3]]}


def reason(row: Row) -> str | None:
    """Why a combination makes no sense: what the refusal must say."""
    fusion, enhancer, decoder, towers = row
    if towers == "vfm" and decoder.startswith("text_"):
        return f"decoder '{decoder}' takes class queries from text, and there is no 'vlm'"
    if towers == "vfm" and enhancer != "none":
        return f"enhancer '{enhancer}' works on class text embeddings, and there is no 'vlm'"
    if decoder in ("eomt", "text_eomt") and enhancer != "none":
        return f"enhancer '{enhancer}' reads what comes after them"
    if towers != "both" and fusion == "self_attention_separate":
        return "fusion 'self_attention_separate' joins two encoders, and there is only one"
    return None


def loss_reason(row: Row, name: str) -> str | None:
    """The same of a loss."""
    fusion, _, _, towers, tuning, _ = row
    if name in ("language_regularization", "vision_regularization") and towers == "vfm":
        return f"loss '{name}' compares with class texts, and there is no 'vlm'"
    if name == "vision_regularization" and towers == "vlm" and fusion == tuning == "none":
        return f"loss '{name}' holds the vision-language model to what it was, and nothing here"
    return None


def covering(held: list[Row]) -> list[Row]:
    """Few of the combinations, in which every pair that occurs in any occurs."""

    def pairs(row: Row) -> set[Any]:
        return set(combinations(enumerate(row), 2))

    missing = set().union(*map(pairs, held))
    chosen = []
    while missing:
        best = max(held, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def with_one_more(
    rows: list[Row], names: list[str], held: Callable[[Row, str], bool] = lambda *_: True
) -> list[Row]:
    """The rows, each with one value more, and some of them again until every value has met every
    other that it holds with."""
    held_rows = [(row, name) for row in rows for name in names if held(row, name)]
    missing = {(name, *place) for row, name in held_rows for place in enumerate(row)}

    def met(row: Row, name: str) -> set[Any]:
        return {(name, *place) for place in enumerate(row)} & missing

    result: list[Row] = []
    for row in [*rows, *rows, *rows]:
        name = max((n for n in names if held(row, n)), key=lambda n: len(met(row, n)))
        if met(row, name) or len(result) < len(rows):
            missing -= met(row, name)
            result.append((*row, name))
    assert not missing
    return result


ALL: list[Row] = list(product(*map(own, AXES), TOWERS))
RUN = covering([row for row in ALL if reason(row) is None])
RUN = with_one_more(RUN, ["none", *own("tuning")])
RUN = with_one_more(RUN, own("inference"))
RUN = with_one_more(RUN, ["none", *own("loss")], lambda row, name: loss_reason(row, name) is None)


def test_all_parts_are_there() -> None:
    fusion, enhancer, decoder = map(own, AXES)
    tunings = {"lora", "full", "layer_norm_only", "bias", "rein", "fada"}
    assert {*own("tuning")} == tunings
    assert {row[4] for row in RUN} == {"none", *tunings}
    assert {row[5] for row in RUN} == {*own("inference")} and len(own("inference")) == 4
    assert {row[6] for row in RUN} == {"none", *own("loss")} and len(own("loss")) == 5
    assert set(fusion) == {
        *("mvfuser", "separate_mvfuser", "convolution", "cross_attention", "none"),
        *("self_attention_concat", "self_attention_separate", "bi_deformable_attention"),
    }
    assert set(enhancer) == {"mtenhancer", "mamba_only", "cross_attention", "none"}
    assert set(decoder) == {
        *("text_mask2former", "mask2former", "linear", "text_similarity"),
        *("mlp", "text_mlp", "upernet", "text_upernet", "segmenter", "text_segmenter"),
        *("eomt", "text_eomt"),
    }


def test_what_makes_no_sense_is_refused_with_the_reason(tiny: Registry) -> None:
    for row in ALL:
        why = reason(row)
        if why is None:
            tiny.pairing("tiny", overrides(row))
            continue
        with pytest.raises(MFuserError) as refusal:
            tiny.pairing("tiny", overrides(row))
        assert why in str(refusal.value), row


def test_losses_that_make_no_sense_are_refused_with_the_reason(tiny: Registry) -> None:
    for name, towers, fusion in product(own("loss"), TOWERS, ("none", "mvfuser")):
        row = (fusion, "none", "linear", towers, "none", "sliding")
        why = loss_reason(row, name)
        if why is None:
            tiny.pairing("tiny", overrides((*row, name)))
            continue
        with pytest.raises(MFuserError) as refusal:
            tiny.pairing("tiny", overrides((*row, name)))
        assert why in str(refusal.value), row


def test_one_loss_needs_no_list(tiny: Registry) -> None:
    listed = tiny.pairing("tiny", {"losses": [{"name": "ohem", "weight": 0.5}]})
    assert tiny.pairing("tiny", ['losses={name="ohem", weight=0.5}']) == listed
    assert [loss.name for loss in tiny.pairing("tiny", ["losses=ohem"]).losses] == ["ohem"]
    assert not tiny.pairing("tiny", ["losses=none"]).losses
    with pytest.raises(MFuserError, match="losses: .*'ohme'.*did you mean 'ohem'"):
        tiny.pairing("tiny", ["losses=ohme"])
    with pytest.raises(MFuserError, match="losses: takes a list such as .*, not 3"):
        tiny.pairing("tiny", ["losses=3"])


@pytest.mark.parametrize("row", RUN, ids="-".join)
def test_assembles_trains_a_step_and_segments(row: Row, tiny: Registry) -> None:
    model = build_model(tiny.pairing("tiny", overrides(row)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    losses = model(torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96)))
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    # One that is left out makes several processes look for it in every step.
    idle = {
        n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad and p.grad is None
    }
    assert idle == ({"pyramid"} if row[2] == "text_similarity" else set())
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if n in before and (p != before[n]).any()}
    fusion, enhancer, decoder, _, tuning, inference, loss = row
    assert (loss == "none") != any(name.startswith(f"{loss}.") for name in losses)
    for part, prefix in (
        (fusion, "encoder.adapters."),
        (enhancer, "enhancer."),
        (decoder, "decoder."),
        (tuning, "encoder.v"),
    ):
        learns = part not in ("none", "text_similarity")
        assert any(n.startswith(prefix) for n in changed) == learns, prefix
    spec = components("inference")[inference]
    asked = spec.model_validate({"name": inference, **spec.tiny})
    assert isinstance(asked, InferenceSpec)
    scores = model.segment_by(asked.build(), torch.rand(1, 3, 64, 100))
    assert scores.shape == (1, 19, 64, 100) and scores.isfinite().all()
