"""Backend `chunked`: the scan in plain PyTorch, on any device, without a loop over every step.

The sequence is cut into spans, the spans into chunks of 32 steps. A span walks through all its
chunks at once: 32 steps give each chunk's own end state, a short loop carries states from chunk
to chunk, and 32 steps more give every state. The backward recomputes each span from its start
state and runs the same three phases in reverse. Where a single step keeps a CPU busy, a span is one
chunk, and only the last phase runs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser_kernels.scan.inputs import LOG2_E, ScanInputs
from mfuser_kernels.scan.reference import compute_dtype

CHUNK = 32
# Bytes of one tensor (B, span, D, N): a few of them should fit a CPU's last-level cache.
SPAN_BYTES = {"cpu": 4 << 20}
SPAN_BYTES_DEVICE = 256 << 20
# From this many states (B D N) on, computing a step takes a CPU longer than calling torch.
BUSY = 8192


def unusable() -> str:
    return ""


def refuses(device: str, dtype: torch.dtype, initial_state: bool) -> str:
    return ""


def span_length(x: ScanInputs) -> int:
    """Steps of one span: whole chunks, at least one."""
    size = SPAN_BYTES.get(x.u.device.type, SPAN_BYTES_DEVICE)
    step = 4 * max(1, x.batch * x.width * x.states)
    return max(1, min(size // (CHUNK * step), -(-x.length // CHUNK))) * CHUNK


def chunk_length(x: ScanInputs, span: int) -> int:
    """Steps of one chunk of a span of `span` steps."""
    busy = x.u.device.type == "cpu" and x.batch * x.width * x.states >= BUSY
    return span if busy else CHUNK


def saved_shape(x: ScanInputs) -> tuple[int, ...]:
    """Start states of the spans."""
    return (-(-x.length // span_length(x)), *state_shape(x))


def state_shape(x: ScanInputs) -> tuple[int, ...]:
    """(B, G, N, E): channels last: they are many, and torch's loops run along the last axis."""
    return (x.batch, x.groups, x.states, x.width // x.groups)


class Buffers:
    """Memory for tensors (T, B, K, G, N, E), one per name, reused by all spans.

    If each span allocated its own, megabytes each, their pages might be returned to the system and
    faulted in again every time. The views of single steps are kept too: slicing a tensor into steps
    takes a third as long as computing them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.steps: dict[str, tuple[Tensor, ...]] = {}  # T times (B, K, G, N, E)

    def product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x * y, valid until the next product of this name."""
        shape = torch.broadcast_shapes(x.shape, y.shape)
        made = self.tensors.get(name)
        if made is None or made.numel() < math.prod(shape):
            made = x.new_empty(shape)
        if made.shape != shape:
            made = made.view(-1)[: math.prod(shape)].view(shape)
        if made is not self.tensors.get(name):
            self.tensors[name], self.steps[name] = made, made.unbind()
        return torch.mul(x, y, out=made)


class Span:
    """One span's slice of the inputs, padded to whole chunks with steps that change no state.

    Beyond the glossary in inputs.py: K chunks, T steps of a chunk, E = D / G channels of a group.
    """

    def __init__(self, x: ScanInputs, start: int, stop: int, buffers: Buffers) -> None:
        self.x, self.start, self.stop, self.buffers = x, start, stop, buffers
        self.steps = chunk_length(x, stop - start)
        self.chunks = -(-(stop - start) // self.steps)
        self.pad = self.chunks * self.steps - (stop - start)
        self.dtype = compute_dtype(x.u.dtype)
        self.groups, self.share = x.groups, x.width // x.groups
        self.u = self.cut(x.u)  # (T, B, K, G, E)
        self.raw = self.cut(x.delta)
        self.delta = self.raw
        if x.delta_bias is not None:
            self.raw = self.raw + self.per_channel(x.delta_bias)
            self.delta = self.raw
        if x.delta_softplus:
            self.delta = F.softplus(self.raw)
        if self.pad:  # softplus(0) is not 0, and only a step size of 0 leaves the state unchanged
            self.delta = self.delta.masked_fill(self.padding(), 0)
        self.du = self.delta * self.u
        self.A = self.table(x.A)  # (G, N, E)
        self.rate = self.A * LOG2_E  # on a CPU torch's exp2 takes a third of the time of exp
        self.B, self.C = self.cut_matrix(x.B), self.cut_matrix(x.C)

    def cut(self, t: Tensor) -> Tensor:
        """(B, L, D) to (T, B, K, G, E)."""
        t = t[:, self.start : self.stop].to(self.dtype)
        if self.pad:
            t = F.pad(t, (0, 0, 0, self.pad))
        t = t.reshape(t.shape[0], self.chunks, self.steps, self.groups, self.share)
        return t.permute(2, 0, 1, 3, 4)

    def join(self, t: Tensor) -> Tensor:
        """(T, B, K, G, E) to (B, span, D)."""
        t = t.permute(1, 2, 0, 3, 4).reshape(t.shape[1], self.chunks * self.steps, -1)
        return t[:, : self.stop - self.start]

    def padding(self) -> Tensor:
        step = torch.arange(self.chunks * self.steps, device=self.x.u.device)
        outside = step >= self.stop - self.start
        return outside.view(self.chunks, self.steps).t().reshape(self.steps, 1, self.chunks, 1, 1)

    def per_channel(self, t: Tensor) -> Tensor:
        """(D, ...) to (G, E, ...)."""
        return t.to(self.dtype).reshape(self.groups, self.share, *t.shape[1:])

    def table(self, t: Tensor) -> Tensor:
        """(D, N) to (G, N, E)."""
        return self.per_channel(t).transpose(-1, -2).contiguous()

    def untable(self, t: Tensor) -> Tensor:
        """(G, N, E) to (D, N)."""
        return t.transpose(-1, -2).reshape(self.x.width, -1)

    def cut_matrix(self, m: Tensor) -> Tensor:
        """B or C to (T, B, K, G, N, 1), or (G, N, E) if it is the same at every step."""
        if m.dim() == 2:
            return self.table(m)
        m = m[:, self.start : self.stop].to(self.dtype)
        if self.pad:
            m = F.pad(m, (0, 0, 0, 0, 0, self.pad))
        m = m.reshape(m.shape[0], self.chunks, self.steps, self.groups, m.shape[3])
        return m.permute(2, 0, 1, 3, 4).contiguous().unsqueeze(-1)

    def scan(self, start_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decays and states of every step (T, B, K, G, N, E), and the state at the end."""
        decay = self.buffers.product("decay", self.delta.unsqueeze(-2), self.rate).exp2_()
        states = self.buffers.product("states", self.du.unsqueeze(-2), self.B)
        steps, decays = self.buffers.steps["states"], self.buffers.steps["decay"]
        starts = start_state.unsqueeze(1)  # (B, K, G, N, E)
        if self.chunks > 1:
            end = states[0].clone()
            for x, a in zip(steps[1:], decays[1:], strict=True):
                end = torch.addcmul(x, a, end)
            starts = carry(self.through(), end, start_state, reverse=False)
        state = starts
        for x, a in zip(steps, decays, strict=True):
            state = x.addcmul_(a, state)
        return decay, states, state[:, -1].clone()

    def through(self) -> Tensor:
        """Decay over each whole chunk (B, K, G, N, E)."""
        return (self.delta.sum(0).unsqueeze(-2) * self.rate).exp2_()

    def scan_back(self, d_y: Tensor, d_end: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states, after `scan` has run, and of the state before the span."""
        d_states = self.buffers.product("d_states", d_y.unsqueeze(-2), self.C)
        decay, ends = self.buffers.tensors["decay"], d_end.unsqueeze(1)
        steps = self.buffers.steps["d_states"][-2::-1]
        decays = self.buffers.steps["decay"][:0:-1]
        if self.chunks > 1:
            own = d_states[-1].clone()
            for x, a in zip(steps, decays, strict=True):
                own = torch.addcmul(x, a, own)
            ends = carry(self.through(), own * decay[0], d_end, reverse=True)
        grad = d_states[-1].add_(ends)
        for x, a in zip(steps, decays, strict=True):
            grad = x.addcmul_(a, grad)
        return d_states, grad[:, 0] * decay[0, :, 0]

    def weigh(self, states: Tensor, m: Tensor) -> Tensor:
        """Sum over n of states and A, B or C: (T, B, K, G, E)."""
        if m.dim() == 6:
            return torch.matmul(m.transpose(-1, -2), states).squeeze(-2)
        return self.buffers.product("product", states, m).sum(-2)

    def matrix_grad(self, states: Tensor, weight: Tensor, m: Tensor) -> Tensor:
        """Gradient of B or C: (B, span, G, N), or (D, N)."""
        product = self.buffers.product("product", states, weight.unsqueeze(-2))
        if m.dim() == 6:
            g = product.sum(-1)  # (T, B, K, G, N); a matmul takes seven times as long
            g = g.permute(1, 2, 0, 3, 4).reshape(g.shape[1], -1, self.groups, g.shape[4])
            return g[:, : self.stop - self.start]
        return self.untable(product.sum((0, 1, 2)))


def carry(through: Tensor, own: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """The state each chunk starts with (B, K, G, N, E)."""
    starts = torch.empty_like(own)
    state = first
    chunks = range(own.shape[1])
    for k in reversed(chunks) if reverse else chunks:
        starts[:, k] = state
        state = torch.addcmul(own[:, k], through[:, k], state)
    return starts


def state_of(x: ScanInputs, given: Tensor | None) -> Tensor:
    """(B, D, N) to (B, G, N, E), zeros if not given."""
    dtype = compute_dtype(x.u.dtype)
    if given is None:
        return x.u.new_zeros(state_shape(x), dtype=dtype)
    by_channel = given.to(dtype).reshape(x.batch, x.groups, -1, x.states)
    return by_channel.transpose(-1, -2).contiguous()


def given_of(state: Tensor) -> Tensor:
    """(B, G, N, E) to (B, D, N)."""
    return state.transpose(-1, -2).flatten(1, 2).contiguous()


def forward(x: ScanInputs, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    state = state_of(x, x.initial_state)
    span, buffers = span_length(x), Buffers()
    out = torch.empty(x.u.shape, dtype=x.u.dtype, device=x.u.device)
    saved = state.new_empty(saved_shape(x) if training else (0,))
    for i, start in enumerate(range(0, x.length, span)):
        stop = min(start + span, x.length)
        s = Span(x, start, stop, buffers)
        if training:
            saved[i] = state
        _, states, state = s.scan(state)
        y = s.weigh(states, s.C)
        if x.D is not None:
            y.addcmul_(s.per_channel(x.D), s.u)
        y = s.join(y)
        if x.z is not None:
            y = y * F.silu(x.z[:, start:stop].to(s.dtype))
        out[:, start:stop] = y
    return out, given_of(state), saved


def backward(
    x: ScanInputs, d_out: Tensor | None, d_last_state: Tensor | None, saved: Tensor
) -> list[Tensor | None]:
    dtype = compute_dtype(x.u.dtype)
    grads = [None if t is None else _unfilled(t, dtype) for t in x.tensors()]
    du, d_delta, dA, dB, dC, dD, dz, d_bias, d_first = grads
    carried = state_of(x, d_last_state)
    span, buffers = span_length(x), Buffers()
    for i in reversed(range(saved.shape[0])):
        start, stop = i * span, min((i + 1) * span, x.length)
        s = Span(x, start, stop, buffers)
        start_state = saved[i]
        decay, states, _ = s.scan(start_state)  # (T, B, K, G, N, E)
        dy = torch.zeros_like(s.u) if d_out is None else s.cut(d_out)  # (T, B, K, G, E)
        if x.z is not None:
            assert dz is not None
            z = s.cut(x.z)
            y = s.weigh(states, s.C)
            if x.D is not None:
                y.addcmul_(s.per_channel(x.D), s.u)
            gate = torch.sigmoid(z)
            dz[:, start:stop] = s.join(dy * y * gate * (1 + z * (1 - gate)))
            dy = dy * z * gate
        _add(dC, s.matrix_grad(states, dy, s.C), start, stop)
        q, carried = s.scan_back(dy, carried)
        sum_B = s.weigh(q, s.B)  # (T, B, K, G, E)
        _add(dB, s.matrix_grad(q, s.du, s.B), start, stop)
        first = start_state.unsqueeze(1)
        before = torch.cat([first, states[-1, :, :-1]], 1)  # state before each chunk
        q[0] *= decay[0] * before
        q[1:] *= decay[1:].mul_(states[:-1])  # gradient of the exponent delta A
        assert du is not None and d_delta is not None and dA is not None
        d_step = s.weigh(q, s.A).addcmul_(s.u, sum_B)
        dA += s.untable(q.mul_(s.delta.unsqueeze(-2)).sum((0, 1, 2)))
        if x.delta_softplus:
            d_step *= torch.sigmoid(s.raw)
        d_u = sum_B.mul_(s.delta)
        if x.D is not None:
            assert dD is not None
            d_u.addcmul_(dy, s.per_channel(x.D))
            dD += (dy * s.u).sum((0, 1, 2)).flatten()
        du[:, start:stop] = s.join(d_u)
        d_delta[:, start:stop] = s.join(d_step)
    if d_bias is not None:
        assert d_delta is not None
        torch.sum(d_delta, (0, 1), out=d_bias)
    if d_first is not None:
        d_first.copy_(given_of(carried))
    return grads


def _unfilled(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Buffer for the gradient of t: zeros if spans add to it, else (each fills its steps) empty."""
    make = torch.zeros if t.dim() <= 2 else torch.empty
    return make(t.shape, dtype=dtype, device=t.device)


def _add(total: Tensor | None, part: Tensor, start: int, stop: int) -> None:
    assert total is not None
    if total.dim() == 2:
        total += part
    else:
        total[:, start:stop] = part
