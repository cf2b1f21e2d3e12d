"""Train a small real model by name with AdamW and twice with SING through each of the four frameworks.

    python recipes/demo/run.py

Ends with a table, and with a picture of the loss curves and all numbers in ``demo/``. The exit code is 0 if each
framework trained with SING, which is read off the optimizer that trained and not off the name that was asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder

from recipes.demo import data  # noqa: E402
from recipes.demo.plan import PLAN, Choice, Train  # noqa: E402
from recipes.demo.report import Run, draw, problems, table, write_json  # noqa: E402
from recipes.machinery.progress import Progress  # noqa: E402

THREADS = 2
# The same run everywhere: no accelerator, no hub. Threads that wait give way soon: by default they keep a core busy,
# and where another program runs too, a step takes twenty times as long.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "1000",
}
WITH_WHEELS = frozenset({"Transformers", "fairseq"})


@contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Send everything that this process and its children print to a file: the frameworks have much to say."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with file.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def carry_out(
    framework: str, choices: list[Choice], folder: Path, progress: Progress, steps: int | None = None
) -> list[Run]:
    """Train once with each choice, for ``steps`` or else the part's own number of them.

    What goes wrong is recorded, and its traceback is in the log.
    """
    log = folder / "logs" / f"{framework.lower()}.log"
    runs: list[Run] = []
    progress.say(f"{framework}: preparing")
    try:
        with output_to(log):
            part = import_module(f"recipes.demo.with_{framework.lower()}")
            train: Train = part.prepare(folder)
    except Exception as error:
        record(log)
        progress.say(f"{framework} failed: {error!r}; see {log}")
        return []
    for choice in choices:
        run = Run(framework, part.WORKLOAD, part.METRIC, choice.label, choice.lr, choice.weight_decay)
        runs.append(run)
        title = f"{framework}, {run.optimizer}, lr {run.lr:g}"

        def on_step(step: int, total: int, loss: float, run: Run = run, title: str = title) -> None:
            run.losses.append(loss)
            run.step_ends.append(time.monotonic())
            progress.step(title, step, total, loss)

        progress.say(f"{title}: {run.workload}")
        try:
            with output_to(log):
                run.outcome = train(choice, on_step, steps or part.STEPS)
        except Exception as error:
            record(log)
            run.error = f"{error!r}; see {log}"
            progress.say(f"{title} failed: {run.error}")
    return runs


def record(log: Path) -> None:
    """Add the traceback of the exception at hand to a log."""
    with log.open("a") as file:
        traceback.print_exc(file=file)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="+", choices=PLAN, default=list(PLAN), help="default: all four")
    parser.add_argument("--look", action="store_true", help="train with every learning rate that was looked at")
    parser.add_argument("--steps", type=int, metavar="N", help="train for N steps only, to see whether all works")
    parser.add_argument("--output", type=Path, default=ROOT / "demo", metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    folder = options.output.resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)

    os.environ.update(ENVIRONMENT)
    import torch

    torch.set_num_threads(THREADS)
    if WITH_WHEELS.intersection(options.frameworks):
        data.fetch(folder / "wheels")  # now, so that a missing network is known before anything has trained

    with open(os.dup(1), "w") as stream:
        progress = Progress(stream)
        runs = [
            run
            for framework in options.frameworks
            for run in carry_out(framework, choices(framework, options.look), folder, progress, options.steps)
        ]
        progress.say("done")
    write_json(
        runs, folder / ("look.json" if options.look else "results.json"), torch=torch.__version__, threads=THREADS
    )
    if runs and not options.look:
        draw(runs, folder / "losses.png")
    print(f"\n{table(runs, 'valid' if options.look else 'test')}\n\nNumbers, picture and logs are in {folder}.")
    wrong = problems(runs, options.frameworks)
    print("\n".join(["FAILED:", *wrong] if wrong else ["Each framework trained with SING."]))
    return 1 if wrong else 0


def choices(framework: str, look: bool) -> list[Choice]:
    """What is trained with in a framework; with ``look`` at each of the learning rates."""
    if not look:
        return list(PLAN[framework])
    return [replace(choice, lr=lr) for choice in PLAN[framework] for lr in choice.looked_at]


if __name__ == "__main__":
    sys.exit(main())
