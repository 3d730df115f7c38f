"""How studies take the time of a piece of work."""

import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm


def seconds(work: Callable, device: torch.device) -> float:
    """Of one call, the queue of this GPU included."""
    wait = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def in_turn(works: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Medians of the seconds of each: every round calls all of them, after a first one that does not count."""
    times = {name: [] for name in works}
    for number in tqdm(range(rounds + 1), desc="measuring", leave=False, disable=len(works) == 1):
        for name, work in works.items():
            taken = seconds(work, device)
            if number:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}
