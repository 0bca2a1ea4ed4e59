"""Triton kernels of the selective scan, forward and backward, each in three phases.

Batch times channels alone (2 x 512) leaves most of a large GPU idle, so time is cut into chunks:
each chunk alone gives the state it ends with and its summed delta; a scan over chunks gives the
state each starts with; every chunk runs again from there. The backward does the same in reverse.

A program is one warp on a tile of N states x BLOCK_D channels. With 16 x 32 and no promise of
alignment for the pointers of A and the states, one thread holds all states of one channel: the
sum over states needs no exchange between threads. Tables are (N, D) in float32; A is given
multiplied by log2(e).
"""

# mypy: ignore-errors
import triton
import triton.language as tl

LOOSE = ["A_ptr", "own_ptr", "starts_ptr", "saved_ptr", "dA_ptr"]
SAVE_STEPS = 8  # steps between saved states: twice the four whose states fit registers


@triton.jit
def _exp_of_minus_abs(x):
    return tl.exp2(-1.4426950408889634 * tl.abs(x))


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr):
    """delta and its derivative; log1p as an artanh keeps tiny deltas exact to 5e-9."""
    if SOFTPLUS:
        w = _exp_of_minus_abs(raw)
        s = w / (2.0 + w)
        q = s * s
        p = 0.14000902610720742 + q * 0.14005993520688045
        p = 0.2001076362145391 + q * p
        p = 1.0 + q * (0.3333320814278829 + q * p)
        delta = tl.maximum(raw, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2.0 * s * p
        r = 1.0 / (1.0 + w)
        slope = tl.where(raw >= 0, r, w * r)
    else:
        delta = raw
        slope = raw * 0 + 1.0
    return delta, slope


@triton.jit
def _silu(z):
    w = _exp_of_minus_abs(z)
    r = 1.0 / (1.0 + w)
    s = tl.where(z >= 0, r, w * r)
    return z * s, s


@triton.jit
def _where(L, D, G, N, BLOCK_D: tl.constexpr, NP: tl.constexpr):
    """Group, channels, states and their masks of this program; blocks never straddle groups."""
    share = D // G
    blocks = tl.cdiv(share, BLOCK_D)
    g = tl.program_id(0) // blocks
    e = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, NP)
    d = g * share + e
    return g, d, e < share, n, (n < N)[:, None] & (e < share)[None, :]


@triton.jit
def _only_if(inside, mask):
    """mask & inside, which Triton 3.9's interpreter turns into integers if `inside` is a scalar."""
    return tl.where(inside, mask, False)


@triton.jit
def _matrix(ptr, b, t, g, d, n, L, D, G, N, mask, inside, CONSTANT: tl.constexpr):
    """B or C at one step: (NP, BLOCK_D) if constant, else (NP, 1)."""
    if CONSTANT:
        return tl.load(ptr + n[:, None] * D + d[None, :], mask=mask, other=0.0)
    row = ((b * L + t).to(tl.int64) * G + g) * N
    return tl.load(ptr + row + n, mask=_only_if(inside, n < N), other=0.0).to(tl.float32)[:, None]


@triton.jit
def _row(ptr, b, t, d, L, D, mask):
    at = (b * L + t).to(tl.int64) * D + d
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(ptr, x, b, t, d, L, D, mask):
    at = (b * L + t).to(tl.int64) * D + d
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=LOOSE)
def chunk_ends(
    u_ptr, delta_ptr, A_ptr, B_ptr, bias_ptr, own_ptr, sums_ptr, L, D, G, N,
    T: tl.constexpr, BLOCK_D: tl.constexpr, NP: tl.constexpr,
    SOFTPLUS: tl.constexpr, CONST_B: tl.constexpr,
):  # fmt: skip
    """Phase 1: the state each chunk ends with if it starts at zero, and its summed delta."""
    c, b = tl.program_id(1), tl.program_id(2)
    g, d, md, n, m = _where(L, D, G, N, BLOCK_D, NP)
    A = tl.load(A_ptr + n[:, None] * D + d[None, :], mask=m, other=0.0)
    bias = tl.load(bias_ptr + d, mask=md, other=0.0)
    h = tl.zeros([NP, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for t in range(c * T, tl.minimum((c + 1) * T, L)):
        delta, _ = _step_size(_row(delta_ptr, b, t, d, L, D, md) + bias, SOFTPLUS)
        x = delta * _row(u_ptr, b, t, d, L, D, md)
        B = _matrix(B_ptr, b, t, g, d, n, L, D, G, N, m, True, CONST_B)
        h = tl.exp2(delta[None, :] * A) * h + x[None, :] * B
        total += delta
    at = (b * tl.num_programs(1) + c).to(tl.int64) * D
    tl.store(own_ptr + at * N + n[:, None] * D + d[None, :], h, mask=m)
    tl.store(sums_ptr + at + d, total, mask=md)


@triton.jit
def _then(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit(do_not_specialize_on_alignment=LOOSE)
def carry(
    A_ptr, own_ptr, sums_ptr, starts_ptr, chunks, D, N,
    K: tl.constexpr, BLOCK_D: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Phase 2: starts[j + 1] = exp(A sum_j) starts[j] + own[j] for the chunks in order.

    starts[0] is given. In reverse, chunk j is counted from the last one.
    """
    n, b = tl.program_id(0), tl.program_id(2)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    md = d < D
    A = tl.load(A_ptr + n * D + d, mask=md, other=0.0)
    first = (b * (chunks + 1)).to(tl.int64) * N * D + n * D + d
    h = tl.load(starts_ptr + first, mask=md, other=0.0)
    for j0 in range(0, chunks, K):
        j = j0 + tl.arange(0, K)
        m = (j < chunks)[:, None] & md[None, :]
        c = chunks - 1 - j if REVERSE else j
        at = (b * chunks + c).to(tl.int64)[:, None] * D
        sums = tl.load(sums_ptr + at + d[None, :], mask=m, other=0.0)
        own = tl.load(own_ptr + at * N + n * D + d[None, :], mask=m, other=0.0)
        through, ends = tl.associative_scan((tl.exp2(sums * A[None, :]), own), 0, _then)
        ends = through * h[None, :] + ends
        to = starts_ptr + first[None, :] + (j + 1).to(tl.int64)[:, None] * N * D
        tl.store(to, ends, mask=m)
        h = tl.sum(tl.where((tl.arange(0, K) == K - 1)[:, None], ends, 0.0), 0)


@triton.jit(do_not_specialize_on_alignment=LOOSE)
def scan_chunks(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, starts_ptr, out_ptr, saved_ptr,
    L, D, G, N,
    T: tl.constexpr, BLOCK_D: tl.constexpr, NP: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONST_B: tl.constexpr, CONST_C: tl.constexpr, GATE: tl.constexpr, TRAIN: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """Phase 3: every output, from the start state of each chunk."""
    c, b = tl.program_id(1), tl.program_id(2)
    g, d, md, n, m = _where(L, D, G, N, BLOCK_D, NP)
    tile = n[:, None] * D + d[None, :]
    A = tl.load(A_ptr + tile, mask=m, other=0.0)
    bias = tl.load(bias_ptr + d, mask=md, other=0.0)
    skip = tl.load(D_ptr + d, mask=md, other=0.0)
    at = (b * (tl.num_programs(1) + 1) + c).to(tl.int64) * N * D
    h = tl.load(starts_ptr + at + tile, mask=m, other=0.0)
    for t in range(c * T, tl.minimum((c + 1) * T, L)):
        if TRAIN and t % SAVE == 0:
            keep = (b * tl.cdiv(L, SAVE) + t // SAVE).to(tl.int64) * N * D
            tl.store(saved_ptr + keep + tile, h, mask=m)
        u = _row(u_ptr, b, t, d, L, D, md)
        delta, _ = _step_size(_row(delta_ptr, b, t, d, L, D, md) + bias, SOFTPLUS)
        B = _matrix(B_ptr, b, t, g, d, n, L, D, G, N, m, True, CONST_B)
        C = _matrix(C_ptr, b, t, g, d, n, L, D, G, N, m, True, CONST_C)
        h = tl.exp2(delta[None, :] * A) * h + (delta * u)[None, :] * B
        y = tl.sum(h * C, 0) + skip * u
        if GATE:
            y = y * _silu(_row(z_ptr, b, t, d, L, D, md))[0]
        _put(out_ptr, y, b, t, d, L, D, md)


@triton.jit(do_not_specialize_on_alignment=LOOSE)
def chunk_ends_back(
    delta_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, g_ptr, own_ptr, sums_ptr, L, D, G, N,
    T: tl.constexpr, BLOCK_D: tl.constexpr, NP: tl.constexpr,
    SOFTPLUS: tl.constexpr, CONST_C: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Phase 1 of the backward: each chunk's own gradient of the state before it."""
    c, b = tl.program_id(1), tl.program_id(2)
    g, d, md, n, m = _where(L, D, G, N, BLOCK_D, NP)
    A = tl.load(A_ptr + n[:, None] * D + d[None, :], mask=m, other=0.0)
    bias = tl.load(bias_ptr + d, mask=md, other=0.0)
    q = tl.zeros([NP, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    last = tl.minimum((c + 1) * T, L) - 1
    for back in range(0, last - c * T + 1):
        t = last - back
        delta, _ = _step_size(_row(delta_ptr, b, t, d, L, D, md) + bias, SOFTPLUS)
        dy = _row(g_ptr, b, t, d, L, D, md)
        if GATE:
            dy = dy * _silu(_row(z_ptr, b, t, d, L, D, md))[0]
        C = _matrix(C_ptr, b, t, g, d, n, L, D, G, N, m, True, CONST_C)
        q = tl.exp2(delta[None, :] * A) * (q + dy[None, :] * C)
        total += delta
    at = (b * tl.num_programs(1) + c).to(tl.int64) * D
    tl.store(own_ptr + at * N + n[:, None] * D + d[None, :], q, mask=m)
    tl.store(sums_ptr + at + d, total, mask=md)


@triton.jit
def _advance(
    h, u_ptr, delta_ptr, B_ptr, A, bias, b, t, g, d, n, L, D, G, N, md, m,
    SOFTPLUS: tl.constexpr, CONST_B: tl.constexpr,
):  # fmt: skip
    """The state after one more step; steps beyond the end leave it unchanged."""
    inside = t < L
    u = _row(u_ptr, b, t, d, L, D, _only_if(inside, md))
    delta, _ = _step_size(_row(delta_ptr, b, t, d, L, D, _only_if(inside, md)) + bias, SOFTPLUS)
    delta = tl.where(inside, delta, 0.0)
    B = _matrix(B_ptr, b, t, g, d, n, L, D, G, N, m, inside, CONST_B)
    return tl.exp2(delta[None, :] * A) * h + (delta * u)[None, :] * B


@triton.jit
def _retreat(
    h, q, dA, dB_sum, dC_sum, dD, d_bias,
    u_ptr, delta_ptr, B_ptr, C_ptr, z_ptr, g_ptr, du_ptr, d_delta_ptr, dz_ptr, dB_ptr, dC_ptr,
    A, skip, bias, b, t, g, d, n, L, D, G, N, md, m, part,
    SOFTPLUS: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One step of the reverse recurrence, given the state h before the step."""
    inside = t < L
    md = _only_if(inside, md)
    u = _row(u_ptr, b, t, d, L, D, md)
    delta, slope = _step_size(_row(delta_ptr, b, t, d, L, D, md) + bias, SOFTPLUS)
    delta = tl.where(inside, delta, 0.0)
    B = _matrix(B_ptr, b, t, g, d, n, L, D, G, N, m, inside, CONST_B)
    C = _matrix(C_ptr, b, t, g, d, n, L, D, G, N, m, inside, CONST_C)
    x = delta * u
    decay = tl.exp2(delta[None, :] * A)
    p = decay * h
    h = p + x[None, :] * B
    dy = _row(g_ptr, b, t, d, L, D, md)
    if GATE:
        z = _row(z_ptr, b, t, d, L, D, md)
        gate, s = _silu(z)
        y = tl.sum(h * C, 0) + skip * u
        _put(dz_ptr, dy * y * s * (1.0 + z * (1.0 - s)), b, t, d, L, D, md)
        dy = dy * gate
    q = q + dy[None, :] * C
    row = ((part * tl.num_programs(2) + b).to(tl.int64) * L + t) * G * N + g * N + n
    if CONST_B:
        dB_sum += q * x[None, :]
    else:
        tl.store(dB_ptr + row, tl.sum(q * x[None, :], 1), mask=_only_if(inside, n < N))
    if CONST_C:
        dC_sum += h * dy[None, :]
    else:
        tl.store(dC_ptr + row, tl.sum(h * dy[None, :], 1), mask=_only_if(inside, n < N))
    by_B = tl.sum(q * B, 0)
    qp = q * p
    dA += qp * delta[None, :]
    _put(du_ptr, delta * by_B + skip * dy, b, t, d, L, D, md)
    d_delta = (u * by_B + 0.6931471805599453 * tl.sum(qp * A, 0)) * slope
    d_delta = tl.where(inside, d_delta, 0.0)
    _put(d_delta_ptr, d_delta, b, t, d, L, D, md)
    return q * decay, dA, dB_sum, dC_sum, dD + dy * u, d_bias + d_delta


@triton.jit(do_not_specialize_on_alignment=LOOSE)
def scan_chunks_back(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, g_ptr, saved_ptr, starts_ptr,
    du_ptr, d_delta_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, d_bias_ptr, L, D, G, N,
    T: tl.constexpr, BLOCK_D: tl.constexpr, NP: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONST_B: tl.constexpr, CONST_C: tl.constexpr, GATE: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """Phase 3 of the backward: all gradients, 8 steps at a time from a saved state.

    Four states before a step fit the registers: the later four steps walk 4 + 3 steps from the
    saved state, the earlier four 3, so 10 steps for 8. Sums over channels and over chunks are
    left to the caller, one slice for each program: no atomics, the same result every time.
    """
    c, b = tl.program_id(1), tl.program_id(2)
    g, d, md, n, m = _where(L, D, G, N, BLOCK_D, NP)
    part = tl.program_id(0) % tl.cdiv(D // G, BLOCK_D)
    tile = n[:, None] * D + d[None, :]
    A = tl.load(A_ptr + tile, mask=m, other=0.0)
    bias = tl.load(bias_ptr + d, mask=md, other=0.0)
    skip = tl.load(D_ptr + d, mask=md, other=0.0)
    chunks = tl.num_programs(1)
    at = (b * (chunks + 1) + chunks - 1 - c).to(tl.int64) * N * D
    q = tl.load(starts_ptr + at + tile, mask=m, other=0.0)
    dA = tl.zeros([NP, BLOCK_D], dtype=tl.float32)
    dB = tl.zeros([NP, BLOCK_D], dtype=tl.float32)
    dC = tl.zeros([NP, BLOCK_D], dtype=tl.float32)
    dD = tl.zeros([BLOCK_D], dtype=tl.float32)
    d_bias = tl.zeros([BLOCK_D], dtype=tl.float32)
    blocks = tl.cdiv(tl.minimum(T, L - c * T), SAVE)
    for back in range(0, blocks):
        start = c * T + (blocks - 1 - back) * SAVE
        keep = (b * tl.cdiv(L, SAVE) + start // SAVE).to(tl.int64) * N * D
        h = tl.load(saved_ptr + keep + tile, mask=m, other=0.0)
        for half in range(0, 2):
            t0 = start + (1 - half) * 4
            h0 = h
            for t in range(start, t0):
                h0 = _advance(h0, u_ptr, delta_ptr, B_ptr, A, bias, b, t, g, d, n, L, D, G, N,
                              md, m, SOFTPLUS, CONST_B)  # fmt: skip
            h1 = _advance(h0, u_ptr, delta_ptr, B_ptr, A, bias, b, t0, g, d, n, L, D, G, N,
                          md, m, SOFTPLUS, CONST_B)  # fmt: skip
            h2 = _advance(h1, u_ptr, delta_ptr, B_ptr, A, bias, b, t0 + 1, g, d, n, L, D, G, N,
                          md, m, SOFTPLUS, CONST_B)  # fmt: skip
            h3 = _advance(h2, u_ptr, delta_ptr, B_ptr, A, bias, b, t0 + 2, g, d, n, L, D, G, N,
                          md, m, SOFTPLUS, CONST_B)  # fmt: skip
            for i in tl.static_range(4):
                before = h3 if i == 0 else (h2 if i == 1 else (h1 if i == 2 else h0))
                q, dA, dB, dC, dD, d_bias = _retreat(
                    before, q, dA, dB, dC, dD, d_bias, u_ptr, delta_ptr, B_ptr, C_ptr, z_ptr,
                    g_ptr, du_ptr, d_delta_ptr, dz_ptr, dB_ptr, dC_ptr, A, skip, bias, b,
                    t0 + 3 - i, g, d, n, L, D, G, N, md, m, part,
                    SOFTPLUS, CONST_B, CONST_C, GATE,
                )  # fmt: skip
    mine = (b * chunks + c).to(tl.int64) * D
    tl.store(dA_ptr + mine * N + tile, dA, mask=m)
    if CONST_B:
        tl.store(dB_ptr + mine * N + tile, dB, mask=m)
    if CONST_C:
        tl.store(dC_ptr + mine * N + tile, dC, mask=m)
    tl.store(dD_ptr + mine + d, dD, mask=md)
    tl.store(d_bias_ptr + mine + d, d_bias, mask=md)
