"""Command lines of the recipes that use Hugging Face's Trainer, squad and swag: configurations against the scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from recipes.machinery import config
from recipes.machinery.trainer import Script, commands
from recipes.tasks.squad.train import SCRIPT as SQUAD
from recipes.tasks.swag.train import SCRIPT as SWAG


@pytest.mark.parametrize(
    ("task", "name", "script"),
    [
        ("squad", "paper", SQUAD),
        ("squad", "small", SQUAD),
        ("swag", "paper", SWAG),
        ("swag", "small", SWAG),
        ("swag", "small-exams", SWAG),
    ],
)
def test_every_optimizer_of_a_configuration_is_a_command_of_the_script(task: str, name: str, script: Script) -> None:
    for label in config.labels(task, name):
        settings = config.load(task, name, label)
        ((python, path, *line),) = commands(script, settings, Path("data"))
        assert (python, path) == ("python", f"recipes/tasks/{task}/train.py")
        assert (config.RECIPES.parent / path).is_file()
        own, trainers = script.parse(line)
        assert isinstance(own, script.arguments)
        assert isinstance(trainers, TrainingArguments)
        assert trainers.optim == settings.optimizer["opt"]
        sings = ",".join(f"{key}={value}" for key, value in settings.optimizer.get("options", {}).items())
        assert sings.startswith("freeze=") == ("sing" in label)
        assert trainers.optim_args == (sings if "sing" in label else None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nmax_lenght = 7", "max_lenght"),
        ("[data]\nshare = 7", "share"),
        ("[optimizer]\nbeta = 7", "beta"),
        ("[model]\nlayers = 7", "layers"),
    ],
)
def test_an_unknown_entry_is_refused_before_anything_is_fetched(tmp_path: Path, text: str, message: str) -> None:
    table = text.partition("\n")[0]
    paper = (config.task_folder("squad") / "configs" / "paper.toml").read_text()
    (tmp_path / "wrong.toml").write_text(paper.replace(f"{table}\n", f"{text}\n"))
    with pytest.raises(ValueError, match=message):
        commands(SQUAD, config.load("squad", str(tmp_path / "wrong.toml")), tmp_path)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ValueError, match=r"train.batch_size: 12\. 5 processes"):
        commands(SQUAD, config.load("squad", "paper"), Path("data"))


@pytest.mark.parametrize("more", [[], ["--dataset", "squad", "--train_file", "x"], ["--train_file", "x"]])
def test_the_script_wants_either_a_data_set_or_both_files(more: list[str]) -> None:
    with pytest.raises(ValueError, match="either --dataset, or both files"):
        SQUAD.parse(["--model_name_or_path", "x", *more])
