"""A device whose steps take 20 ms, for benchmarks."""

import ctypes
import time

SECONDS = 0.02


def step(pipe) -> None:
    """Make a step, and keep Python's lock for the rest of the time, as a long step does."""
    start = time.perf_counter()
    pipe.step()
    rest = SECONDS - (time.perf_counter() - start)
    ctypes.PyDLL(None).usleep(max(0, int(rest * 1e6)))
