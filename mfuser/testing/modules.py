"""Checks of a component's module, built alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from mfuser.errors import MFuserError
from mfuser.interfaces import VisionBackbone, VisionLanguageBackbone
from mfuser.testing.bench import BackboneBench, Bench, DecoderBench, moved
from mfuser.testing.compare import one_of, require_finite, require_gradients, same, widest_gap
from mfuser.testing.partners import tiny
from mfuser.testing.verdict import Broken, NotTried

CLOSE = 1e-4
"""Relative to the largest value: float32 sums in another order differ by about 1e-6."""


def module_of(bench: Bench, case: Any, seed: int = 0) -> Any:
    """A module in evaluation mode. Raises NotTried where build() returns None."""
    module = bench.build(case, seed)
    if module is None:
        raise NotTried("build() returns None, so there is no module")
    return module.eval()


def first(bench: Bench) -> Any:
    return next(iter(bench.cases()))


def odd_shapes(bench: Bench) -> str:
    """Outputs at unequal widths, odd grids and batches of 1 and 3"""
    tried: list[str] = []
    for case in bench.cases():
        what = bench.describe(case)
        try:
            module = module_of(bench, case)
        except MFuserError as error:
            if error.__cause__ is None and tried:
                continue  # refused with a reason
            raise
        for batch in (1, 3):
            inputs = bench.feed(case, batch)
            before = copy.deepcopy(inputs)
            with torch.no_grad():
                outputs = bench.call(module, inputs)
            expected = bench.expected(case, inputs)
            for name, shape in expected.items():
                value = outputs.get(name)
                if value is None or tuple(value.shape) != shape:
                    got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                    raise Broken(
                        f"{what}, batch {batch}",
                        f"{name}: {got}",
                        f"{name} of shape {shape}",
                        "derive every size from what build() and forward() are given",
                    )
            require_finite(
                {name: outputs[name] for name in expected},
                f"{what}, batch {batch}",
                "look for divisions by zero, logarithms and uninitialized tensors",
            )
            if not same(before, inputs):
                raise Broken(
                    f"{what}, batch {batch}",
                    "the inputs have changed",
                    "inputs as they were: other parts read them too",
                    "replace in-place operations (add_, relu_, x += y) on what is given",
                )
        tried.append(what)
    return "; ".join(tried)


def deterministic(bench: Bench) -> str:
    """Two modules from one seed, and two calls of one module"""
    case = first(bench)
    one, two = module_of(bench, case), module_of(bench, case)
    inputs = bench.feed(case)
    with torch.no_grad():
        a, again, b = (bench.call(m, inputs) for m in (one, one, two))
    if gap := widest_gap(a, again):
        raise Broken(
            "the same input twice, in evaluation mode",
            f"{gap[0]} differs by {gap[1]:.2g}",
            "the same output",
            "draw random numbers only while self.training",
        )
    if gap := widest_gap(a, b):
        raise Broken(
            "two modules built from one seed",
            f"{gap[0]} differs by {gap[1]:.2g}",
            "the same module: --seed decides it",
            "initialize with torch's generator, not numpy's, Python's or the clock",
        )
    return "two builds from one seed and two calls agree exactly"


def modes(bench: Bench) -> str:
    """Evaluation and training mode; a sample alone and among others"""
    case = first(bench)
    module = module_of(bench, case)
    inputs = bench.feed(case, 3)
    with torch.no_grad():
        together = bench.call(module, inputs)
        alone = bench.call(module, one_of(inputs, 0))
    for name, value in alone.items():
        whole = together[name]
        if whole.shape[0] == value.shape[0]:
            continue  # no batch axis: class texts
        if gap := widest_gap({name: whole[:1]}, {name: value}, CLOSE):
            raise Broken(
                "one sample alone and the same among three, in evaluation mode",
                f"{name} differs by {gap[1]:.2g} (relative)",
                "the same: an image's prediction does not depend on its neighbors",
                "use LayerNorm, or BatchNorm's running statistics; never mix over the batch axis",
            )
    module.train()
    if isinstance(module, VisionBackbone):
        wrong = [n for n, m in module.named_modules() if m.training]
        if wrong:
            raise Broken(
                "train() on the backbone",
                f"{len(wrong)} submodules are in training mode, e.g. '{wrong[0]}'",
                "evaluation mode always: no drop path, no patch dropout",
                "do not override train(), and do not call it on submodules",
            )
    else:
        wrong = [n for n, m in module.named_modules() if not m.training]
        if wrong:
            raise Broken(
                "train()",
                f"'{wrong[0]}' stays in evaluation mode",
                "every submodule follows",
                "call super().train(mode) in your train()",
            )
    require_finite(bench.call(module, inputs), "a call in training mode", "see dropout")
    module.eval()
    if any(m.training for m in module.modules()):
        raise Broken("eval() after train()", "it stays in training mode", "evaluation mode", "")
    return "a sample alone equals the same among three; train() and eval() are followed"


def state_dict(bench: Bench) -> str:
    """The state of one module in another"""
    case = first(bench)
    one, two = module_of(bench, case, 0), module_of(bench, case, 5)
    state = {k: v.clone() for k, v in one.state_dict().items()}
    result = two.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    inputs = bench.feed(case)
    with torch.no_grad():
        gap = widest_gap(bench.call(one, inputs), bench.call(two, inputs))
    if gap:
        raise Broken(
            "state_dict() of a module built from seed 0, loaded into one from seed 5",
            f"{gap[0]} still differs by {gap[1]:.2g}",
            "the same output: a checkpoint holds everything that matters",
            "make it an nn.Parameter or a persistent buffer, inside nn.ModuleList or nn.ModuleDict",
        )
    return f"{len(state)} tensors carry everything that is random"


def dtypes(bench: Bench) -> str:
    """float64, and bfloat16 by autocast"""
    case = first(bench)
    module = module_of(bench, case)
    inputs = bench.feed(case)
    with torch.no_grad():
        single = bench.call(module, inputs)
        double = bench.call(copy.deepcopy(module).double(), moved(inputs, torch.float64))
        for name, value in double.items():
            if value.dtype != torch.float64:
                raise Broken(
                    "module.double() with float64 inputs",
                    f"{name} is {value.dtype}",
                    "float64",
                    "create tensors in the input's dtype: torch.zeros(…, dtype=tokens.dtype)",
                )
        # Sums in float32 through a whole backbone: 1e-5 relative was the largest seen.
        if gap := widest_gap({k: v.double() for k, v in single.items()}, double, 1e-3):
            raise Broken(
                "the same in float32 and float64",
                f"{gap[0]} differs by {gap[1]:.2g} (relative)",
                "at most 1e-3",
                "look for values computed in lower precision, or cast to a fixed dtype",
            )
        with torch.autocast("cpu", torch.bfloat16):
            require_finite(
                bench.call(module, inputs),
                "bfloat16 by autocast",
                "use -inf masks and epsilons that bfloat16 can hold",
            )
    return "float64 agrees with float32, bfloat16 by autocast is finite"


def devices(bench: Bench) -> str:
    """Another device: the meta device, and a GPU where there is one"""
    case = first(bench)
    module = module_of(bench, case)
    inputs = bench.feed(case)
    tried = []
    for name in ["meta"] + ["cuda"] * torch.cuda.is_available():
        device = torch.device(name)
        there = copy.deepcopy(module).to(device)
        try:
            with torch.no_grad():
                outputs = bench.call(there, moved(inputs, device))
        except NotImplementedError:
            continue  # an operation whose size depends on values cannot be laid out
        except RuntimeError as error:
            if "data-dependent" in str(error) or ".item()" in str(error):
                continue
            raise Broken(
                f"module.to('{name}') with inputs there",
                " ".join(str(error).split())[:300],
                f"outputs on {name}",
                "register constants with register_buffer, and create tensors on the input's "
                "device: torch.arange(n, device=tokens.device)",
            ) from error
        for key, value in outputs.items():
            if value.device.type != name:
                raise Broken(
                    f"module.to('{name}') with inputs there",
                    f"{key} is on {value.device}",
                    f"on {name}",
                    "create tensors on the input's device: torch.zeros(…, device=tokens.device)",
                )
        tried.append(name)
    if not tried:
        raise NotTried("its operations depend on values, and there is no GPU here")
    return f"moved to {' and '.join(tried)}"


def gradients(bench: Bench) -> str:
    """The gradient of every tensor that trains"""
    case = first(bench)
    if type(bench) is BackboneBench:
        from mfuser.testing.partners import everything

        trained = tiny(type(bench.spec), everything(), **_given(bench), freeze=False)
        bench = type(bench)(trained)
    module = module_of(bench, case)
    if not isinstance(bench, BackboneBench):
        module.train()
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    if not names:
        raise NotTried("nothing in it trains")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for p in module.parameters():
            # A scale that starts at zero would stop the gradient of everything before it.
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    inputs = bench.feed(case)
    if isinstance(bench, DecoderBench):
        total: Any = sum(bench.losses(module, inputs).values())
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            outputs = bench.call(module, inputs)
            total = sum((v * torch.randn_like(v)).sum() for v in outputs.values())
        if isinstance(module, VisionLanguageBackbone) and module.alignment == "sigmoid":
            total = total + sum(v for v in module.logit_scale_bias() if v is not None)
    if not isinstance(total, Tensor) or not total.requires_grad:
        raise Broken(
            "backward() from the outputs",
            "they carry no gradient",
            f"gradients in {len(names)} tensors",
            "look for no_grad(), detach() and .data on the way",
        )
    total.backward()
    tried = f"backward() from the outputs, {len(names)} tensors that train"
    require_gradients(module, tried, nonzero=True)
    return f"{len(names)} tensors train, a finite gradient reaches each"


def _given(bench: Bench) -> dict[str, Any]:
    spec = bench.spec
    return {n: getattr(spec, n) for n in spec.model_fields_set - {"name", "freeze"}}
