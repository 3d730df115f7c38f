"""A faster network for sampling: weights in bfloat16, converted once, and CUDA graphs.

Autocast converts every weight at every call, and at batch 1 a GPU waits for Python, which starts a thousand kernels for
each pass. A CUDA graph is a recording of those kernels: one start replays them all, on the memory of the recording.
`speed_up` puts both into a trained run, in place. Converting the weights changes no bit of the images (a test shows it,
on a CPU). The recordings stay with the network, so that many calls pay for them once.
"""

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from config import first_line
from model import TimestepEmbedder
from run import ranks
from run.load import Run, compile_blocks

LARGEST = 64                                                # recordings kept; the oldest goes first


def to_bfloat16(model: nn.Module) -> None:
    """Converts, in place, the weights that autocast would convert at each call.

    Not those of the time embedding, which computes in float32, and of the patch embeddings: DFM adds their biases
    alone.
    """
    excluded = set()
    for name, module in model.named_modules():
        if isinstance(module, TimestepEmbedder) or name.split(".")[-1] == "patch_in":
            excluded.update(module.modules())
        if isinstance(module, nn.Linear) and module not in excluded:                # parents come before children
            module.to(torch.bfloat16)


@functools.cache
def side_stream(device: int) -> torch.cuda.Stream:
    """Where work runs before it is recorded: one for each GPU, since libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """The kernels of work(), which gives tensors: recorded once; replay() runs them again and gives the same tensors.

    pool: memory that several recordings share, so their tensors hold until the next replay of any.
    """

    def __init__(self, work: Callable, pool: tuple | None):
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        side = side_stream(torch.cuda.current_device())
        side.wait_stream(stream)
        with torch.cuda.stream(side):                       # not recorded: libraries load, blocks compile
            for _ in range(3):
                work()
        stream.wait_stream(side)
        try:
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.outputs = work()
        finally:
            torch.cuda.set_stream(stream)                   # a failed recording leaves its own
        self.pool = self.graph.pool()

    def replay(self) -> list[Tensor]:
        self.graph.replay()
        return self.outputs


class Recorded:
    """The forward of a model, recorded for each shape of its inputs: for each segment and batch size.

    record: CudaGraph, or a class like it; None: nothing is recorded. When recording fails, this is reported once and
    the model is called as before.
    """

    def __init__(self, model: nn.Module, bfloat16: bool, record: Callable | None):
        self.forward, self.condition, self.bfloat16, self.record = model.forward, model.condition, bfloat16, record
        self.recordings, self.captures, self.pool, self.lock = {}, 0, None, threading.Lock()

    def compute(self, bands: list[Tensor], t: Tensor, y: Tensor | None) -> list[Tensor]:
        # without autocast's cache: a weight that it converts inside a recording would belong to that recording
        with torch.autocast(t.device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False):
            return [v.float() for v in self.forward(bands, t, y)]

    @torch.no_grad()
    def __call__(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        if y is None and self.condition is not None:        # drawn here: a recording cannot copy from the CPU
            y = self.condition.null(self.condition.draw(len(t)).to(t.device))
        if self.record is None:
            return self.compute(bands, t, y)
        inputs = [*bands, t.float()] + ([] if y is None else [y])
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        with self.lock:                                     # threads share the places: the demo's may overlap
            if key not in self.recordings and not self.capture(key, inputs, y is not None):
                return self.compute(bands, t, y)
            places, recording = self.recordings[key]
            for place, x in zip(places, inputs, strict=True):
                place.copy_(x)
            return [v.clone() for v in recording.replay()]

    def capture(self, key: tuple, inputs: list[Tensor], conditional: bool) -> bool:
        """Records one shape; False, and no more recording, when that fails."""
        places = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        (*bands, t), y = (places[:-1], places[-1]) if conditional else (places, None)
        try:
            with torch.cuda.device(t.device) if t.is_cuda else nullcontext():
                recording = self.record(lambda: self.compute(bands, t, y), self.pool)
        except RuntimeError as problem:                     # out of memory is one, too
            warn(f"CUDA graphs cannot be used ({first_line(problem)}): sampling goes on without them")
            self.record = self.pool = None
            self.recordings.clear()
            return False
        self.pool, self.captures = recording.pool, self.captures + 1
        if len(self.recordings) >= LARGEST:
            del self.recordings[next(iter(self.recordings))]
        self.recordings[key] = places, recording
        return True


def speed_up(run: Run, settings: dict, graphs: bool = False, compiled: bool = False,
             record: Callable | None = None) -> dict:
    """Prepares the network of a run, in place: --compile, the precision in `settings`, and with --graphs CUDA graphs.

    What this machine cannot do is reported and left out: returns the settings that remain. A network that is prepared
    already keeps its recordings. record: in place of CudaGraph, for tests.
    """
    device, bfloat16 = run.device, settings["precision"] == "bfloat16"
    if compiled:
        compile_blocks(run.model)
    if bfloat16 and not ranks.has_bfloat16(device):
        warn(f"{torch.cuda.get_device_name(device)} does not compute in bfloat16: sampling in float32")
        bfloat16, settings = False, {**settings, "precision": "float32"}
    if isinstance(run.model.forward, Recorded):
        return settings
    if graphs and not record and device.type != "cuda":
        warn(f"CUDA graphs need a CUDA GPU, and this is {device}: sampling without them")
    elif graphs:
        record = record or CudaGraph
    if bfloat16:
        _ = run.fingerprint                                 # of the weights as they were trained
        to_bfloat16(run.model)
    if bfloat16 or record:
        run.model.forward = Recorded(run.model, bfloat16, record)
    return settings


def warn(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def explained(device: torch.device, batch: int) -> AbstractContextManager:
    """Turns an out-of-memory error of so many images at a time into a UserError."""
    advice = "choose a smaller --batch" if batch > 1 else "add --precision bfloat16, or take a larger device"
    return ranks.within_memory(device, lambda: f"out of memory on {device} with {batch} images at a time: {advice}")
