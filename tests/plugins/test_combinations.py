"""Every fusion x enhancer x decoder x tuning x towers: refused with the reason, or it works.

All combinations are validated, without a tuning, which is never the reason; of those that hold, as
few are run as make every pair of choices meet in one that is built, trained for a step and asked
for a segmentation.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch

from mfuser import MFuserError, build_model, components
from mfuser.config.registry import Registry

AXES = ("fusion", "enhancer", "decoder")
TOWERS = {"both": {}, "vfm": {"vlm": "none"}, "vlm": {"vfm": "none"}}
Choice = tuple[str, str, str, str, str]


def choices() -> list[list[str]]:
    own = "mfuser_plugins."
    return [
        *(
            sorted(n for n, spec in components(kind).items() if spec.__module__.startswith(own))
            for kind in AXES
        ),
        ["none"],
        list(TOWERS),
    ]


def overrides(choice: Choice) -> dict[str, Any]:
    *parts, tuning, towers = choice
    tables: dict[str, Any] = {
        kind: {"name": name, **components(kind)[name].tiny}
        for kind, name in zip(AXES, parts, strict=True)
    }
    if tuning != "none":
        tables["tuning"] = {"name": tuning, **components("tuning")[tuning].tiny}
    return {**tables, **TOWERS[towers]}


def reason(choice: Choice) -> str | None:
    """Why a combination makes no sense: what the refusal must say."""
    fusion, enhancer, decoder, _, towers = choice
    if towers == "vfm" and decoder.startswith("text_"):
        return f"decoder '{decoder}' takes class queries from text, and there is no 'vlm'"
    if towers == "vfm" and enhancer != "none":
        return f"enhancer '{enhancer}' works on class text embeddings, and there is no 'vlm'"
    if decoder in ("eomt", "text_eomt") and enhancer != "none":
        return f"enhancer '{enhancer}' reads what comes after them"
    if towers != "both" and fusion == "self_attention_separate":
        return "fusion 'self_attention_separate' joins two encoders, and there is only one"
    return None


def covering(held: list[Choice]) -> list[Choice]:
    """Few of the combinations, in which every pair that occurs in any occurs."""

    def pairs(choice: Choice) -> set[Any]:
        return set(combinations(enumerate(choice), 2))

    missing = set().union(*map(pairs, held))
    chosen = []
    while missing:
        best = max(held, key=lambda choice: len(pairs(choice) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def tuned(chosen: list[Choice], held: list[Choice]) -> list[Choice]:
    """The same, each with the tuning that has met the fewest of the others' values, and more of
    those that hold until every tuning has met all."""
    names = ["none", *sorted(components("tuning"))]
    values = set().union(*(enumerate(choice) for choice in held))
    missing = {(name, *value) for name in names for value in values}
    result = []
    for base in [*chosen, *held]:
        best = max(names, key=lambda n: len({(n, *v) for v in enumerate(base)} & missing))
        met = {(best, *v) for v in enumerate(base)} & missing
        if met or len(result) < len(chosen):
            result.append((*base[:3], best, base[4]))
            missing -= met
    assert not missing
    return result


ALL: list[Choice] = list(product(*choices()))
HELD = [choice for choice in ALL if reason(choice) is None]
RUN = tuned(covering(HELD), HELD)


def test_all_parts_are_there() -> None:
    fusion, enhancer, decoder, _, _ = choices()
    tunings = {"lora", "full", "layer_norm_only", "bias", "rein", "fada"}
    assert {*components("tuning")} == tunings
    assert {choice[3] for choice in RUN} == {"none", *tunings}
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
    for choice in ALL:
        why = reason(choice)
        if why is None:
            tiny.pairing("tiny", overrides(choice))
            continue
        with pytest.raises(MFuserError) as refusal:
            tiny.pairing("tiny", overrides(choice))
        assert why in str(refusal.value), choice


@pytest.mark.parametrize("choice", RUN, ids="-".join)
def test_assembles_trains_a_step_and_segments(choice: Choice, tiny: Registry) -> None:
    model = build_model(tiny.pairing("tiny", overrides(choice)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    losses = model(torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96)))
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if n in before and (p != before[n]).any()}
    fusion, enhancer, decoder, tuning, _ = choice
    for part, prefix in (
        (fusion, "encoder.adapters."),
        (enhancer, "enhancer."),
        (decoder, "decoder."),
        (tuning, "encoder.v"),
    ):
        learns = part not in ("none", "text_similarity")
        assert any(n.startswith(prefix) for n in changed) == learns, prefix
    scores = model.segment(torch.rand(1, 3, 64, 100))
    assert scores.shape == (1, 19, 64, 100) and scores.isfinite().all()
