"""Checks of backbones alone, of decoders alone, and of losses alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfuser.errors import MFuserError
from mfuser.testing.bench import BackboneBench, Bench, DecoderBench
from mfuser.testing.compare import widest_gap
from mfuser.testing.modules import CLOSE, first, module_of
from mfuser.testing.stand_ins import LossBench
from mfuser.testing.verdict import Broken, NotTried


def frozen(bench: Bench) -> str:
    """A frozen backbone: trained tensors, statistics, sizes"""
    assert isinstance(bench, BackboneBench)
    case = first(bench)
    module = module_of(bench, case)
    if not bench.spec.freeze:
        raise NotTried("freeze = false in its tiny options")
    trains = [
        n
        for n, p in module.named_parameters()
        if p.requires_grad and not n.startswith(module.always_trains)
    ]
    if trains:
        raise Broken(
            "freeze = true",
            f"{len(trains)} tensors train, e.g. '{trains[0]}'",
            "none",
            "call module.requires_grad_(False) in build() if self.freeze; what is new and "
            'always trains is named by the class: always_trains = ("projection",)',
        )
    for name in ("mean", "std"):
        value = getattr(module, name)
        if tuple(value.shape) != (1, 3, 1, 1):
            raise Broken(
                f"the buffer '{name}'",
                f"shape {tuple(value.shape)}",
                "(1, 3, 1, 1)",
                "call self.set_statistics(mean, std) with three numbers each",
            )
    if tuple(module.image_size) != tuple(case):
        raise Broken(
            f"build(image_size={case})",
            f"image_size is {tuple(module.image_size)}",
            f"{case}",
            "set self.image_size in resize()",
        )
    return "nothing in it trains with freeze = true"


def resizing(bench: Bench) -> str:
    """Images of a wrong size; another size and back"""
    assert isinstance(bench, BackboneBench)
    case, *others = bench.cases()
    module = module_of(bench, case)
    wrong = torch.rand(1, 3, case[0] * 2, case[1])
    try:
        with torch.no_grad():
            module.embed(wrong)
    except MFuserError:
        pass
    else:
        raise Broken(
            f"embed() of images of {tuple(wrong.shape)} where {case} is set",
            "they were taken",
            "MFuserError that gives both sizes",
            "compare images.shape[-2:] with self.image_size at the top of embed()",
        )
    inputs = bench.feed(case)
    with torch.no_grad():
        before = bench.call(module, inputs)
        done = []
        for other in others:
            try:
                module.resize(other)
            except MFuserError:
                continue  # refused with a reason
            fresh = bench.build(other)
            if tuple(module.grid) != tuple(fresh.grid):
                raise Broken(
                    f"resize({other})",
                    f"grid {module.grid}",
                    f"{fresh.grid}, as built for it",
                    "set self.grid and self.image_size in resize()",
                )
            bench.call(module, bench.feed(other))
            done.append(other)
        module.resize(case)
        gap = widest_gap(before, bench.call(module, inputs), CLOSE)
    if gap:
        raise Broken(
            f"resize() to {done} and back to {case}",
            f"{gap[0]} differs by {gap[1]:.2g} (relative)",
            "the same as before: positions are resampled from the original table",
            "keep the table as loaded, and resample from it on every resize()",
        )
    return f"a wrong size is refused; {', '.join(f'{h}x{w}' for h, w in done)} and back agree"


def further_tokens(bench: Bench) -> str:
    """Further tokens among its own, in every block: what they see, and what sees them"""
    assert isinstance(bench, BackboneBench)
    case = first(bench)
    module = module_of(bench, case)
    if (reason := module.no_extra()) is not None:
        raise NotTried(reason)
    images = bench.feed(case, 2)["images"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        stream = module.embed(module.normalize(images))
        extra = torch.randn(2, 3, module.embed_dim)
    patches = module.grid[0] * module.grid[1]
    visible = torch.ones(2, 3, patches, dtype=torch.bool)
    visible[:, 0, patches // 2] = False
    tokens = stream.tokens
    for i in range(module.depth):
        with torch.no_grad():
            alone = module.block(i, tokens, stream.state)
            none = module.block_with(i, tokens, stream.state, extra[:, :0], None)
            whole = module.block_with(i, tokens, stream.state, extra, None)
            told = module.block_with(i, tokens, stream.state, extra, torch.ones_like(visible))
        _agree(f"block {i} with no further token", {"tokens": none[0]}, {"tokens": alone})
        for name, a, b in zip(("its own tokens", "further tokens"), whole, told, strict=True):
            _agree(f"block {i}, visible = None and all of visible True", {name: a}, {name: b})
        if whole[0].shape == alone.shape and torch.equal(whole[0], alone):
            raise Broken(
                f"block {i} with three further tokens",
                "its own tokens are what they are without",
                "tokens that attend to the further ones",
                "put them into one sequence before attention",
            )
        given = tokens.detach().requires_grad_()
        _, read = module.block_with(i, given, stream.state, extra, visible)
        for q, hidden in ((0, True), (1, False)):
            (grad,) = torch.autograd.grad(read[:, q].sum(), given, retain_graph=True)
            seen = bool(grad[:, module.num_prefix_tokens + patches // 2].any())
            if seen is hidden:
                raise Broken(
                    f"block {i}, a patch that `visible` {'hides from' if hidden else 'shows to'} "
                    "a further token",
                    "it reads it" if hidden else "it does not read it",
                    "attention as `visible` says (True: it sees the patch)",
                    "look at which way round the library's mask is meant",
                )
        tokens, extra = whole
    return f"in {module.depth} blocks they see what they are shown, and all tokens see them"


def _agree(tried: str, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if gap := widest_gap(expected, got, CLOSE):
        raise Broken(tried, f"{gap[0]} differs by {gap[1]:.2g} (relative)", "the same", "")


def losses(bench: Bench) -> str:
    """Losses of labels with every class, one class, and none"""
    assert isinstance(bench, DecoderBench | LossBench)
    for case in bench.cases():
        module = module_of(bench, case).train()
        for what, value in (("every class", None), ("one class", 0), ("nothing but ignored", 255)):
            inputs = bench.feed(case)
            if value is not None:
                inputs["labels"] = torch.full_like(inputs["labels"], value)
            found = bench.losses(module, inputs)
            tried = f"{bench.describe(case)}; labels of {what}"
            for name, loss in found.items():
                if loss.dim() or not loss.isfinite():
                    raise Broken(
                        tried,
                        f"'{name}' is {loss.tolist()}"
                        if loss.numel() < 5
                        else f"'{name}' has shape {tuple(loss.shape)}",
                        "a finite scalar",
                        "divide by the number of valid pixels, clamped to at least 1",
                    )
            again = bench.losses(module, inputs)
            if value is None and not isinstance(module, nn.Identity):
                stochastic = any(isinstance(m, nn.Dropout) and m.p for m in module.modules())
                gap = widest_gap(found, again, CLOSE)
                if gap and not stochastic:
                    raise Broken(
                        f"{tried}, twice from one seed",
                        f"'{gap[0]}' differs",
                        "the same",
                        "draw points with torch's generator",
                    )
    return "finite for labels of every class, of one, and of ignored pixels alone"


def reaches(bench: Bench) -> str:
    """Gradients from the losses to what they are given"""
    assert isinstance(bench, LossBench)
    case = first(bench)
    inputs = bench.feed(case)
    leaves = {
        name: value.requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name != "frozen"
    }
    for level, value in enumerate(inputs["pyramid"]):
        leaves[f"level {level} of the pyramid"] = value.requires_grad_()
    for name, value in inputs.get("second", {}).items():
        leaves[f"{name} of the view"] = value.requires_grad_()
    total = torch.stack(list(bench.call(module_of(bench, case).train(), inputs).values())).sum()
    if total.requires_grad:
        total.backward()
    found = {n: v.grad for n, v in leaves.items() if v.grad is not None and v.grad.any()}
    if not found:
        raise Broken(
            "backward() from the losses",
            "no gradient in anything they are given",
            "a gradient in what the model makes: without it nothing is learned",
            "look for detach(), argmax and comparisons on the way, and for what `needs` leaves out",
        )
    for name, gradient in found.items():
        if not gradient.isfinite().all():
            raise Broken(
                "backward() from the losses",
                f"the gradient of {name} is not finite",
                "finite numbers",
                "look for sqrt(0), norms of zero and logarithms",
            )
    return f"finite gradients in {', '.join(found)}"
