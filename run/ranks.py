"""Several processes as one, and how they are asked to stop. No flag differs between python and torchrun.

torchrun starts one process for each GPU; python starts a single one. The global batch belongs to the run: process r of
W trains rows r B/W .. (r+1) B/W of it, in equal micro-batches when they do not fit at once, and torch's
DistributedDataParallel averages the gradients. So 1 process and 8 compute the same step, to rounding: that of float32,
or of bfloat16 where the network computes in it, since the gradients then travel in it too.

    torchrun --nproc_per_node=8 train.py ...                        one node
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...
"""

import hashlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  (before a group exists: see Ranks.__exit__)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from config import UserError, explain

# A process that hangs ends the others after this long. One that dies ends them at once: torchrun stops them.
TIMEOUT = timedelta(minutes=float(os.environ.get("LAPFLOW_TIMEOUT_MINUTES", 30)))


def has_bfloat16(device: torch.device) -> bool:
    """False for NVIDIA GPUs before Ampere, which only emulate it."""
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8


def best_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best there is; turns cuDNN attention off. UserError when it cannot be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
    with explain(f"the device {name!r} cannot be used", f"; choose one of {there}", (RuntimeError, AssertionError)):
        torch.zeros(1, device=name).item()
        if name.startswith("cuda"):                         # cuDNN attention's backward gave NaN at lengths like ours,
            torch.backends.cuda.enable_cudnn_sdp(False)     # 64 mod 128 (pytorch issue 196678): flash attention instead
        return torch.device(name)


@contextmanager
def within_memory(device: torch.device | str, failure: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns an out-of-memory error inside the block, of a GPU or of the CPU, into a UserError that says failure()."""
    try:
        yield
    except RuntimeError as problem:
        if not any(sign in str(problem) for sign in ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")):
            raise
        text = f"{device} has too little free memory for this model: choose another --device"
        raise UserError(failure() if failure else text) from None


class StopSignals:
    """A `with` block in which SIGINT (Ctrl-C), SIGTERM (a cluster's notice) and SIGUSR1 (Slurm) ask a run to stop.

    immediate   a signal prints `message` and ends the process with 0: nothing needs saving. Otherwise it only sets
                `asked`: the training loop finishes its step, saves, and returns. Several processes start with False,
                since they must all leave after the same step.
    """

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

    def __init__(self, message: str = "stopped", immediate: bool | None = None):
        self.asked, self.leaving, self.message = False, False, message
        self.immediate = int(os.environ.get("WORLD_SIZE", 1)) == 1 if immediate is None else immediate

    @classmethod
    def ignore(cls) -> None:
        """Outside the block: a second signal must not end a process that is about to leave with 0."""
        for number in cls.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN if self.leaving else handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.immediate:
            self.leaving = True
            self.ignore()
            print(self.message, flush=True)
            sys.exit(0)


@dataclass
class Ranks:
    """This process among its peers: `with Ranks.start(device) as ranks`."""

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

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        """Ends the group and its threads, which need a living interpreter to drop their last tensor.

        torch.distributed.nn keeps the group that exists when it is imported (as default arguments), and torch.compile
        imports it: hence the import above. One exit in thirty aborted without it.
        """
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """The process that prints, saves and scores."""
        return self.rank == 0

    @property
    def restarted(self) -> bool:
        """True when torchrun has started these processes again, after one of them died."""
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

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
        x = torch.tensor(value, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MIN)
        return x.item()

    def gather(self, value: object) -> list:
        """The values of all processes, in their order, for the first one; the others get []."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.first else None
        dist.gather_object(value, values)
        return values or []

    def share(self, value: Any) -> Any:
        """The first process's value, for all."""
        values = [value if self.first else None]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        self.any(False)

    def first_does(self, work: Callable[[], Any]) -> Any:
        """The first process works while the others wait; when it fails, it prints why and all end. Its result."""
        result = problem = None
        if self.first:
            try:
                result = work()
            except UserError as error:
                problem = error
        if self.any(problem is not None):
            raise problem or SystemExit(1)
        return result

    def parallel(self, objective: nn.Module, unused: bool, bfloat16: bool) -> nn.Module:
        """The objective, its gradients averaged over all processes: as bfloat16 they are half the traffic.
        unused: a step may leave weights without gradients."""
        if self.world == 1:
            return objective
        objective = DistributedDataParallel(objective, find_unused_parameters=unused, gradient_as_bucket_view=True)
        objective.broadcast_buffers = False                 # they never change; the argument is deprecated
        if bfloat16:
            # under its own name torch allows it with NCCL only, but gloo does the same
            objective.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        return objective

    def optimizer(self, weights: list[nn.Parameter], shard: bool, **settings) -> torch.optim.Optimizer:
        """AdamW. shard: each of several processes keeps the moments of its share of the weights, and updates those."""
        if self.world == 1 or not shard:
            return torch.optim.AdamW(weights, **settings)
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(weights, torch.optim.AdamW, parameters_as_bucket_view=True, **settings)

    def step(self, optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> None:
        """A step of AdamW, left out when the norm of the gradient is not finite; a fused one is not waited for."""
        if optimizer.defaults["fused"]:                     # it reads found_inf on the device
            getattr(optimizer, "optim", optimizer).found_inf = (~grad_norm.isfinite()).float()
        if optimizer.defaults["fused"] or grad_norm.isfinite():
            optimizer.step()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """The state as a single AdamW has it: whole in the first process, called in all.

        All wait for that. torch's own consolidate_state_dict turns bytes into tensors at 11 MB a second: six minutes
        for L/2."""
        own = getattr(optimizer, "optim", optimizer)        # the AdamW of this process's share of the weights
        if own is optimizer:
            return optimizer.state_dict()
        number = {weight: i for i, weight in enumerate(optimizer.param_groups[0]["params"])}
        shares = self.gather([(number[weight], {name: x.cpu() for name, x in entry.items()})
                              for weight, entry in own.state.items()])
        group = {**own.state_dict()["param_groups"][0], "params": [*number.values()]}
        return {"state": dict(sorted(sum(shares, []))), "param_groups": [group]}

    def restore(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Loads what `optimizer_state` gave, whatever the device and the number of processes were."""
        own, (group,) = getattr(optimizer, "optim", optimizer), state["param_groups"]
        number = {weight: i for i, weight in enumerate(optimizer.param_groups[0]["params"])}
        share = [number[weight] for weight in own.param_groups[0]["params"]]
        group = {**group, "params": [*range(len(share))], "fused": optimizer.defaults["fused"]}
        entries = {place: state["state"][i] for place, i in enumerate(share) if i in state["state"]}
        own.load_state_dict({"state": entries, "param_groups": [group]})

    def rows(self, batch: int, micro_batch: int, least: int = 1) -> list[slice]:
        """The micro-batches of this process: equal slices of the global batch, at most micro_batch rows each (0: all).

        Raises UserError when the processes cannot share the batch equally, or get fewer than `least` rows at a time.
        """
        if batch % self.world:
            fits = max(w for w in range(1, self.world + 1) if batch % w == 0)
            raise UserError(f"a batch of {batch} images cannot be shared equally by {self.world} processes: start "
                            f"{fits} of them, or choose another --batch")
        share = batch // self.world
        size = max(n for n in range(1, min(share, micro_batch or share) + 1) if share % n == 0)
        if size < least:
            raise UserError(f"stratified stages need {least} images at a time in every process, not {size}: fewer "
                            "processes, a larger --micro-batch, or --stages batch")
        first = self.rank * share
        return [slice(row, row + size) for row in range(first, first + share, size)]


def fresh_part(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of torchrun's store that belongs to the processes of this attempt.

    torchrun keeps one store over restarts, so a new process may read the address of a dead one there and wait for it
    (pytorch issue 135712). Every process posts a new name; they agree when all have seen the same names, new ones.
    """
    store.set(f"lapflow/name/{rank}", uuid.uuid4().hex)
    while True:
        names = "".join(store.get(f"lapflow/name/{r}").decode() for r in range(world))
        digest = hashlib.sha256(names.encode()).hexdigest()
        store.set(f"lapflow/seen/{rank}", digest)
        if all(store.get(f"lapflow/seen/{r}").decode() == digest for r in range(world)):
            return dist.PrefixStore(digest, store)
        time.sleep(0.02)
