"""torch.compile, block by block, and the way on where it does not work.

Equal blocks share their compiled code, so a tower of 24 blocks costs the compilation of one. The
modules are compiled in place: names of weights, hooks and checkpoints stay what they are.

`_compiled_call_impl`, which `Module.compile` sets, and `_call_impl`, which it stands for, are
private to torch: there is no public way back to a module that is not compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from mfuser.config.compilation import Compilation, CompileSpec
from mfuser.config.tables import parse_settings
from mfuser.engine.inference import split
from mfuser.errors import MFuserError, brief, problem
from mfuser.interfaces import JoiningDecoder
from mfuser.model.dgss import DGSSModel
from mfuser.plugins.contracts import named

KEY = "compile"
BACKEND = "inductor"
RECOMPILED = 64
"""Forms of code at most, where PyTorch's limit is 8. They count together for all modules: each has
one for training and one for evaluation, and one for every size of image."""
REASON = 200
"""Characters of a compiler's complaint, which may be the whole code, that are said."""
COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
"""Where exceptions of the compiler are from."""


def compile_parts(
    model: DGSSModel,
    spec: CompileSpec,
    say: Callable[[str], None],
    *,
    training: bool = False,
) -> None:
    """Have the parts compiled when they first run, in place.

    say: is told, once, that something cannot be compiled; from there on nothing is.
    training: CUDA graphs are left out, which are for inference.
    """
    mode = "default" if training and spec.mode == "reduce-overhead" else spec.mode
    modules = compilable(model, spec.parts)
    _allow()
    for module in modules:
        module.compile(dynamic=False, mode=mode, backend=BACKEND)
        # Private, here and below: torch has no public way to put compiled code aside, or round it.
        compiled = module._compiled_call_impl
        assert compiled is not None
        module._compiled_call_impl = partial(_run, module, compiled, modules, say)
    if mode == "reduce-overhead" and torch.cuda.is_available():
        # What a block returned would otherwise be overwritten by the next equal one.
        model.register_forward_pre_hook(_new_images)


def asked(wanted: bool, settings: Sequence[str]) -> tuple[CompileSpec | None, list[str]]:
    """The parts that a command compiles, and its other --set options. wanted: --compile; an option
    such as "compile.mode=reduce-overhead" asks for it, too. Raises MFuserError for unknown ones."""
    own, others = split(settings, KEY)
    if not wanted and not own:
        return None, others
    given = parse_settings(own).get(KEY, {})
    try:
        return TypeAdapter(Compilation).validate_python(given), others
    except ValidationError as error:
        path, text = problem(error, given)
        raise MFuserError(f"--set {'.'.join([KEY, *path])}{text}") from error


def compilable(model: DGSSModel, parts: Sequence[str]) -> list[nn.Module]:
    """The modules of "encoders" (their blocks), "adapters" (of fusion, and the enhancer), and
    "decoder", where it does not step the encoder itself."""
    found: list[nn.Module] = []
    if "encoders" in parts:
        for backbone in model.encoder.backbones.values():
            with contextlib.suppress(MFuserError):  # one that does not say what its blocks are
                found += backbone.block_modules()
    if "adapters" in parts:
        found += [*model.encoder.adapters.values(), model.enhancer]
    if "decoder" in parts and not isinstance(model.decoder, JoiningDecoder):
        found.append(model.decoder)
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The model as it is written, for those who look into its parts while it runs."""
    kept = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in kept:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, compiled in kept.items():
            module._compiled_call_impl = compiled


def _run(
    module: nn.Module,
    compiled: Callable[..., Any],
    modules: Sequence[nn.Module],
    say: Callable[[str], None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The module's compiled forward; where that fails, it as it is written, and the others too."""
    try:
        return compiled(*args, **kwargs)
    except Exception as error:
        if not any(kind.__module__.startswith(COMPILERS) for kind in type(error).__mro__):
            raise
        cause = getattr(error, "inner_exception", error)  # that of a compiler's backend
        reason = shorten(f"{type(cause).__name__}: {brief(cause)}", REASON)
    for other in modules:
        other._compiled_call_impl = None
    say(f"{named(module)} cannot be compiled here ({reason}); going on without compilation")
    return module._call_impl(*args, **kwargs)


def _allow() -> None:
    """Settings of the compiler that its defaults are too narrow for."""
    import torch._dynamo
    import torch._functorch.config as functorch

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILED)
    if hasattr(functorch, "force_non_lazy_backward_lowering"):
        # The backward pass fails to compile while there is still a way to do without.
        functorch.force_non_lazy_backward_lowering = True


def _new_images(*_: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()
