"""How a run is asked to stop: SIGINT (Ctrl-C), SIGTERM (a cluster's notice), SIGUSR1 (Slurm), at any moment, and again.

While it trains, a signal lets the step end; the run is then saved, once, and leaves with 0. At any other moment there
is nothing to save, and one process leaves at once, with 0 too. Several processes always wait for the step: all of them
must leave together.
"""

import os
import signal
import sys
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

asked = False                                               # a signal has come
waits = int(os.environ.get("WORLD_SIZE", 1)) > 1            # somebody looks at `asked`, and will leave by himself
said = "stopped before the first step; the same command starts again"


def install() -> dict:
    """From now on; returns the handlers that were there. Loads nothing: it can come before torch does."""
    return {number: signal.signal(number, handle) for number in SIGNALS}


def restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def handle(number: int, frame: FrameType | None) -> None:
    global asked
    asked = True
    if not waits:
        print(said, flush=True)
        sys.exit(0)


def wait(on: bool, then: str = "") -> None:
    """on: a signal only notes itself, in `asked`. off: it ends the process, with `then` as its last words."""
    global waits, said, asked
    waits, asked, said = on, asked and on, then or said
