"""Time of imports, each in a fresh process.

The milliseconds that SING adds to the second or more of ``import torch`` are below what two processes differ by. So
they are timed by themselves, too, and that is the number with a target: in a process without autoload, what ``import
torch`` would do at its end. Its search for entry points is torch's own, whether SING is installed or not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.settings import Settings
from benchmarks.timing import Row, in_turn, quartiles

ROOT = Path(__file__).resolve().parents[1]
SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
NO_CACHE = "PYTHONDONTWRITEBYTECODE"  # an installed package has its bytecode; a checkout gets it in the first process
CODE = """
import json, sys, time
def measure(code):
    wall, process = time.perf_counter(), time.process_time()
    exec(code, {})
    return [time.perf_counter() - wall, time.process_time() - process]
print(json.dumps(list(map(measure, sys.argv[1:]))))
"""

PLUGINS, ADDED = "import sing_plugins after torch", "what SING adds to import torch"
PROCESSES = {  # autoload -> what is timed, one after the other in one process
    "1": {
        "import torch": "import torch",
        PLUGINS: "from sing_plugins import SING, create_optimizer, param_groups, wrap",
    },
    "0": {
        "import torch without autoload": "import torch",
        "torch's search for entry points": "import importlib.metadata as m; m.entry_points(group='torch.backends')",
        ADDED: "import sing_torch_entry_point as entry; entry.install()",
    },
}


def measure(settings: Settings) -> Iterator[Row]:
    """A row for everything that is timed."""
    works = {autoload: partial(seconds_of, autoload, list(codes.values())) for autoload, codes in PROCESSES.items()}
    for autoload, rounds in in_turn(works, rounds=settings.import_rounds).items():
        for name, times in zip(PROCESSES[autoload], zip(*rounds, strict=True), strict=True):
            wall, process = zip(*times, strict=True)
            yield {
                "import": name,
                "milliseconds": quartiles([1000 * value for value in wall]),
                "process_milliseconds": quartiles([1000 * value for value in process]),
                "rounds": len(times),
            }


def seconds_of(autoload: str, codes: list[str]) -> list[tuple[float, float]]:
    """Wall time and process time of running each piece of code, in a fresh process with or without autoload."""
    child = subprocess.run(
        [sys.executable, "-c", CODE, *codes],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != NO_CACHE} | {SWITCH: autoload},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [(wall, process) for wall, process in json.loads(child.stdout)]
