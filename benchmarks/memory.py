"""Memory of an optimizer: bytes a parameter of its state, and of what a step needs beyond it for a while.

On a CPU that is the peak of the resident memory of a process of its own (``python -m benchmarks.memory``), in which the
allocator gives back at once what it no longer needs; Linux only. On CUDA it is what torch's allocator reports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.optim import Optimizer

from benchmarks.optimizers import (
    ADAMW_FOREACH,
    CYCLE,
    DEFAULT,
    HARD,
    NO_LOOKAHEAD,
    OPTIMIZERS,
    NotMeasuredError,
    parameters,
)
from benchmarks.settings import Settings
from benchmarks.shapes import Shapes, entries
from benchmarks.timing import Row, release, synchronize

ROOT = Path(__file__).resolve().parents[1]
WITH_TARGET = (DEFAULT, HARD, NO_LOOKAHEAD, ADAMW_FOREACH)
PEAK = Path("/proc/self/clear_refs")  # where the peak is reset
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure(settings: Settings) -> Iterator[Row]:
    """A row for each model and optimizer; none where the device's memory cannot be measured."""
    if settings.device == "cpu" and not PEAK.exists():
        return
    for number, (model, shapes) in enumerate(settings.memory_models.items()):
        names = tuple(OPTIMIZERS) if settings.every_memory and not number else WITH_TARGET
        for name, row in zip(names, in_child(names, shapes, settings), strict=True):
            yield {"model": model, "optimizer": name, **row}


def in_child(names: tuple[str, ...], shapes: Shapes, settings: Settings) -> Iterator[Row]:
    """The rows of :func:`memory_of`, from a fresh process."""
    asked = {"names": names, "shapes": shapes, "device": settings.device, "threads": settings.threads}
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"],
        cwd=ROOT,
        env={**os.environ, **MALLOC},
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return map(json.loads, child.stdout.splitlines())


def memory_of(name: str, shapes: Shapes, device: str) -> Row:
    """Bytes a parameter: ``state_bytes``, and ``transient_bytes`` at the peak of a Lookahead cycle."""
    maker, count = OPTIMIZERS[name], entries(shapes)
    try:
        if maker.taken(shapes, device) != shapes:
            raise NotMeasuredError("does not take all tensors")
        optimizer = maker(parameters(shapes, device))
    except NotMeasuredError as why:
        return {"skipped": str(why)}

    def cycle() -> None:
        for _ in range(CYCLE):
            optimizer.step()
        synchronize(device)

    cycle()  # makes the state
    release(device)
    peak = peak_of(cycle, device) / count
    return {"state_bytes": round(state_bytes(optimizer) / count, 3), "transient_bytes": round(max(peak, 0.0), 3)}


def peak_of(work: Callable[[], object], device: str) -> int:
    """Bytes that doing ``work`` holds at most, beyond those that are held before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    PEAK.write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps."""
    states = optimizer.state_dict()["state"].values()
    return sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))


def main() -> None:
    """Of the request on the standard input, one row a line."""
    asked = json.load(sys.stdin)
    torch.manual_seed(0)
    torch.set_num_threads(asked["threads"])
    shapes = [tuple(shape) for shape in asked["shapes"]]
    for name in asked["names"]:
        print(json.dumps(memory_of(name, shapes, asked["device"])), flush=True)
        release(asked["device"])


if __name__ == "__main__":
    main()
