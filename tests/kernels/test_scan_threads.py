"""The CPU backend among threads, processes, interrupts and other people's cache folders."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

pytest.importorskip("llvmlite", reason='llvmlite is not installed: pip install "mfuser[cpu]"')

from mfuser_kernels import selective_scan
from mfuser_kernels.scan.cpu import compiler, pool
from mfuser_kernels.scan.cpu.drive import Job
from mfuser_kernels.testing import run_scan, scan_inputs


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "ours"])
def kind(request, monkeypatch):
    if request.param == "ours":
        monkeypatch.setattr(pool, "_openmp", lambda: None)
    elif pool._openmp() is None:
        pytest.skip("torch has no GNU OpenMP here")


def same(x, y):
    return all(torch.equal(x[name], y[name]) for name in x)


def large(**options):
    """Large enough that the pool is used."""
    return scan_inputs(2, 300, 200, 16, **options)


def test_the_number_of_threads_changes_nothing(threads):
    found = []
    for n in (1, 2, 4):
        threads(n)
        found.append(run_scan(large(), "cpu"))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_calls_from_several_python_threads(threads, kind):
    threads(2)
    inputs = [large(seed=seed) for seed in range(4)]
    expected = [run_scan(x, "cpu") for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(1 + i)  # pools of different sizes are wanted at once
        for _ in range(5):
            if not same(run_scan(inputs[i], "cpu"), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong and not any(worker.is_alive() for worker in workers)


def test_both_kinds_of_threads(threads, kind):
    threads(1)
    expected = run_scan(large(), "cpu")
    for n in (2, 5):
        threads(n)
        assert same(run_scan(large(), "cpu"), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child(threads, kind):
    """As in a data-loader worker: forked after the parent has scanned with two threads.

    torch's own OpenMP loops would hang in the child, so around the scan it sets one thread, as
    data loaders do; the scan itself, of a width without padding, uses none of them.
    """
    threads(2)
    inputs = scan_inputs(2, 300, 256, 16)
    expected = selective_scan(**inputs, backend="cpu")

    def child() -> None:
        found = selective_scan(**inputs, backend="cpu")
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(found, expected) and pool._pool is not None else 3)

    children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
        assert process.exitcode == 0
    assert torch.equal(selective_scan(**inputs, backend="cpu"), expected)


FORKED = """
import os, sys, torch, torch.utils.flop_counter
torch.set_num_threads(2)
u, B = torch.ones(1, 600, 256), torch.ones(1, 600, 8)  # OpenMP has threads now
before = set(sys.modules)
child = os.fork()
if child == 0:
    from mfuser_kernels import selective_scan
    new = set(sys.modules) - before
    print(sorted({name.split(".")[0] for name in new}), "torch._dynamo" in sys.modules, flush=True)
    out = selective_scan(u, u, -torch.ones(256, 8), B, B, layout="bld", backend="cpu")
    os._exit(0 if out[0, -1, 0] > 0 else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_before_the_first_import_which_needs_torch_alone():
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "mfuser_kernels" in done.stdout
    for name in ("numba", "llvmlite", "triton", "mamba_ssm", "'mfuser'", "True"):
        assert name not in done.stdout


def test_spawned_child(threads):
    threads(2)
    inputs = large()
    with multiprocessing.get_context("spawn").Pool(1) as children:
        assert same(children.apply(run_scan, (inputs, "cpu")), run_scan(inputs, "cpu"))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a POSIX timer")
def test_an_interrupt_ends_a_scan(threads, kind):
    threads(2)
    inputs = scan_inputs(6, 6000, 128, 64, gate=False)

    def timed() -> float:
        start = time.perf_counter()
        selective_scan(**inputs, backend="cpu")
        return time.perf_counter() - start

    timed()
    whole = timed()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, whole / 10)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(20):
                timed()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    small = large()
    assert same(run_scan(small, "cpu"), run_scan(small, "cpu"))


def test_an_error_in_one_thread_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(pool, "_openmp", lambda: None)
    caller = threading.get_ident()

    def in_a_helper(_) -> None:
        if threading.get_ident() != caller:
            raise RuntimeError("task 3")

    def everywhere(_) -> None:
        raise RuntimeError("task 3")

    for threads, drive in ((1, everywhere), (2, everywhere), (2, in_a_helper)):
        with pytest.raises(RuntimeError, match="task 3"):
            pool.run(drive, Job(), 8, threads, 8)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_thousands_of_calls_leak_nothing(threads):
    threads(1)
    inputs = scan_inputs(1, 8, 32, 2)
    kernel = {k: v for k, v in inputs.items() if k != "layout"}
    x = {
        k: v.transpose(1, 2) if k in ("u", "delta", "z", "B", "C") else v for k, v in kernel.items()
    }
    x["u"].requires_grad_()

    def call(times: int) -> None:
        for _ in range(times):
            selective_scan(**x, backend="cpu").sum().backward()

    call(500)
    before = resident_bytes()
    call(4_000)
    # 256 bytes per call would be 1 MB; the allocator's own drift was under 0.5 MB
    assert resident_bytes() - before < 1 << 20


@pytest.fixture
def compiled_anew(monkeypatch):
    """Scans as in a new process whose cache is `folder`; returns how often that was warned of."""

    def run(folder) -> int:
        monkeypatch.setenv("MFUSER_CACHE_DIR", str(folder))
        monkeypatch.setattr(compiler, "_functions", {})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for width in (8, 40):
                run_scan(scan_inputs(1, 8, width, 3), "cpu")
        return len([w for w in caught if "MFUSER_CACHE_DIR" in str(w.message)])

    return run


def test_code_is_kept_on_disk_and_checked(compiled_anew, tmp_path):
    assert compiled_anew(tmp_path) == 0
    kept = sorted((tmp_path / "scan").iterdir())
    assert [path.name.split("-")[0] for path in kept] == ["backward", "forward", "total"]
    backward, forward, _ = kept
    time_kept, whole = backward.stat().st_mtime_ns, forward.read_bytes()
    forward.write_bytes(whole[:100] + b"damage" + whole[106:])
    assert compiled_anew(tmp_path) == 0
    assert backward.stat().st_mtime_ns == time_kept
    assert forward.read_bytes() == whole


def test_cache_folder_that_cannot_be_written_warns_once(compiled_anew, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert compiled_anew(tmp_path / "file") == 1


def test_every_variant_has_its_own_code():
    one = compiler.Variant(3, False, True, False, False, False, False)
    other = compiler.Variant(3, False, True, True, False, False, False)
    assert compiler._key("forward", one) != compiler._key("forward", other)
    assert compiler._key("forward", one) != compiler._key("backward", one)


def test_no_warning_when_all_is_well():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_scan(scan_inputs(1, 8, 8, 3), "cpu")
    assert [str(w.message) for w in caught] == []
