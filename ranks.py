"""Several processes as one: torchrun starts them, one for each GPU; python starts a single one. No flag differs.

The global batch belongs to the run. Process r of W trains rows r B/W .. (r+1) B/W of it, in micro-batches when they do
not fit at once; every loss is divided by the GLOBAL number of rows, so gradients are summed, never averaged, and
1 process and 8 compute the same step.

    torchrun --nproc_per_node=8 train.py ...                        one node
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...
"""

import hashlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  (before a group exists: see Ranks.stop)
from torch.distributed.rendezvous import rendezvous

from config import UserError

T = TypeVar("T")                                            # whatever the processes hand on

# A process that hangs ends the others after this long. One that dies ends them at once: torchrun stops them.
TIMEOUT = timedelta(minutes=float(os.environ.get("LAPFLOW_TIMEOUT_MINUTES", 30)))


def best_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best there is. Raises UserError when it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as problem:
        raise UserError(f"the device {name!r} cannot be used: {str(problem).splitlines()[0]}") from None


@dataclass
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None = None) -> "Ranks":
        """Joins the processes that torchrun started, or stays alone. NCCL on GPUs, gloo on CPUs."""
        if "RANK" not in os.environ:
            return cls(0, 1, best_device(device))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device and ":" in device:
            raise UserError(f"torchrun gives every process a GPU of its own: leave out --device {device}")
        if device in (None, "cuda") and torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise UserError(f"torchrun started a process for GPU {local}, but this machine has "
                                f"{torch.cuda.device_count()}: lower --nproc_per_node")
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        device = best_device(device)
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT,
                                store=fresh_part(store, rank, world), rank=rank, world_size=world)
        return cls(rank, world, device)

    def stop(self) -> None:
        """Ends the group and its threads, which need a living interpreter to drop their last tensor.

        torch.distributed.nn keeps the group that there is when it is imported (as default arguments), and
        torch.compile imports it: hence the import above. One exit in thirty aborted without it.
        """
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """The process that prints, saves and scores."""
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """True in all processes when it is in one. Goes over the CPU: the GPU's queue is not waited for."""
        return bool(self.sum(torch.tensor(float(flag))).item()) if self.world > 1 else flag

    def least(self, value: float) -> float:
        """The smallest of all processes' values."""
        value = torch.tensor(value, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return value.item()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order, for the first one; the others get []."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.first else None
        dist.gather_object(value, values)
        return values or []

    def share(self, value: T) -> T:
        """The first process's value, for all."""
        values = [value if self.first else None]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        self.any(False)

    def first_does(self, work: Callable[[], T]) -> T | None:
        """The first process works and the others wait; when it fails, it says why and all end. Returns its result."""
        result = problem = None
        if self.first:
            try:
                result = work()
            except UserError as error:
                problem = error
        if self.any(problem is not None):
            raise problem or SystemExit(1)
        return result

    def rows(self, batch: int, micro_batch: int) -> list[slice]:
        """The micro-batches of this process: slices of the global batch, at most micro_batch rows each (0: all).

        Raises UserError when the processes cannot share the batch equally.
        """
        if batch % self.world:
            fits = max(w for w in range(1, self.world + 1) if batch % w == 0)
            raise UserError(f"a batch of {batch} images cannot be shared equally by {self.world} processes: start "
                            f"{fits} of them, or choose another --batch")
        share = batch // self.world
        parts = -(-share // (micro_batch or share))         # as equal as they can be
        edges = [self.rank * share + share * i // parts for i in range(parts + 1)]
        return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def fresh_part(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of torchrun's store that belongs to the processes of this attempt.

    torchrun keeps one store over restarts, so a new process may read the address of a dead one there and wait for it
    (pytorch issue 135712). Every process posts a new name; they agree when all have seen the same names, new ones.
    """
    store.set(f"lapflow/name/{rank}", uuid.uuid4().hex)
    while True:
        seen = "".join(store.get(f"lapflow/name/{r}").decode() for r in range(world))
        seen = hashlib.sha256(seen.encode()).hexdigest()
        store.set(f"lapflow/seen/{rank}", seen)
        if all(store.get(f"lapflow/seen/{r}").decode() == seen for r in range(world)):
            return dist.PrefixStore(seen, store)
        time.sleep(0.02)


class GradientSync:
    """Sums the gradients of all processes while backward is still computing the earlier layers.

    A coarse stage leaves the finer bands' weights without gradients. torch's DistributedDataParallel would wait for
    them for ever, or search the graph for them at each step (find_unused_parameters). Here nobody needs to search: all
    processes train the same stage at the same step, so which gradients exist depends on the stage alone. It is learnt
    in the first backward of each stage; from then on the gradients of a module travel, in one piece and in a
    fixed order, as soon as its last one is there. Weights without a gradient cost nothing: they are not sent, and the
    optimizer skips them.
    """

    BUCKET = 2**25                                          # bytes to send at once, at least

    def __init__(self, model: torch.nn.Module, ranks: Ranks):
        self.ranks, self.parameters = ranks, list(model.parameters())[::-1]         # roughly in the order of backward
        self.known, self.handles = {}, []                   # stage -> buckets, lists of parameters
        if ranks.world > 1:
            for parameter in self.parameters:
                dist.broadcast(parameter.data, 0)           # all start from the same weights
                parameter.register_post_accumulate_grad_hook(self.arrived)
        self.buckets, self.waiting, self.next = None, {}, 0

    def expect(self, stage: int, last: bool) -> None:
        """Before a backward. last: gradients are complete after it, and may travel."""
        self.stage = stage
        self.buckets = self.known.get(stage) if last else None
        if self.buckets:
            self.waiting = {id(p): b for b, bucket in enumerate(self.buckets) for p in bucket}
            self.missing, self.next = [len(bucket) for bucket in self.buckets], 0

    def arrived(self, parameter: torch.nn.Parameter) -> None:
        """The gradient of one parameter is complete."""
        if not self.buckets:
            return
        self.missing[self.waiting[id(parameter)]] -= 1
        while self.next < len(self.buckets) and self.missing[self.next] == 0:       # the same order everywhere
            self.send(self.buckets[self.next])
            self.next += 1

    def send(self, bucket: list) -> None:
        flat = torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in bucket])
        self.handles.append((dist.all_reduce(flat, async_op=True), flat, bucket))

    def finish(self) -> None:
        """After the last backward of a step: every gradient is the sum over the processes."""
        if self.ranks.world == 1:
            return
        if self.stage not in self.known:
            self.known[self.stage] = self.buckets = self.learn()
            self.next = 0
        for bucket in self.buckets[self.next :]:
            self.send(bucket)
        for handle, flat, bucket in self.handles:
            handle.wait()
            for parameter, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = grad.view_as(parameter)
        self.handles, self.buckets = [], None

    def learn(self) -> list[list]:
        """The parameters that have a gradient in some process, in buckets."""
        there = torch.tensor([float(p.grad is not None) for p in self.parameters])
        buckets, size = [[]], 0
        for parameter, count in zip(self.parameters, self.ranks.sum(there).tolist(), strict=True):
            if count:
                buckets[-1].append(parameter)
                size += parameter.numel() * parameter.element_size()
                if size >= self.BUCKET:
                    buckets.append([])
                    size = 0
        return [bucket for bucket in buckets if bucket]
