"""Compile the Triton kernels for GPUs that are not there, and read what the compiler made."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

# kernel -> tensor arguments by type ("row" has the dtype of u), integer arguments come after
TENSORS = {
    "chunk_ends": "u:row delta:row A B:row bias own sums",
    "carry": "A own sums starts",
    "scan_chunks": "u:row delta:row A B:row C:row D z:row bias starts out:row saved",
    "chunk_ends_back": "delta:row A C:row z:row bias g:row own sums",
    "scan_chunks_back": (
        "u:row delta:row A B:row C:row D z:row bias g:row saved starts du:row d_delta:row dz:row "
        "dA dB dC dD d_bias"
    ),
}
TILE = {"BLOCK_D": 32, "NP": 16, "SOFTPLUS": True}
OPTIONS = {
    "chunk_ends": {"T": 96, "CONST_B": False, **TILE},
    "carry": {"K": 32, "BLOCK_D": 32, "REVERSE": False},
    "scan_chunks": {"T": 96, "CONST_B": False, "CONST_C": False, "TRAIN": False, "SAVE": 8, **TILE},
    "chunk_ends_back": {"T": 48, "CONST_C": False, **TILE},
    "scan_chunks_back": {
        "T": 48,
        "CONST_B": False,
        "CONST_C": False,
        "SAVE": 8,
        **TILE,
        "BLOCK_D": 16,
    },
}


def _kernel(name: str):
    from mfuser_kernels.scan.gpu import kernels

    return getattr(kernels, name)


@dataclass(frozen=True)
class Resources:
    """Of one thread (registers, stack) and one program (shared memory); from the binary."""

    registers: int
    stack: int
    spills: int
    shared: int
    shuffles: int
    barriers: int


def compile_kernel(name: str, target: str, row: str = "bf16", gate: bool = False) -> Resources:
    """Compile one kernel for sm_80, sm_90, sm_100, gfx942 and so on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mfuser_kernels.scan.gpu.kernels import LOOSE

    fn = _kernel(name)
    constants = dict(OPTIONS[name])
    if "GATE" in fn.arg_names:
        constants["GATE"] = gate
    signature = {}
    for item in TENSORS[name].split():
        tensor, _, kind = item.partition(":")
        signature[f"{tensor}_ptr"] = f"*{row if kind == 'row' else 'fp32'}"
    integers = [a for a in fn.arg_names if a not in signature and a not in constants]
    signature.update(dict.fromkeys(integers, "i32"))
    signature.update(dict.fromkeys(constants, "constexpr"))
    signature = {a: signature[a] for a in fn.arg_names}
    # what the launcher finds at run time for 512 channels: D, N and all pointers divide by 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (a, kind) in enumerate(signature.items())
        if (kind.startswith("*") and a not in LOOSE) or a in ("D", "N")
    }
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=gpu, options={"num_warps": 1, "enable_fp_fusion": True}
    )
    if target.startswith("sm_"):
        return _nvidia(compiled)
    return _amd(compiled)


@functools.cache
def cuobjdump() -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")


def _nvidia(compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text.stdout + text.stderr)
    assert found, text.stdout
    registers, stack, _, local = map(int, found.groups())
    ptx = compiled.asm["ptx"]
    return Resources(
        registers, stack, local, compiled.metadata.shared, ptx.count("shfl."), ptx.count("bar.sync")
    )


def _amd(compiled) -> Resources:
    text = compiled.asm["amdgcn"]

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found, key
        return int(found.group(1))

    return Resources(
        value("vgpr_count"),
        value("private_segment_fixed_size"),
        value("vgpr_spill_count"),  # spilled scalars go to vector registers, not to memory
        compiled.metadata.shared,
        text.count("ds_bpermute") + text.count("_dpp"),
        text.count("s_barrier"),
    )


# Registers of a thread at most, for what was compiled for sm_80, sm_90, sm_100 and gfx942 with
# Triton 3.9 (64 to 71, 101, 64, 69 and 242), with a little room for other versions.
REGISTERS = {
    "chunk_ends": 80,
    "carry": 128,
    "scan_chunks": 80,
    "chunk_ends_back": 80,
    "scan_chunks_back": 255,
}


@pytest.mark.parametrize("name", REGISTERS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(target, name):
    gate = "GATE" in _kernel(name).arg_names
    made = compile_kernel(name, target, gate=gate)
    assert made.stack == 0 and made.spills == 0, made
    assert made.registers <= REGISTERS[name], made


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["chunk_ends", "scan_chunks", "chunk_ends_back"])
def test_all_states_of_a_channel_stay_in_one_thread(target, name):
    """Else the sum over states needs shuffles: the alignment of some pointers must stay unknown."""
    made = compile_kernel(name, target)
    assert (made.shuffles, made.barriers, made.shared) == (0, 0, 0), made
