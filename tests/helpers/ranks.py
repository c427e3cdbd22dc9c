"""A group of gloo processes that lives as long as a test module and runs functions of it, one after
another.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


class Ranks:
    """`run(function, *args)` calls function(rank, world, *args) on every rank and returns what each
    returned.
    """

    def __init__(self, world: int, folder: Path) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["fastlt_kernels"])  # with torch, once for all
        self.ends, self.processes = [], []
        for rank in range(world):
            end, other = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, str(folder / f"meet-{world}"), other), daemon=True
            )
            process.start()
            self.ends.append(end)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a rank raised is returned in its place if all raised, else raised here."""
        for end in self.ends:
            end.send_bytes(pickle.dumps((function, args)))
        results = [pickle.loads(end.recv_bytes()) for end in self.ends]
        errors = [result for result in results if isinstance(result, Exception)]
        if errors and len(errors) < len(results):
            raise errors[0]
        return results

    def get(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`run`, where an error is one of the test."""
        results = self.run(function, *args)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world: int, meeting: str, end: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory holds NaN
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    while True:
        function, args = pickle.loads(end.recv_bytes())
        try:
            result = function(rank, world, *args)
        except Exception as error:
            result = error
        try:
            end.send_bytes(pickle.dumps(result))
        except Exception:
            end.send_bytes(pickle.dumps(RuntimeError(repr(result))))
