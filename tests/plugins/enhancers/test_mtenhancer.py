from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import below, close, golden
from pydantic import ValidationError
from torch import Tensor

from mfuser_plugins.enhancers.mtenhancer import MTEnhancer, MTEnhancerSpec


def randomized(text_dim: int, **options: int) -> MTEnhancer:
    module = MTEnhancerSpec(**options, dropout=0.0).build(text_dim, 5).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.double()


def plainly(module: MTEnhancer, text: Tensor, visual: Tensor) -> Tensor:
    """Equations 7-10 for one image, (K, C) and (T, C), attention head by head."""
    p = dict(module.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    v = norm(linear(norm(visual, "memory_proj.0"), "memory_proj.1"), "memory_proj.2")
    q = linear(norm(text, "text_proj.0"), "text_proj.1")
    for i, layer in enumerate(module.decoder):
        x = norm(q, f"decoder.{i}.norm1")
        heads = layer.self_attn.heads
        size = x.shape[1] // heads
        queries, keys, values = (linear(x, f"decoder.{i}.self_attn.{k}_proj") for k in "qkv")
        parts = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = queries[:, part] @ keys[:, part].T / size**0.5
            parts.append(scores.softmax(-1) @ values[:, part])
        q = q + linear(torch.cat(parts, 1), f"decoder.{i}.self_attn.proj")
        x = norm(q, f"decoder.{i}.norm2")
        y = layer.cross_attn(torch.cat([x, v, x])[None])[0]
        q = q + y[: len(q)] + y[len(q) + len(v) :]
        x = linear(norm(q, f"decoder.{i}.norm3"), f"decoder.{i}.mlp.0")
        q = q + linear(x * (1 + torch.erf(x / 2**0.5)) / 2, f"decoder.{i}.mlp.3")
    return text + p["gamma"] * linear(norm(q, "out_proj.0"), "out_proj.1")


@pytest.mark.parametrize("layers", [1, 2])
def test_equals_the_equations(layers: int) -> None:
    torch.manual_seed(layers)
    module = randomized(12, width=16, heads=2, layers=layers, state_size=3)
    text, visual = torch.randn(2, 5, 12).double(), torch.randn(2, 10, 12).double()
    out = module(text, visual)
    want = torch.stack([plainly(module, *pair) for pair in zip(text, visual, strict=True)])
    assert close(out, want, 1e-9)


def test_equals_the_released_module() -> None:
    wanted = below(golden("mtenhancer"), "n1.")
    module = MTEnhancerSpec(width=32).build(48, 5).eval()
    module.load_state_dict(below(wanted, "param.") | {"gamma": torch.full((48,), 0.5)})
    text, visual = wanted["text"].requires_grad_(), wanted["visual"].requires_grad_()
    out = module.difference(text, visual)
    assert close(out, wanted["out"])
    assert close(module(text, visual), text + 0.5 * wanted["out"])
    (out * wanted["w"]).sum().backward()
    assert text.grad is not None and close(text.grad, wanted["grad_text"])
    assert visual.grad is not None and close(visual.grad, wanted["grad_visual"])
    for name, parameter in module.named_parameters():
        if name != "gamma":
            assert parameter.grad is not None
            assert close(parameter.grad, wanted[f"grad.{name}"]), name


def test_initial_values() -> None:
    torch.manual_seed(0)
    released = MTEnhancerSpec(width=32).build(512, 19)
    assert 0.8 < released.gamma.std() < 1.0  # cut off at two standard deviations: 0.88
    scan = released.decoder[0].cross_attn
    assert not scan.dt_proj.bias.any()
    small = MTEnhancerSpec(width=32, gamma_init=1e-4).build(512, 19).eval()
    text = F.normalize(torch.randn(1, 19, 512), dim=-1)
    assert 0 < (small(text, torch.randn(1, 50, 512)) - text).abs().max() < 1e-3


def test_released_names() -> None:
    names = set(MTEnhancerSpec().build(768, 19).state_dict())
    parts = {name.split(".")[0] for name in names}
    assert parts == {"memory_proj", "text_proj", "decoder", "out_proj", "gamma"}
    assert "decoder.0.cross_attn.conv1d_x.weight" in names and len(names) == 41


def test_heads_that_do_not_fit() -> None:
    with pytest.raises(ValidationError, match="width 30 .* multiple of heads 4"):
        MTEnhancerSpec(width=30)
