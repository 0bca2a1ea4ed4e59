"""The processes of one command: one on a laptop, several with torchrun.

Several work as one: what one of them cannot do ends all of them with the same reason, said once,
and no process waits for another that has gone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from mfuser.errors import ElsewhereError, MFuserError, brief

Result = TypeVar("Result")

PATIENCE = 5.0
"""Seconds that a process which lost another waits for that one's reason."""
FSDP = "ACCELERATE_USE_FSDP"
SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


class Processes:
    """All processes of this command. `accelerator` is the only one that it makes.

    Every method but `say_why` is called by all of them, in the same order.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.main = self.rank == 0
        self.sharded = False
        """Whether a training's weights are shared out among them (`shards`)."""
        self._notes = _notes() if self.count > 1 else None
        if self._notes is not None:
            self._notes.set(f"name/{self.rank}", f"{socket.gethostname()}, {os.getpid()}")

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which each process does for itself.

        Where it fails in one, all fail: the first of those that failed with its own error, the
        others with ElsewhereError. `work` itself must not wait for another process.
        """
        if self.count == 1:
            return work()
        result, failure = _tried(work)
        failures = gather_object([None if failure is None else (self.rank, _told(failure))])
        self._fail_together(failure, [f for f in failures if f is not None])
        return cast(Result, result)

    def from_main(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, done by the first process for all; it must survive pickling."""
        if self.count == 1:
            return work()
        result, failure = _tried(work) if self.main else (None, None)
        shared = [(result, None if failure is None else (0, _told(failure)))]
        broadcast_object_list(shared)
        result, failed = shared[0]
        self._fail_together(failure, [failed] if failed is not None else [])
        return cast(Result, result)

    def _fail_together(self, mine: Exception | None, failures: list[tuple[int, str]]) -> None:
        if failures:
            first, reason = min(failures)
            if mine is not None and first == self.rank:
                raise mine
            raise ElsewhereError(f"process {first} of {self.count}: {reason}") from mine

    def gathered(self, items: list[Result]) -> list[Result]:
        """The items of all processes, in every one."""
        return cast(list[Result], gather_object(items)) if self.count > 1 else items

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each value over the processes, which all have the same keys."""
        if self.count == 1:
            return values
        own = torch.tensor(list(values.values()), device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(own, "mean").tolist(), strict=True))

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes of a tensor without gradient."""
        return cast(Tensor, self.accelerator.reduce(value, "sum"))

    def concatenated(self, values: Tensor) -> Tensor:
        """The values (n,) of all processes, one after the other; n may differ."""
        sizes = self.accelerator.gather(torch.tensor([len(values)], device=values.device)).tolist()
        longest = max(sizes)
        padded = torch.cat([values, values.new_zeros(longest - len(values))])
        rows = cast(Tensor, self.accelerator.gather(padded)).view(self.count, longest)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether it is set in one of them."""
        return flag if self.count == 1 else self.mean({"flag": float(flag)})["flag"] > 0

    def same_buffers(self, model: nn.Module) -> None:
        """Give all the first one's running statistics, which are those that it saves."""
        if self.count > 1:
            kind = self.accelerator.device.type  # on CPUs its index is the process's
            broadcast([b for b in model.buffers() if b.device.type == kind])

    def say_why(self, error: BaseException) -> None:
        """Leave this process's reason to end for the others, and for torchrun's summary."""
        if self._notes is not None:
            with contextlib.suppress(RuntimeError):  # nobody is left to be told
                self._notes.set(str(self.rank), _told(error))

    def why(self) -> str:
        """Why another process ended, if it said so; else which one it was."""
        until = time.monotonic() + PATIENCE
        left = set(range(self.count)) - {self.rank}
        try:
            if self._notes is not None:
                self._notes.set(f"alive/{self.rank}", "")
            while self._notes is not None and left and time.monotonic() < until:
                for rank in sorted(left):
                    if self._notes.check([str(rank)]):
                        reason = self._notes.get(str(rank)).decode("utf-8", "replace")
                        return f"process {rank} of {self.count} ended: {reason}"
                    if self._notes.check([f"alive/{rank}"]):
                        left.remove(rank)
                time.sleep(0.1)
            gone = [self._named(rank) for rank in sorted(left)]
        except RuntimeError:  # what they leave their notes with has gone, too
            gone = [f"process 0 at {os.environ.get('MASTER_ADDR')} (or its machine)"]
        who = ", ".join(gone) if self._notes is not None and gone else "another"
        return (
            f"{who} of the {self.count} processes ended without saying why, as one does that the "
            "system kills when memory runs out"
        )

    def _named(self, rank: int) -> str:
        """ "process 1 (HOST, 4711)": its name, machine and number there."""
        name = f"name/{rank}"
        if self._notes is None or not self._notes.check([name]):
            return f"process {rank}"
        return f"process {rank} ({self._notes.get(name).decode()})"


@contextlib.contextmanager
def processes(
    precision: str = "no", device: str | None = None, joined: Processes | None = None
) -> Iterator[Processes]:
    """Connect the processes that a launcher started; they part when they end or one fails, since
    they cannot meet twice at one address.

    joined: those of the surrounding command, which stay connected. Raises MFuserError where what
    launched them cannot work, or where another process has gone.
    """
    if joined is not None:
        yield joined
        return
    check_launch()
    # Accelerate keeps one state per Python process, its precision and device included, and has no
    # public way to put it away; a program may train with several of them one by one.
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    together = Processes(_accelerator(precision, device))
    atexit.register(_part)
    try:
        check_connected(together.count)
        yield together
    except ElsewhereError:
        raise
    except Exception as error:
        if together.count > 1 and _lost(error):
            raise MFuserError(f"{together.why()}; go on with --resume") from error
        together.say_why(error)
        _record(error)
        raise


def _part() -> None:
    """End the process group, and with it what others wait for."""
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # private, as above


def _accelerator(precision: str, device: str | None) -> Accelerator:
    several = launched() > 1
    with _without(FSDP):  # `shards` shares out the model, and knows its blocks
        return _made(precision, device, several)


def _made(precision: str, device: str | None, several: bool) -> Accelerator:
    return Accelerator(
        mixed_precision=precision,
        # Processes without a GPU are connected only where Accelerate is told to use the CPU.
        cpu=device == "cpu" or (several and not torch.cuda.is_available()),
        # Given, so that no launcher's variable divides the loss: batches are accumulated here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Gradients live in what is sent, not beside it. Not static_graph: what it finds out, the
        # buckets are arranged by after the first step anyway, and some decoders' graphs change.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


@contextlib.contextmanager
def _without(variable: str) -> Iterator[None]:
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def asks_for_shards() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return _set(FSDP)


def _set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def launched() -> int:
    """The number of processes that a launcher has started for this command."""
    if "RANK" not in os.environ and "LOCAL_RANK" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch() -> None:
    """Raises MFuserError for launchers that would start trainings side by side."""
    for variable, name in SHARDED.items():
        if _set(variable):
            raise MFuserError(
                f"accelerate's configuration asks for {name}, which this project does not use; "
                "models that do not fit into each process are shared out by FSDP (examples/launch/"
                "sharded.yaml, or --set-recipe shard=true with torchrun --nproc_per_node N -m "
                "mfuser …)"
            )
    if asks_for_shards() and os.environ.get("FSDP_VERSION", "1") == "1":
        raise MFuserError(
            "accelerate's configuration asks for the first version of FSDP, which cannot share out "
            "frozen and trained weights together; set fsdp_version: 2 in its fsdp_config (as "
            "examples/launch/sharded.yaml does), or use torchrun --nproc_per_node N -m mfuser …"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if by_accelerate and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise MFuserError(
            "accelerate launch was asked for several processes and started one (on CPUs it needs "
            "mpirun for more); use torchrun --nproc_per_node N -m mfuser …"
        )


def check_connected(count: int) -> None:
    """Raises MFuserError where the launcher started more processes than are connected."""
    if launched() > count:
        raise MFuserError(
            f"the launcher started {launched()} processes but {count} of them "
            f"{'is' if count == 1 else 'are'} connected; use torchrun --nproc_per_node N -m "
            "mfuser …"
        )


def check_alone(command: str) -> None:
    """Raises MFuserError where a launcher started several processes of a command that is one."""
    if launched() > 1:
        raise MFuserError(
            f"'mfuser {command}' is one process, the launcher started {launched()}; only train and "
            "evaluate share their work: start it without torchrun"
        )


def _tried(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _told(error: BaseException) -> str:
    text = brief(error) if isinstance(error, Exception) else ""
    return text if isinstance(error, MFuserError) else f"{type(error).__name__}: {text}"


def _lost(error: Exception) -> bool:
    """Whether a process group broke; gloo raises a plain RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")
    )


def _notes() -> Any:
    """A key-value store for their reasons: torchrun's own, which outlives them all; else None."""
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=PATIENCE),
        )
    except (KeyError, ValueError, RuntimeError):
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"mfuser/{attempt}", store)  # type: ignore[attr-defined]


def _record(error: Exception) -> None:
    """Report the error to torchrun, whose summary otherwise shows only an exit code."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
