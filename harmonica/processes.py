"""Several processes: one training run on several GPUs or machines, as torchrun starts them.

    torchrun --nproc-per-node 4 -m harmonica.train --model dit-xl --device cuda

    world    number of processes
    rank     this process's number, 0 … world − 1; rank 0 alone writes files and shows progress
    part     the samples of one rank: rank, rank + world, rank + 2·world, … of the joint batch

Every rank draws the noise of the joint batch from the same generator, and keeps its part. So the
generator has the same state everywhere, and a checkpoint fits any number of processes. Ranks
exchange only a row's gradient, a loss and λ.

Alone, or where torch was built without torch.distributed, every function here does nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from harmonica.values import check_rows, require

T = TypeVar("T")


def started_as() -> tuple[int, int]:
    """Return (rank, world) as torchrun's environment has them, (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def processes(device: str = "cpu") -> Iterator[torch.device]:
    """Join the processes that torchrun started until the `with` ends, and give this one's device.

    Under torchrun `device` is "cpu" (gloo) or "cuda" (nccl: each process takes cuda:LOCAL_RANK;
    ValueError if there are too few). Alone it is anything that torch knows.
    """
    if started_as()[1] == 1:
        yield torch.device(device)
        return
    todo = "say 'cuda' (each takes its own GPU) or 'cpu'"
    require(device in ("cpu", "cuda"), f"device is {device!r} for several processes; {todo}")
    mine = torch.device(device)
    if device == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        lacks = f"process {local} of this machine has no GPU, there are {count}"
        require(local < count, f"{lacks}; start at most {count} here")
        mine = torch.device("cuda", local)
        torch.cuda.set_device(mine)  # nccl talks from the current one
    # Loading a model imports this module, whose functions have the group as a default argument. So
    # if it were imported later, the group's threads would live on, and kill Python at its end.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo")
    ended_well = False
    try:
        yield mine
        ended_well = True
    finally:
        if ended_well or mine.type == "cpu":  # the end of nccl waits for all, even for a failed one
            dist.destroy_process_group()


def rank() -> int:
    """Return this process's number; 0 when alone."""
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """Return the number of processes; 1 when alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def progress_bar(shown: bool, **how: Any) -> Any:
    """Return a bar of tqdm, which rank 0 alone shows, and only where stderr is a terminal."""
    from tqdm.auto import tqdm

    return tqdm(disable=None if shown and rank() == 0 else True, **how)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean over the processes, the same bits on each; alone, the tensor itself."""
    if world() == 1:
        return value
    on_gpu = dist.get_backend() == "nccl"  # which refuses tensors of the CPU
    total = value.detach().to("cuda" if on_gpu else value.device, copy=True)
    dist.all_reduce(total)
    return (total / world()).to(value.device)


def from_rank_0(make: Callable[[], T]) -> T:
    """Return on every rank what `make` returns on rank 0, which alone calls it once all are here;
    what it raises, every rank raises. Tensors should be on the CPU.
    """
    if world() == 1:
        return make()
    dist.barrier()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # whatever it is, the others must hear of it
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def batch_per_rank(batch_size: int) -> int:
    """Return how many samples of a joint batch each process takes, or raise ValueError."""
    n = world()
    given = f"batch_size is {batch_size} for {n} processes in all"
    require(batch_size % n == 0, f"{given}; make it a multiple of {n}")
    return batch_size // n


def local_part(batch: Any, batch_size: int) -> Any:
    """Return this process's share of a joint batch, a tree of tensors with batch_size rows."""
    if world() == 1:
        return batch
    check_rows("the batch that processes share", batch, batch_size)
    take = lambda value: value[rank() :: world()].contiguous()  # noqa: E731
    return tree_map_only(Tensor, take, batch)
