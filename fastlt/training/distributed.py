"""Several processes that train one model: who is who, what they exchange, and how they are
started.
"""

import gc
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlt.errors import UserError
from fastlt.utils.pool import cores

PATIENCE = timedelta(minutes=30)  # of a rank for the others, which may evaluate or write meanwhile
STOP_PATIENCE = 600  # seconds that a process may take to save when it is asked to stop
LAST_TENSORS = 0.2  # seconds
BAD_INPUT = 2  # exit code of what another start would not change


@dataclass(frozen=True)
class Ranks:
    """The place of this process among `world`; `local` is its number on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def any(self, mine: bool, device: torch.device) -> bool:
        """Return whether `mine` is true on any rank; all ranks call it together."""
        if self.world == 1:
            return mine
        flag = torch.tensor([float(mine)], device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag.item() > 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def all(self, mine: Any) -> list[Any]:
        """Return what each rank has, by rank."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def firsts(self, mine: Any) -> Any:
        """Return what the first rank has."""
        if self.world == 1:
            return mine
        shared = [mine]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]


ALONE = Ranks()


def is_first() -> bool:
    """Return whether this process speaks to the user, before or after the group is there."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def process_group(with_group: bool) -> Iterator[Ranks]:
    """Join the processes that torchrun has started. with_group: alone, too, a process group is
    made.
    """
    started = (
        "TORCHELASTIC_RUN_ID" in os.environ
        or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    )
    if not (started or with_group) or dist.is_initialized():
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if started:
        ranks = Ranks(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_RANK", 0)),
        )
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        ranks = ALONE
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield ranks
        dist.barrier()  # who leaves while others still talk may be torn down with them
    finally:
        leave()


def leave() -> None:
    """Destroy the process group.

    Its threads need Python's lock to let go of the last tensors, and whoever destroys the group
    holds that lock while it waits for them: so they get their time before, and DDP, which holds on
    to the group, goes first.
    """
    gc.collect()
    time.sleep(LAST_TENSORS)
    dist.destroy_process_group()


def launch(arguments: Sequence[str], processes: int, restarts: int) -> None:
    """Run `python -m fastlt ARGUMENTS` in as many processes on this machine by torch's elastic
    launcher.

    All are started again, up to `restarts` times, where one dies; not for bad input, which ends
    this process with code 2.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_PATIENCE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        run_id=secrets.token_hex(8),
    )
    for left in reversed(range(restarts + 1)):
        try:
            elastic_launch(config, sys.executable)("-m", "fastlt", *arguments)
            return
        except SignalException:
            return  # the processes got the signal, and have said what became of the run
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            if BAD_INPUT in codes:
                sys.exit(BAD_INPUT)
            _, first = error.get_first_failure()  # the others were ended for its sake
            if not left:
                raise UserError(
                    f"a process of the training has died again (exit code {first.exitcode}): see "
                    "its output above"
                ) from error
            print(
                f"a process has died (exit code {first.exitcode}): all are started again, {left} "
                "times at most",
                flush=True,
            )
