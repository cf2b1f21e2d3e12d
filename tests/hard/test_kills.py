"""Trainings that are killed at random and resumed end bit for bit as those that were not; half a checkpoint is refused.

In Trainer and Accelerate this file is the training script; in fairseq it is ``fairseq_cli.train``.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

STEPS = 44
TESTS = Path(__file__).parents[1]
Restore = Path | None

# --- the trainings: with dropout, and a checkpoint after every step


def train_in_trainer(folder: Path, restore: Restore) -> None:
    from test_with_transformers import bert, trainer

    options: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    trainer(folder, "sing_adamw", bert(0.1), **options).train(resume_from_checkpoint=str(restore) if restore else None)


def train_in_accelerate(folder: Path, restore: Restore, dropout: float = 0.5) -> None:
    """Saves beside, then renames: a kill before the random states, which come last, would else go unnoticed."""
    from test_with_accelerate import OPTIONS, digits, loss_of, new_accelerator

    import sing_accelerate

    accelerator = new_accelerator()
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Dropout(dropout), nn.Linear(32, 10))
    model.double()
    optimizer = sing_accelerate.create_optimizer(accelerator, model, "sing_adamw", **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if restore:
        accelerator.load_state(str(restore))
    data = digits()
    for step in range(int(restore.name) if restore else 0, STEPS):
        rows = torch.arange(16 * step, 16 * step + 16) % len(data)
        accelerator.backward(loss_of(model, data[rows]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print("step", step + 1)
        accelerator.save_state(str(folder / "saving"))
        (folder / "saving").rename(folder / str(step + 1))


def states_of_trainer(checkpoint: Path) -> tuple[Any, Any]:
    return load_file(checkpoint / "model.safetensors"), torch.load(checkpoint / "optimizer.pt")


def states_of_accelerate(checkpoint: Path) -> tuple[Any, Any]:
    return load_file(checkpoint / "model.safetensors"), torch.load(checkpoint / "optimizer.bin")


def states_of_fairseq(checkpoint: Path) -> tuple[Any, Any]:
    from test_with_fairseq import weights

    saved = torch.load(checkpoint, weights_only=False)
    assert saved["optimizer_history"][-1]["optimizer_name"] == "FairseqSING"
    return weights(saved["model"]), saved["last_optimizer_state"]


@dataclass(frozen=True)
class Framework:
    """How to start a training in a process of its own, and what it leaves behind."""

    kills: int
    step: float  # about how many seconds a step and its checkpoint take
    progress: str  # a line of its output says so after every step, before that step is saved
    checkpoint: str  # a pattern; the last number in a name is the step
    states: Callable[[Path], tuple[Any, Any]]
    refusals: str  # the errors of a checkpoint that it has not finished


NONE = "(?!)"  # matches nothing
FRAMEWORKS = {
    "trainer": Framework(
        kills=7,
        step=0.1,
        progress=r"^\{'loss'",
        checkpoint="checkpoint-*",
        states=states_of_trainer,
        refusals="trainer_state.json|Can't find a valid checkpoint|JSONDecodeError|SafetensorError",
    ),
    "fairseq": Framework(
        kills=7,
        step=0.03,
        progress=r'"num_updates": "\d+"',
        checkpoint="checkpoint_[0-9]*_*.pt",
        states=states_of_fairseq,
        refusals=NONE,  # it writes beside and renames, too
    ),
    "accelerate": Framework(
        kills=6,
        step=0.01,
        progress="^step",
        checkpoint="[0-9]*",
        states=states_of_accelerate,
        refusals=NONE,
    ),
}


def step_of(checkpoint: Path) -> int:
    return int(re.findall(r"\d+", checkpoint.name)[-1])


def checkpoints(name: str, folder: Path) -> list[Path]:
    """The newest is the last."""
    return sorted(folder.glob(FRAMEWORKS[name].checkpoint), key=step_of)


def command(name: str, folder: Path, restore: Restore, data: str) -> list[str]:
    if name != "fairseq":
        return [sys.executable, "-u", __file__, name, str(folder), *([str(restore)] if restore else [])]
    from test_with_fairseq import SCHEDULE, TINY

    # 64 sentences in batches of 8 are 8 updates an epoch, and the last of an epoch has no checkpoint with its number.
    how = f"--max-update {STEPS} --save-interval-updates 1 --no-epoch-checkpoints --update-epoch-batch-itr True"
    told = "--log-format json --log-interval 1 --dropout 0.1 --optimizer sing --save-dir"
    given = [data, *TINY, *SCHEDULE, *how.split(), *told.split(), str(folder)]
    given += ["--restore-file", str(restore)] if restore else []
    return [sys.executable, "-m", "fairseq_cli.train", *given]


@dataclass
class Ended:
    """How a process ended: by itself with a return code, or killed (-9)."""

    code: int
    steps: int
    output: str


def run(command: list[str], progress: str, kill: tuple[int, float] | None = None) -> Ended:
    """Run; with ``kill``, kill it so many steps and then seconds after it has begun to train."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd="/"
    )
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    steps, lines = 0, []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        steps += bool(re.search(progress, line))
        if kill and steps == kill[0]:
            time.sleep(kill[1])
            process.kill()
            kill = None
    watchdog.cancel()
    return Ended(process.wait(), steps, "".join(lines))


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        items: Iterable[tuple[Any, Any, Any]] = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        items = zip(range(len(one)), one, other, strict=True)
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, where
        return
    for key, a, b in items:
        assert_equal(a, b, f"{where}.{key}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    from test_with_fairseq import corpus

    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: str) -> Callable[[str], Path]:
    """The folder of a training in a framework that nobody has killed."""

    @functools.cache
    def trained(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        ended = run(command(name, folder, None, data), FRAMEWORKS[name].progress)
        assert (ended.code, ended.steps) == (0, STEPS), ended.output
        return folder

    return trained


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_training_killed_at_random_ends_as_one_that_was_not(
    name: str, whole: Callable[[str], Path], data: str, tmp_path: Path
) -> None:
    framework = FRAMEWORKS[name]
    chance = random.Random(name)
    points = sorted(chance.sample(range(1, STEPS - 8), framework.kills))
    kills, refused, places = 0, 0, []
    while True:
        found = checkpoints(name, tmp_path)
        begun = step_of(found[-1]) if found else 0
        kill = None
        if kills < framework.kills:
            kill = max(points[kills] - begun, 1), chance.uniform(0, 1.5 * framework.step)
        ended = run(command(name, tmp_path, found[-1] if found else None, data), framework.progress, kill)
        if ended.code == -9:
            kills += 1
            places.append((begun, begun + ended.steps))
        elif ended.code == 0:
            break
        else:  # killed while this checkpoint was saved: it says so, and the one before is the newest
            assert re.search(framework.refusals, ended.output), ended.output
            assert not ended.steps, ended.output
            refused += 1
            shutil.rmtree(found[-1])
    assert kills == framework.kills
    print(f"{name}: killed at (resumed, reached) {places}; half a checkpoint {refused} times")
    last, expected = (checkpoints(name, folder)[-1] for folder in (tmp_path, whole(name)))
    assert last.name == expected.name
    assert_equal(framework.states(last), framework.states(expected))


# --- half a checkpoint

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "empty": lambda content: b"",
}
TORCHS = (RuntimeError, EOFError, OSError)
ERRORS: dict[str, type[Exception] | tuple[type[Exception], ...]] = {
    ".safetensors": SafetensorError,
    ".json": json.JSONDecodeError,
    **dict.fromkeys((".pt", ".pth", ".bin"), TORCHS),
}
HARMLESS = [("trainer_state.json", "one byte short"), ("config.json", "one byte short")]  # the last is a new line
TRAINER = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json")
ACCELERATE = ("model.safetensors", "optimizer.bin", "scheduler.bin")
FILES = [*(("trainer", file) for file in TRAINER), *(("accelerate", file) for file in ACCELERATE)]


def damaged(name: str, undisturbed: Path, to: Path, file: str, damage: Callable[[bytes], bytes]) -> Path:
    """A copy of a checkpoint four steps before the end, with a file that is not whole."""
    (saved,) = (found for found in checkpoints(name, undisturbed) if step_of(found) == STEPS - 4)
    copied = shutil.copytree(saved, to / saved.name)
    whole = (copied / file).read_bytes()
    (copied / file).write_bytes(damage(whole))
    return copied


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_file_that_was_not_written_to_the_end_is_refused_or_makes_no_difference(
    name: str, file: str, how: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    framework, folder = FRAMEWORKS[name], tmp_path / "resumed"
    folder.mkdir()
    checkpoint = damaged(name, whole(name), tmp_path, file, DAMAGES[how])
    if (file, how) in HARMLESS:
        TRAININGS[name](folder, checkpoint)
        ours, expected = (framework.states(checkpoints(name, at)[-1]) for at in (folder, whole(name)))
        assert_equal(ours, expected)
    else:
        with pytest.raises(ERRORS[checkpoint.joinpath(file).suffix]):
            TRAININGS[name](folder, checkpoint)
        assert not checkpoints(name, folder)


def test_trainer_reads_last_written_first(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Without its optimizer.pt a checkpoint is resumed with a new optimizer, so this file must be what is missing."""
    checkpoint = damaged("trainer", whole("trainer"), tmp_path, "trainer_state.json", DAMAGES["empty"])
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        train_in_trainer(tmp_path / "resumed", checkpoint)


@pytest.mark.parametrize("how", DAMAGES)
def test_accelerate_without_random_states_still_has_weights_and_optimizer(how: str, tmp_path: Path) -> None:
    """It says so at the level INFO only; a model without dropout then ends as it would have."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    train_in_accelerate(tmp_path / "whole", None, dropout=0.0)
    checkpoint = damaged("accelerate", tmp_path / "whole", tmp_path, "random_states_0.pkl", DAMAGES[how])
    train_in_accelerate(tmp_path / "resumed", checkpoint, dropout=0.0)
    ours, expected = (states_of_accelerate(tmp_path / folder / str(STEPS)) for folder in ("resumed", "whole"))
    assert_equal(ours, expected)


@pytest.mark.parametrize("how", DAMAGES)
def test_fairseq_refuses_half_a_checkpoint(how: str, whole: Callable[[str], Path], data: str, tmp_path: Path) -> None:
    """Of the file that it takes without being told: a copy, which it does not write beside and rename."""
    content = (whole("fairseq") / "checkpoint_last.pt").read_bytes()
    (tmp_path / "checkpoint_last.pt").write_bytes(DAMAGES[how](content))
    ended = run(command("fairseq", tmp_path, None, data), FRAMEWORKS["fairseq"].progress)
    assert (ended.code, ended.steps) == (1, 0), ended.output
    assert re.search("PytorchStreamReader|EOFError", ended.output), ended.output


TRAININGS = {"trainer": train_in_trainer, "accelerate": train_in_accelerate}

if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    torch.set_num_threads(1)
    TRAININGS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
