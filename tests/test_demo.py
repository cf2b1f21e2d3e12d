"""The demo: its data, what it reports, and that its exit code tells whether SING trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from recipes.demo import data, report
from recipes.demo.plan import PLAN
from recipes.demo.report import Outcome, Run, Used
from recipes.demo.with_fairseq import sub_words
from recipes.machinery.fairseq_tools import read_log, used_optimizer
from sing_plugins import SING

RUN = Path(__file__).parents[1] / "recipes" / "demo" / "run.py"

CATALOGUE = r"""
# A comment.
msgid ""
msgstr ""
"Language: de\n"

msgid "Yes"
msgstr "Ja"

#, python-format
msgctxt "a button"
msgid ""
"Delete \"%(name)s\" "
"now"
msgstr "„%(name)s“ jetzt "
"löschen"

msgid "%d row"
msgid_plural "%d rows"
msgstr[0] "%d Zeile"
msgstr[1] "%d Zeilen"

#, fuzzy
msgid "Guess"
msgstr "Geraten"

msgid "Untranslated"
msgstr ""

#~ msgid "Obsolete"
#~ msgstr "Veraltet"
"""


def test_catalogue_gives_what_is_really_translated() -> None:
    assert list(data.parse_catalogue(CATALOGUE)) == [
        ("Yes", "Ja"),
        ('Delete "%(name)s" now', "„%(name)s“ jetzt löschen"),
        ("%d row", "%d Zeile"),
        ("%d rows", "%d Zeilen"),
    ]


def test_messages_are_read_from_wheels_and_none_is_in_two_splits(tmp_path: Path) -> None:
    wheels = {}
    for project in data.PROJECTS:
        wheels[project] = tmp_path / f"{project}.whl"
        catalogue = CATALOGUE + f'\nmsgid "YES"\nmsgstr "JA"\n\nmsgid "Of {project}"\nmsgstr "Von {project}"\n'
        with zipfile.ZipFile(wheels[project], "w") as wheel:
            wheel.writestr(f"{project}/locale/de/LC_MESSAGES/django.po", catalogue)
            wheel.writestr(f"{project}/locale/fr/LC_MESSAGES/django.po", 'msgid "No"\nmsgstr "Non"\n')
    messages = data.read_messages(wheels)
    assert len(messages) == 3 * 5
    english = [message.english.lower() for message in data.translations(messages)]
    assert sorted(english) == sorted({message.english.lower() for message in messages})
    owned = data.messages_by_project(messages)
    assert {message.english for message in owned} == {f"Of {project}" for project in data.PROJECTS}

    parts = data.split(range(100), held_out=10)
    assert [len(parts[name]) for name in data.SPLITS] == [80, 10, 10]
    assert sorted([*parts["train"], *parts["valid"], *parts["test"]]) == list(range(100))


def test_wheels_that_cannot_be_had_name_the_command_that_has_to_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    (tmp_path / "django-5.2.19-py3-none-any.whl").write_text("not what was pinned")
    with pytest.raises(SystemExit, match=r"pip download .*--no-deps .*--require-hashes"):
        data.fetch(tmp_path)


def test_digits_are_split_without_overlap() -> None:
    parts = data.digits()
    assert [len(parts[name][1]) for name in data.SPLITS] == [1077, 360, 360]
    images = torch.cat([parts[name][0] for name in data.SPLITS])
    assert images.shape[1:] == (1, 8, 8)
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_sub_words_can_be_joined_again() -> None:
    segment = sub_words(["Delete the selected page", "Seite löschen"], vocabulary=40)
    text = segment("Delete the unselected %(page)s, löschen!")
    assert "@@ " in text
    assert text.replace("@@ ", "").split()[:2] == ["delete", "the"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('2026-01-01 00:00:00 | INFO | train_inner | {"loss": "8.5", "num_updates": "4"}', ("train_inner", "8.5")),
        ('2026-01-01 00:00:00 | INFO | valid | {"valid_ppl": "20.5", "loss": "4"}', ("valid", "4")),
        ("2026-01-01 00:00:00 | INFO | fairseq_cli.train | {'_name': None}", ("", None)),
        ("a warning", ("", None)),
    ],
)
def test_only_steps_and_evaluations_are_read_from_the_log(line: str, expected: tuple[str, str | None]) -> None:
    tag, logged = read_log(line)
    assert (tag, logged.get("loss")) == expected


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_the_optimizer_is_known_by_its_class_and_its_state() -> None:
    model = nn.Linear(2, 2)
    prepared = Accelerator(cpu=True).prepare(SING(model.parameters()))
    assert Used.of(SING(model.parameters())) == Used("sing_plugins.SING", sing=False)
    assert Used.of(stepped(SING(model.parameters()))) == Used("sing_plugins.SING", sing=True)
    assert Used.of(stepped(prepared)) == Used("sing_plugins.SING", sing=True)
    assert Used.of(stepped(torch.optim.AdamW(model.parameters()))) == Used("torch.AdamW", sing=False)


@pytest.mark.parametrize("sing", [True, False])
def test_a_checkpoint_tells_which_optimizer_wrote_it(sing: bool, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = stepped((SING if sing else torch.optim.AdamW)(model.parameters()))
    saved = {"optimizer_history": [{"optimizer_name": "Name"}], "last_optimizer_state": optimizer.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert used_optimizer(tmp_path / "checkpoint.pt") == ("Name", sing)


def run_of(optimizer: str, used: Used | None, losses: tuple[float, ...] = (2.0, 1.0)) -> Run:
    outcome = used and Outcome(used, {"valid": 80.0, "test": 90.0})
    return Run("timm", "a net", "accuracy", optimizer, 0.1, 0.0, list(losses), [0.0, 0.5], outcome)


ADAMW = run_of("adamw", Used("torch.AdamW", sing=False))
SING_RUN = run_of("sing_adamw", Used("sing_plugins.SING", sing=True))


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([ADAMW, SING_RUN], None),
        ([ADAMW, run_of("sing_adamw", Used("torch.AdamW", sing=False))], "torch.AdamW trained, which is not SING"),
        ([run_of("adamw", Used("sing_plugins.SING", sing=True)), SING_RUN], "which is SING"),
        ([ADAMW], "no run with SING"),
        ([ADAMW, run_of("sing_adamw", None)], "no outcome"),
        ([ADAMW, run_of("sing_adamw", Used("sing_plugins.SING", sing=True), (2.0, float("nan")))], "not finite"),
    ],
)
def test_whatever_is_not_a_training_with_sing_is_a_problem(runs: list[Run], expected: str | None) -> None:
    problems = report.problems(runs, ["timm"])
    assert len(problems) == (expected is not None)
    assert expected is None or expected in problems[0]


def test_table_shows_the_class_the_losses_and_the_metric() -> None:
    header, _, *rows = report.table([ADAMW, SING_RUN, run_of("sing_adamw", None)]).splitlines()
    assert [row.split() for row in rows] == [
        ["timm", "a", "net", "adamw", "torch.AdamW", "0.1", "1.500", "→", "1.500", "test", "accuracy", "90", "0.500"],
        ["timm", "a", "net", "sing_adamw", "sing_plugins.SING", *rows[0].split()[5:]],
    ]
    assert header.index("class that trained") == rows[1].index("sing_plugins.SING")


def test_each_framework_is_planned_with_its_own_optimizer_and_with_sing() -> None:
    for own, by_size, published in PLAN.values():
        assert not own.name.startswith("sing")
        assert by_size.name == published.name == published.label
        assert published.name.startswith("sing")
        assert by_size.label.startswith(f"{published.name}, softplus_relative=4")
        assert all(choice.lr in choice.looked_at for choice in (own, by_size, published))
        assert by_size.looked_at == own.looked_at
        assert published.looked_at == pytest.approx([10 * lr for lr in own.looked_at])
        assert by_size.weight_decay == published.weight_decay == pytest.approx(own.weight_decay / 10)


@pytest.mark.parametrize("autoload", ["1", "0"])
def test_exit_code_is_zero_only_if_sing_trained(autoload: str, tmp_path: Path) -> None:
    # Without the plugin, timm takes "sing_adamw" for AdamW and says nothing.
    process = subprocess.run(
        [sys.executable, RUN, "--frameworks", "timm", "Accelerate", "--steps", "12", "--output", tmp_path],
        env=os.environ | {"SING_PLUGINS_AUTOLOAD": autoload},
        capture_output=True,
        text=True,
    )
    output = process.stdout
    results = {
        (run["framework"], run["optimizer"]): run["outcome"] and run["outcome"]["used"]
        for run in json.loads((tmp_path / "results.json").read_text())["runs"]
    }
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    assert results["Accelerate", "sing_adamw"]["sing"]
    assert results["Accelerate", "sing_adamw, softplus_relative=4"]["sing"]
    assert results["timm", "sing_adamw"] == (
        {"name": "sing_plugins.SING", "sing": True} if autoload == "1" else {"name": "torch.AdamW", "sing": False}
    )
    if autoload == "1":
        assert process.returncode == 0, output + process.stderr
        assert "Each framework trained with SING." in output
    else:
        assert process.returncode == 1, output + process.stderr
        assert "timm, sing_adamw: torch.AdamW trained, which is not SING" in output
        assert results["timm", "sing_adamw, softplus_relative=4"] is None  # an option that AdamW does not have
