"""From LLVM IR to a function that ctypes can call, with the machine code cached on disk.

This uses llvmlite without Numba: importing it takes 0.1 s instead of 0.3 s, and the cache holds
plain object code under a key that covers everything it depends on.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from platformdirs import user_cache_path

from mfuser_kernels.scan.cpu import drive, kernels, reverse, vector
from mfuser_kernels.scan.cpu.kernels import Variant

SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # a Job; other Python threads may run
BUILDERS = {
    "forward": kernels.forward_kernel,
    "backward": reverse.backward_kernel,
    "total": reverse.total_kernel,
}
_lock = threading.Lock()
_functions: dict[tuple[str, Variant], tuple[Callable[..., None], Any]] = {}


def function(direction: str, variant: Variant) -> Callable[..., None]:
    """The compiled kernel, from memory, from disk or from the compiler."""
    found = _functions.get((direction, variant))
    if found is None:
        with _lock:
            found = _functions.get((direction, variant))
            if found is None:
                found = _link(direction, machine_code(direction, variant))
                _functions[direction, variant] = found
    return found[0]


def after_fork() -> None:
    """Replace the lock: if another thread held it during the fork, it would stay locked here."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


def machine_code(direction: str, variant: Variant) -> bytes:
    folder = cache_folder()
    if folder is None:
        _warn_unwritable("the user's home", "this user has none")
        return compile_object(BUILDERS[direction](variant, direction))
    path = folder / f"{direction}-{_key(direction, variant)}.o"
    code = _read(path)
    if code is None:
        code = compile_object(BUILDERS[direction](variant, direction))
        _write(path, code)
    return code


def compile_object(source: str) -> bytes:
    """Optimize LLVM IR for this processor and translate it."""
    machine = _machine()
    module = llvm.parse_assembly(source)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code


@cache
def _machine() -> Any:
    if llvm.llvm_version_info < (20,):
        llvm.initialize()  # newer versions initialize themselves and reject the call
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )


def _link(name: str, code: bytes) -> tuple[Callable[..., None], Any]:
    """The function, and the engine that owns its memory."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _new_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return SIGNATURE(engine.get_function_address(name)), engine


def _new_machine() -> Any:
    _machine()
    return llvm.Target.from_default_triple().create_target_machine(jit=True)


@cache
def _code_version() -> bytes:
    """Everything the machine code depends on, except the variant."""
    digest = hashlib.sha256()
    for source in (vector, drive, kernels, reverse):
        assert source.__file__ is not None
        digest.update(Path(source.__file__).read_bytes())
    _machine()
    for part in (
        llvmlite.__version__,
        llvm.get_default_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    ):
        digest.update(part.encode())
    return digest.digest()


def _key(direction: str, variant: Variant) -> str:
    text = f"{direction} {variant}".encode()
    return hashlib.sha256(_code_version() + text).hexdigest()[:32]


def cache_folder() -> Path | None:
    """MFUSER_CACHE_DIR, or mfuser in the user's cache folder; None for a user without a home."""
    if chosen := os.environ.get("MFUSER_CACHE_DIR"):
        return Path(chosen) / "scan"
    try:
        folder = user_cache_path("mfuser", appauthor=False)
    except RuntimeError:
        return None
    # Older releases of platformdirs answer with a "~" that stands for nothing.
    return None if folder.parts[:1] == ("~",) else folder / "scan"


def _read(path: Path) -> bytes | None:
    """Cached code, if its checksum (the first 32 bytes of the file) is right."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _write(path: Path, code: bytes) -> None:
    """Cache the code for later processes; if that is impossible, warn once and go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError as error:
        _warn_unwritable(str(path.parent), str(error))


@cache
def _warn_unwritable(folder: str, error: str) -> None:
    warnings.warn(
        f"cannot cache compiled scan kernels in {folder} ({error}), so every process will compile "
        "them again; set MFUSER_CACHE_DIR to a writable folder",
        stacklevel=2,
    )
