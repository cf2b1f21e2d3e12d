"""The recipes: who imports whom; configurations, records, runs, tuning, downloads; the two tasks that need no data."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import debian
import numpy as np
import optuna
import pytest
import torch
from accelerate.state import AcceleratorState
from numpy.testing import assert_array_equal
from torch import nn

from recipes import run, tune
from recipes.machinery import config, data, record, search, vision
from recipes.machinery.data import Download
from recipes.machinery.record import Curve, DivergenceError
from recipes.machinery.search import Grid, next_points
from recipes.tasks.digits.task import Data as Digits
from recipes.tasks.landscape import task as landscape
from recipes.tasks.rde import rectangles
from recipes.tasks.rde.task import Data, DepthViT

ROOT = config.RECIPES.parent
COMMANDS = ("run", "tune", "summarize", "report", "data")
CONFIGS = [
    (task, file.stem) for task in config.TASKS for file in sorted((config.task_folder(task) / "configs").iterdir())
]
TINY_RDE = (
    "data.size=16",
    "data.rectangles=3",
    "data.train=64",
    "data.valid=16",
    "data.test=24",
    "train.batch_size=16",
)


def start(folder: Path, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    """Run recipes/run.py in this process; returns the records that there are then."""
    places = ["--data", str(folder / "data"), "--work", str(folder / "work"), "--results", str(folder / "results")]
    assert run.main([*arguments, *places]) == code
    return [json.loads(file.read_text()) for file in sorted((folder / "results").glob("*/*/*.json"))]


def changes(*texts: str) -> list[str]:
    return [argument for text in texts for argument in ("--set", text)]


# Where things are


def test_top_level_is_the_commands_the_machinery_the_tasks_and_the_demo() -> None:
    there = {entry.name for entry in config.RECIPES.iterdir()} - {"__pycache__"}
    assert there == {"README.md", *(f"{command}.py" for command in COMMANDS), "machinery", "tasks", "demo"}
    assert set(config.TASKS) == {folder.name for folder in (config.RECIPES / "tasks").iterdir()} - {"__pycache__"}


def part_of(module: str) -> str:
    """The part that a module belongs to: ``"recipes.tasks.rde"`` of ``"recipes.tasks.rde.data"``."""
    _, *names = module.split(".")
    depth = {"machinery": 1, "demo": 1, "tasks": 2}.get(names[0] if names else "", 0)
    return ".".join(["recipes", *names[:depth]])


def imports_of(file: Path) -> set[str]:
    """The parts of the recipes that a file imports, wherever in it, also for types only."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.update(f"{node.module}.{name.name}" for name in node.names)
    return {part_of(module) for module in found if module.split(".")[0] == "recipes"}


@pytest.mark.parametrize("path", sorted(file.relative_to(ROOT).as_posix() for file in config.RECIPES.rglob("*.py")))
def test_what_is_imported_is_of_the_same_part_or_of_the_machinery(path: str) -> None:
    own = part_of(path.removesuffix(".py").replace("/", "."))
    assert imports_of(ROOT / path) <= {own, "recipes.machinery"}


@pytest.mark.parametrize("name", data.DATA_SETS)
def test_data_sets_name_functions_that_there_are(name: str) -> None:
    module, _, function = data.DATA_SETS[name].prepare.partition(":")
    assert callable(getattr(import_module(module), function))


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *config.RECIPES.rglob("*.md")]


@pytest.mark.parametrize("path", sorted(page.relative_to(ROOT).as_posix() for page in PAGES))
def test_links_of_the_readmes_lead_somewhere(path: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / path).read_text()):
        if not link.startswith(("http://", "https://")):
            target, _, anchor = link.partition("#")
            file = (ROOT / path).parent / target if target else ROOT / path
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link


def anchors(file: Path) -> list[str]:
    """Of a README's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


# Configurations


@pytest.mark.parametrize(("task", "name"), CONFIGS)
def test_every_configuration_has_a_rate_a_decay_and_grids_for_each_optimizer(task: str, name: str) -> None:
    settings = [config.load(task, name, label) for label in config.labels(task, name)]
    assert len({each.stem for each in settings}) == len(settings)
    for each in settings:
        assert each.optimizer["lr"] > 0
        assert each.optimizer["weight_decay"] >= 0
        assert sorted(each["tune"]["lr"]) == each["tune"]["lr"]
        assert sorted(each["tune"]["weight_decay"]) == each["tune"]["weight_decay"]


@pytest.mark.parametrize(("task", "name"), [pair for pair in CONFIGS if pair[1] != "paper"])
def test_tuning_begins_inside_of_the_grid(task: str, name: str) -> None:
    for label in config.labels(task, name):
        settings = config.load(task, name, label)
        decays = settings["tune"]["weight_decay"]
        assert decays == [] or settings.optimizer["weight_decay"] in decays, label


def test_an_optimizer_changes_tables_and_the_command_line_changes_all(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[train]\nepochs = 3\nname = "a"\n[optimizer]\nlr = 0.1\nweight_decay = 0.0\n[optimizers.one]\n'
        '[optimizers.two]\nopt = "x"\nlr = 0.2\n[optimizers.two.train]\nepochs = 5\n'
    )
    one, two = (config.load("rde", str(file), label) for label in ("one", "two"))
    assert (one.config, one.label, one.optimizer["opt"], one.optimizer["lr"]) == ("mine", "one", "one", 0.1)
    assert (two.optimizer["opt"], two.optimizer["lr"]) == ("x", 0.2)
    assert (one["train"]["epochs"], two["train"]["epochs"]) == (3, 5)
    changed = config.load("rde", str(file), changes=["train.epochs=7", "train.name=b c", "optimizer.options.k=none"])
    assert changed.label == "one"
    assert changed["train"] == {"epochs": 7, "name": "b c"}
    assert changed.optimizer["options"] == {"k": "none"}
    assert changed.stem != one.stem


def test_grids_are_no_part_of_a_run() -> None:
    assert "tune" not in config.load("rde", "small").as_json()
    same = config.load("rde", "small", changes=["tune.lr=[1.0]"])
    assert same.stem == config.load("rde", "small").stem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "small"), "Invalid TASK: 'nothing'. Accepted: .*landscape, rde"),
        (("rde", "huge"), "Invalid CONFIG: 'huge'. rde has bf16, depth-8, gradients, paper, rate, small, width-128, "),
        (("rde", "small", "adam"), "Invalid --optimizer: 'adam'. rde small has sing_adamw, adamw"),
        (("rde", "small", None, 0, ["train.epoch=1"]), "Invalid --set: 'train.epoch=1'. .*train.epochs"),
        (("rde", "small", None, 0, ["train.epochs"]), "Invalid --set: 'train.epochs'"),
        (("rde", "small", None, 0, ["train.epochs=many"]), "train.epochs is a number, such as 6"),
    ],
)
def test_what_a_configuration_does_not_have_raises_and_lists_what_it_has(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(*arguments)


def test_a_configuration_takes_over_its_base_but_for_what_it_replaces() -> None:
    small, bf16 = config.read("rde", "small"), config.read("rde", "bf16")
    assert bf16["train"] == {**small["train"], "precision": "bf16", "weights": "bfloat16"}
    assert (bf16["data"], bf16["model"]) == (small["data"], small["model"])
    assert list(bf16["optimizers"]) == ["float32", "bfloat16", "bfloat16_kahan"]
    assert config.load("rde", "bf16", "float32")["train"]["weights"] == "float32"
    assert "base" not in bf16
    first, wider = config.read("rde", "width-64"), config.read("rde", "width-128")
    assert wider == {**first, "model": {**first["model"], "embed_dim": 128, "num_heads": 8}}


# Records


def test_curve_keeps_means_and_counts_the_beginnings_of_spikes() -> None:
    curve = Curve()
    losses = [1.0 + 0.1 * math.sin(step) for step in range(1000)]
    for step in (100, 101, 102, 500, 900):
        losses[step] = 3.0
    for step, loss in enumerate(losses, 1):
        curve.step(step, len(losses), loss)
    assert curve.spikes == [101, 501, 901]
    assert curve.recoveries == [3 + (losses[103] > 1), *(1 + (losses[at] > 1) for at in (501, 901))]
    assert len(curve.points) == record.POINTS
    assert curve.points[0] == pytest.approx([5, np.mean(losses[:5])], rel=1e-5)
    assert curve.points[-1][0] == 1000


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_divergence(loss: float) -> None:
    with pytest.raises(DivergenceError, match="step 3 of 10"):
        Curve().step(3, 10, loss)


def test_records_are_json_with_a_line_for_each_list_of_numbers() -> None:
    made = {"curve": [[1, 0.5], [2, 1e-7]], "name": "a, [ 1, 2 ]", "empty": [], "words": ["a", "b"]}
    text = record.dumps(made)
    assert json.loads(text) == made
    assert "\n  [1, 0.5],\n  [2, 1e-07]\n" in text


# Runs


def test_run_writes_one_record_and_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made,) = start(tmp_path, "landscape", "small", "--seed", "2")
    assert (made["task"], made["config"], made["label"], made["seed"]) == ("landscape", "small", "sing_sgd", 2)
    assert made["status"] == "finished"
    assert made["optimizer_class"] == "sing_plugins.SING"
    assert made["optimizer"]["lr"] == 1.0
    assert made["seconds"] >= 0
    assert made["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"commit", "changed", "hardware", "curve", "evaluations", "spikes", "metrics"} <= made.keys()
    assert not any((tmp_path / "work").rglob("*.json"))
    capsys.readouterr()
    assert start(tmp_path, "landscape", "small", "--seed", "2") == [made]
    printed = capsys.readouterr().out
    assert "exists: this run is done (finished, valid value -2, " in printed
    assert f"with --results and another folder than {tmp_path / 'results'}." in printed


def test_dry_run_prints_the_settings_and_the_command_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["rde", "paper", "--optimizer", "adamw", "--set", "optimizer.lr=0.003"]
    assert start(tmp_path, *asked, "--dry-run") == []
    settings, _, command = capsys.readouterr().out.strip().rpartition("\n\n")
    assert json.loads(settings)["optimizer"]["lr"] == 0.003
    assert command.startswith(
        "accelerate launch recipes/run.py rde paper --optimizer adamw --seed 0 --set optimizer.lr=0.003"
    )


def test_wrong_arguments_end_the_program_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        start(tmp_path, "rde", "small", "--set", "train.lr=1")
    assert "Invalid --set: 'train.lr=1'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_interrupted_run_goes_on_exactly(tmp_path: Path) -> None:
    asked = ["rde", "small", *changes(*TINY_RDE, "train.epochs=3", "model.depth=1")]
    (straight,) = start(tmp_path / "straight", *asked)
    for stop in (2, 6):  # after the first and the second epoch of four steps
        assert start(tmp_path / "parts", *asked, "--resume", "--stop-after", str(stop), code=run.STOPPED) == []
    (resumed,) = start(tmp_path / "parts", *asked, "--resume")
    for key in ("metrics", "curve", "evaluations", "spikes", "panels"):
        assert resumed[key] == straight[key], key


def test_without_resume_a_run_begins_anew(tmp_path: Path) -> None:
    asked = ["rde", "small", *changes(*TINY_RDE, "train.epochs=2", "model.depth=1")]
    start(tmp_path, *asked, "--stop-after", "1", code=run.STOPPED)
    (made,) = start(tmp_path, *asked)
    assert [step for step, _ in made["curve"]] == list(range(1, 9))


def test_divergence_is_recorded(tmp_path: Path) -> None:
    asked = changes(*TINY_RDE, "model.depth=1", "optimizer.lr=1e18", "train.warmup=0.0")
    (made,) = start(tmp_path, "rde", "small", "--optimizer", "sgd", *asked)
    assert made["status"].startswith("diverged: the loss of step")
    assert made["metrics"] == {}
    assert search.score(made) == -math.inf


# Tuning

GRID = Grid(lr=(1e-3, 5e-3, 1e-2, 5e-2), weight_decay=(5e-4, 5e-3, 5e-2), first_weight_decay=5e-3, budget=8)


def carry_out(grid: Grid, score: Any) -> list[tuple[float, float]]:
    scores: dict[tuple[float, float], float | None] = {}
    while (points := next_points(grid, scores)) is not None:
        assert points
        scores |= {point: score(*point) for point in points}
    return list(scores)


def test_tuning_goes_from_the_middle_outwards_then_through_the_weight_decays_at_the_best_rate() -> None:
    tried = carry_out(GRID, lambda lr, decay: -abs(math.log(lr / 1e-2)) + decay)
    rates = [(lr, 5e-3) for lr in (5e-3, 1e-2, 1e-3, 5e-2)]
    assert tried == [*rates, *((1e-2, decay) for decay in (5e-4, 5e-2, 0.1, 0.5))]


@pytest.mark.parametrize(("sign", "beyond"), [(1, 0.1), (-1, 5e-4)])
def test_grid_goes_on_where_the_best_rate_is_at_an_edge(sign: int, beyond: float) -> None:
    tried = carry_out(GRID, lambda lr, decay: sign * lr)
    assert (beyond, 5e-3) in tried
    assert len(tried) == GRID.budget


def test_all_optimizers_get_the_same_budget_and_a_small_one_takes_the_middle() -> None:
    grid = Grid(GRID.lr, GRID.weight_decay, GRID.first_weight_decay, budget=4)
    assert carry_out(grid, lambda lr, decay: lr) == [(5e-3, 5e-3), (1e-2, 5e-3), (1e-3, 5e-3), (1e-2, 5e-4)]


def test_runs_that_go_on_elsewhere_are_waited_for() -> None:
    running: dict[tuple[float, float], float | None] = {(lr, 5e-3): None for lr in GRID.lr}
    assert next_points(GRID, running) == []
    assert next_points(GRID, running | {(5e-3, 5e-3): 1.0}) == []


def test_divergence_is_the_worst_score_and_the_smallest_of_equals_is_the_best() -> None:
    assert search.best({1.0: -math.inf, 0.1: -3.0, 0.5: None}) == 0.1
    assert search.best({2.0: 1.0, 0.1: 1.0}) == 0.1


def test_grids_go_on_in_the_papers_steps() -> None:
    up = [1e-3]
    for _ in range(4):
        up.append(search.beyond(up[-1], up=True))
    assert up == [1e-3, 5e-3, 1e-2, 5e-2, 0.1]
    assert all(search.beyond(high, up=False) == low for low, high in pairwise(up))


def test_tuning_by_command_is_not_repeated_and_adds_the_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    asked = ["landscape", "small", "--optimizer", "sing_sgd", "--budget", "4", "--jobs", "2"]
    asked += ["--work", str(tmp_path / "work"), "--results", str(results)]
    assert tune.main(asked) == 0
    table = capsys.readouterr().out
    assert "sing_sgd: 3 runs" in table
    assert table.count("*") == 1
    assert "-2*" in table  # as measured: lower is better
    written = {file: file.stat().st_mtime_ns for file in results.rglob("*.json")}
    assert len(written) == 3  # there is one weight decay
    assert {file.parent for file in written} == {results / "landscape" / "small"}
    assert tune.main([*asked, "--seeds", "2"]) == 0
    again = {file: file.stat().st_mtime_ns for file in results.rglob("*.json")}
    assert written.items() <= again.items()
    assert len(again) == 4
    best = max((json.loads(file.read_text()) for file in written), key=search.score)
    (added,) = (json.loads(file.read_text()) for file in again.keys() - written.keys())
    assert (added["seed"], added["optimizer"]) == (1, best["optimizer"])


def test_further_seeds_are_run_at_multiples_of_the_best_rate_where_a_configuration_asks_for_it(tmp_path: Path) -> None:
    small = (config.task_folder("landscape") / "configs" / "small.toml").read_text()
    file = tmp_path / "further.toml"
    file.write_text(small.replace("[tune]\n", "[tune]\nbeyond = [2, 5]\n"))
    asked = ["landscape", str(file), "--optimizer", "sing_sgd", "--budget", "4", "--seeds", "3"]
    assert tune.main([*asked, "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]) == 0
    made = [json.loads(record.read_text()) for record in tmp_path.glob("results/*/*/*.json")]
    best = max((each for each in made if each["seed"] == 0), key=search.score)["optimizer"]["lr"]
    further = sorted((each["optimizer"]["lr"], each["seed"]) for each in made if each["seed"])
    assert further == [(best * factor, seed) for factor in (1, 2, 5) for seed in (1, 2)]


def test_where_the_grids_are_empty_the_optimizers_own_values_are_run_and_nothing_else() -> None:
    settings = config.load("squad", "small", "sing_b4_no_freeze")
    tuning = tune.Tuning(settings, optuna.create_study(direction="maximize"), budget=8, seeds=1)
    own = settings.optimizer["lr"], settings.optimizer["weight_decay"]
    assert carry_out(tuning.grid, lambda lr, decay: lr) == [own]


def test_the_table_says_what_diverged_and_what_another_machine_is_running() -> None:
    tuning = tune.Tuning(config.load("rde", "small"), optuna.create_study(direction="maximize"), budget=8, seeds=1)
    for lr, value in ((1e-3, 0.25), (5e-3, -math.inf)):
        tuning.study.tell(tuning.claim((lr, 0.0)), value)
    tuning.claim((1e-2, 0.0))
    rows = [line.split() for line in tune.table([tuning]).splitlines()[3:]]
    assert rows == [["0.001", "0.25*"], ["0.005", "diverged"], ["0.01", "running"]]


def test_failed_run_ends_the_tuning_and_names_its_log(tmp_path: Path) -> None:
    asked = ["landscape", "small", "--optimizer", "sgd", "--set", "optimizer.options.momentun=0.9"]
    with pytest.raises(SystemExit, match=r"exit code 1; see .*\.log"):
        tune.main([*asked, "--work", str(tmp_path), "--results", str(tmp_path / "results")])


# Downloads


def test_download_is_checked_and_kept(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"content")
    good = Download(((tmp_path / "missing").as_uri(), source.as_uri()), hashlib.sha256(b"content").hexdigest())
    file = data.fetch(good, tmp_path / "data")
    assert file.read_bytes() == b"content"
    source.unlink()
    assert data.fetch(good, tmp_path / "data") == file


def test_download_with_another_hash_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"tampered")
    with pytest.raises(SystemExit, match=rf"has the sha256 {hashlib.sha256(b'tampered').hexdigest()}") as refused:
        data.fetch(Download((source.as_uri(),), "0" * 64), tmp_path / "data")
    assert f"curl -L -o source.bin {source.as_uri()}" in str(refused.value)
    assert not any((tmp_path / "data" / "downloads").iterdir())


def test_another_file_of_that_name_is_refused_and_left_alone(tmp_path: Path) -> None:
    source, own = tmp_path / "source.bin", tmp_path / "data" / "downloads" / "source.bin"
    source.write_bytes(b"content")
    own.parent.mkdir(parents=True)
    own.write_bytes(b"somebody's own")
    with pytest.raises(SystemExit, match=rf"{own} has the md5 [\s\S]* md5 must be"):
        data.fetch(Download((source.as_uri(),), hashlib.md5(b"content").hexdigest(), "md5"), tmp_path / "data")
    assert own.read_bytes() == b"somebody's own"


def test_debian_package_is_read_without_being_installed(tmp_path: Path) -> None:
    file = tmp_path / "a.deb"
    file.write_bytes(debian.package({"usr/a.txt": b"wanted", "usr/b.bin": b"no"}))
    assert list(data.read_deb(file, lambda name: name.endswith(".txt"))) == [("usr/a.txt", b"wanted")]
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="Not a Debian package"):
        list(data.read_deb(file, lambda name: True))


# Landscape


def test_only_sing_leaves_the_narrow_minima(tmp_path: Path) -> None:
    ends = {}
    for label in ("sing_sgd", "sgd"):
        made = start(tmp_path / label, "landscape", "paper", "--optimizer", label)[0]
        ends[label] = made["metrics"]["test place"]
        assert len(made["panels"]["path"]) == made["train"]["epochs"] + 1
    assert ends["sing_sgd"] == pytest.approx(landscape.MINIMA[2][0], abs=0.1)
    assert ends["sgd"] == pytest.approx(landscape.MINIMA[1][0], abs=0.1)


def test_the_landscape_has_three_minima_and_the_last_is_the_deepest() -> None:
    x = torch.linspace(-5, 7, 5001, dtype=torch.float64)
    y = landscape.landscape(x)
    lowest = x[1:-1][(y[1:-1] < y[:-2]) & (y[1:-1] < y[2:])]
    assert lowest.tolist() == pytest.approx([where for where, _, _ in landscape.MINIMA], abs=0.1)
    assert y.argmin() == (x - lowest[-1]).abs().argmin()


# RDE


def test_pictures_are_the_same_for_the_same_seed_and_tell_the_heights() -> None:
    first, again, other = (rectangles.draw(20, 32, 4, seed) for seed in (0, 0, 1))
    assert_array_equal(first.grey, again.grey)
    assert not np.array_equal(first.grey, other.grey)
    assert (first.height.max(axis=1) >= 2).all()
    assert (first.height[:, 1:] >= 1).all()
    assert (first.height[:, 0] == 0).all()
    assert first.depth().max() <= 1.0
    for owner in first.owner:
        assert set(np.unique(owner)) == set(range(5))


def test_height_is_one_more_than_that_of_what_a_rectangle_visibly_lies_on() -> None:
    boxes = np.array([[2, 2, 20, 20], [10, 10, 28, 28], [14, 4, 24, 12], [40, 40, 60, 60]])
    owner = np.zeros((64, 64), np.uint8)
    for index, (top, left, bottom, right) in enumerate(boxes, 1):
        owner[top:bottom, left:right] = index
    heights = rectangles.heights(owner, boxes)
    assert heights is not None
    assert heights.tolist() == [0, 1, 2, 3, 1]


def test_pictures_that_do_not_tell_are_refused() -> None:
    touching = np.array([[0, 0, 10, 10], [0, 10, 10, 20], [5, 5, 12, 12]])
    apart = np.array([[0, 0, 10, 10], [30, 30, 40, 40]])
    hidden = np.array([[0, 0, 10, 10], [0, 0, 12, 12]])
    for boxes in (touching, apart, hidden):
        assert rectangles.heights(rectangles.paint(boxes, 64), boxes) is None


def test_answer_is_right_if_the_mean_over_every_rectangle_is_within_half_a_level() -> None:
    pictures = rectangles.draw(6, 32, 3, 0)
    truth = pictures.depth()
    noise = np.random.default_rng(0).normal(0, 0.05, truth.shape).astype(np.float32)
    assert pictures.correct(truth + noise).all()
    assert not pictures.correct(np.ones_like(truth)).any()
    wrong = truth.copy()
    wrong[0][pictures.owner[0] == 2] += 0.51 / 3
    assert pictures.correct(wrong).tolist() == [False, *[True] * 5]
    wrong[0][pictures.owner[0] == 2] -= 0.02 / 3
    assert pictures.correct(wrong).all()


def test_vit_puts_every_patch_in_its_place() -> None:
    model = DepthViT(16, 4, "vit_tiny_patch16_224", embed_dim=16, depth=1, num_heads=1)
    model.vit = nn.Identity()
    model.head = nn.Identity()  # type: ignore[assignment]
    picture = torch.arange(256.0).reshape(1, 16, 16)
    patches = picture.reshape(1, 4, 4, 4, 4).transpose(2, 3).reshape(1, 16, 16)
    model.vit.forward = lambda pictures: patches  # type: ignore[method-assign, assignment]
    assert torch.equal(model(picture), picture)


@pytest.mark.parametrize("name", ["paper", "small", "bf16"])
def test_every_optimizer_of_rde_is_built_and_steps(name: str) -> None:
    for label in config.labels("rde", name):
        table = config.load("rde", name, label).optimizer
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
        before = [parameter.clone() for parameter in model.parameters()]
        optimizer = vision.create_optimizer(model, table)
        assert record.class_name(optimizer).startswith("sing_plugins.") == table["opt"].startswith("sing_"), label
        frozen = [not parameter.requires_grad for parameter in model.parameters()]
        assert frozen == [False, False, *[label.endswith("_freeze")] * 2, False, False], label
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        assert [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)] == frozen, label
        assert optimizer.param_groups[0]["lr"] == table["lr"], label


def test_paper_configuration_of_rde_trains(tmp_path: Path) -> None:
    small = ("train.epochs=1", "train.batch_size=4", "data.train=8", "data.valid=4", "data.test=4")
    (made,) = start(tmp_path, "rde", "paper", *changes(*small, "train.workers=0"))
    assert made["status"] == "finished"
    assert made["model"]["name"] == "vit_small_patch16_224"
    assert np.shape(made["panels"]["prediction"]) == (4, 128, 128)


# Digits


def test_digits_are_split_and_repeated() -> None:
    sets = Digits(valid=360, test=360, repeat=2).load()
    assert {split: len(part) for split, part in sets.items()} == {"train": 2 * 1077, "valid": 360, "test": 360}
    pixels = {split: {row.tobytes() for row in part.tensors[0].numpy()} for split, part in sets.items()}
    assert not pixels["train"] & pixels["test"]
    assert not pixels["valid"] & pixels["test"]
    assert all(part.tensors[0].min() == 0 and part.tensors[0].max() == 1 for part in sets.values())


@pytest.mark.parametrize("label", config.labels("digits", "small"))
def test_every_optimizer_of_digits_trains(label: str, tmp_path: Path) -> None:
    short = ("train.epochs=1", "data.repeat=1", "model.depth=2", "model.width=16")
    (made,) = start(tmp_path, "digits", "small", "--optimizer", label, *changes(*short))
    assert made["status"] == "finished"
    assert made["optimizer_class"].startswith("sing_plugins.") == label.startswith("sing_")


def test_clipping_bounds_the_norm_of_all_gradients(tmp_path: Path) -> None:
    short = ("train.epochs=1", "data.repeat=1", "model.depth=1", "model.width=8", "train.batch_size=512")
    ends = []
    for clip in ("0.0", "1e-12", "1e9"):
        where = (tmp_path / clip, "digits", "small", "--optimizer", "adamw", *changes(*short, f"train.clip={clip}"))
        (made,) = start(*where)
        ends.append(made["metrics"])
    assert ends[0] == ends[2]
    assert ends[0] != ends[1]


def test_norms_of_gradients_are_told_where_that_is_asked_for(tmp_path: Path) -> None:
    short = ("train.epochs=2", "train.batch_size=8", "data.train=16", "data.valid=4", "data.test=4")
    file = tmp_path / "telling.toml"
    frozen = '[optimizers.sing_freeze]\nopt = "sing_adamw"\noptions = { freeze = "layernorm" }\n'
    file.write_text('base = "small"\n[train]\ngradients = true\n[optimizers.adamw]\n' + frozen)
    told = {}
    for label in ("adamw", "sing_freeze"):
        (made,) = start(tmp_path / label, "rde", str(file), "--optimizer", label, *changes(*short))
        told[label] = made["gradients"]
        assert [step for step, *_ in told[label]] == [step for step, _ in made["curve"]]
    assert all(whole > of_norms > 0 for _, whole, of_norms in told["adamw"])
    assert all(whole > of_norms == 0 for _, whole, of_norms in told["sing_freeze"])


@pytest.fixture
def another_precision() -> Iterator[None]:
    """Accelerate keeps that of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_can_be_kept_in_bfloat16(tmp_path: Path, another_precision: None) -> None:
    short = ("train.epochs=1", "train.batch_size=8", "data.train=16", "data.valid=4", "data.test=4")
    for label in config.labels("rde", "bf16"):
        (made,) = start(tmp_path / label, "rde", "bf16", "--optimizer", label, *changes(*short))
        assert made["status"] == "finished"
    settings = config.load("rde", "small")
    with pytest.raises(ValueError, match=r"Invalid train\.weights: 'half'\. Accepted: float32, bfloat16\."):
        vision.Training(**{**settings["train"], "weights": "half"})


def test_splits_of_rde_do_not_overlap(tmp_path: Path) -> None:
    parts = Data(16, 3, train=8, valid=4, test=4).load(tmp_path)
    assert {split: len(part.grey) for split, part in parts.items()} == {"train": 8, "valid": 4, "test": 4}
    again = Data(16, 3, train=8, valid=4, test=4).load(tmp_path)
    assert_array_equal(parts["test"].grey, again["test"].grey)
    everything = rectangles.draw(16, 16, 3, 0)
    assert_array_equal(np.concatenate([part.grey for part in parts.values()]), everything.grey)


def test_pictures_that_another_version_of_the_code_has_drawn_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Data(16, 3, train=2, valid=1, test=1)
    settings.load(tmp_path)
    settings.load(tmp_path)
    assert len(list(tmp_path.glob("rde/*"))) == 1
    changed = tmp_path / "rectangles.py"
    changed.write_bytes(Path(rectangles.__file__).read_bytes() + b"DARKEST = 0.5\n")
    monkeypatch.setattr(rectangles, "__file__", str(changed))
    settings.load(tmp_path)
    assert len(list(tmp_path.glob("rde/*"))) == 2


def test_schedules_warm_up_and_end_at_nothing() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for name, middle in (("cosine", 0.5), ("constant-cosine", 1.0), ("constant", 1.0)):
        training = vision.Training(epochs=1, batch_size=1, warmup=0.1, schedule=name)
        share = vision.schedule(optimizer, training, 100).lr_lambdas[0]
        assert share(0) == pytest.approx(0.1)
        assert share(9) == share(10) == 1.0
        assert share(55) == pytest.approx(middle)
        assert share(99) == pytest.approx(1.0 if name == "constant" else 0.0, abs=0.01)
    with pytest.raises(ValueError, match=r"Invalid train.schedule: 'linear'. Accepted: cosine"):
        vision.Training(epochs=1, batch_size=1, schedule="linear")
