"""Looking on while a model runs: every call of a module, and of the methods that parts promise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mfuser.model.dgss import DGSSModel

BACKBONE = ("embed", "block", "block_with", "finish", "project", "encode_text")
DECODER = ("loss", "semantic_logits")


@dataclass(frozen=True)
class Call:
    """name: "decoder.pixel.0" of a module, "encoder.vfm.block(3)" of a method. part: the component
    it belongs to, else the model. whole: whether the call is one of the component's own, not of a
    module inside it."""

    name: str
    part: nn.Module
    whole: bool


Before = Callable[[Call, list[Tensor]], None]
After = Callable[[Call, list[Tensor], Any], None]


@contextlib.contextmanager
def watched(model: DGSSModel, before: Before, after: After) -> Iterator[list[Call]]:
    """Call `before` with the tensors a call gets and `after` with those and its result.

    Yields the calls that are under way, innermost last; of an exception, where it came from.
    """
    parts = components(model)
    stack: list[Call] = []
    handles = []
    for name, module in model.named_modules():
        call = Call(name, _owner(name, parts, model), module in parts.values())

        def enter(module: nn.Module, args: Any, kwargs: Any, call: Call = call) -> None:
            stack.append(call)
            before(call, tensors((args, kwargs)))

        def leave(
            module: nn.Module, args: Any, kwargs: Any, result: Any, call: Call = call
        ) -> None:
            after(call, tensors((args, kwargs)), result)
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))

    with contextlib.ExitStack() as restored:
        for handle in handles:
            restored.callback(handle.remove)
        for role, part in parts.items():
            methods = DECODER if part is model.decoder else BACKBONE if "encoder.v" in role else ()
            for method in methods:
                if hasattr(part, method):
                    restored.enter_context(_method(part, role, method, stack, before, after))
        yield stack


@contextlib.contextmanager
def _method(
    part: nn.Module, role: str, method: str, stack: list[Call], before: Before, after: After
) -> Iterator[None]:
    original = getattr(part, method)
    own = method in vars(part)

    def call(*args: Any, **kwargs: Any) -> Any:
        index = str(args[0]) if method.startswith("block") and args else ""
        this = Call(f"{role}.{method}({index})", part, True)
        stack.append(this)
        before(this, tensors((args, kwargs)))
        result = original(*args, **kwargs)
        after(this, tensors((args, kwargs)), result)
        stack.pop()
        return result

    setattr(part, method, call)
    try:
        yield
    finally:
        setattr(part, method, original) if own else delattr(part, method)


def components(model: DGSSModel) -> dict[str, nn.Module]:
    """Name in the model -> what plugins built."""
    found: dict[str, nn.Module] = {
        f"encoder.{role}": backbone for role, backbone in model.encoder.backbones.items()
    }
    found |= {f"encoder.adapters.{p}": a for p, a in model.encoder.adapters.items()}
    found |= {f"criteria.{name}": criterion for name, criterion in model.criteria.items()}
    return found | {"enhancer": model.enhancer, "decoder": model.decoder}


def _owner(name: str, parts: dict[str, nn.Module], model: nn.Module) -> nn.Module:
    owners = [role for role in parts if name == role or name.startswith(f"{role}.")]
    return parts[owners[0]] if owners else model


def tensors(value: Any) -> list[Tensor]:
    """The floating tensors in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []
