"""Tables, figures and the report are made from the records, by the rules, and the published ones are up to date."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from docs import size
from recipes import report, run, summarize
from recipes.machinery import config, curves, figures, record, tables
from recipes.machinery.config import RECIPES
from recipes.machinery.runs import Runs, read_runs

RATES = ("0.5", "1.0", "5.0")
PUBLISHED = [task for task in config.TASKS if any(config.task_folder(task).glob("results/*/*.json"))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of both optimizers of the landscape: three learning rates, and three seeds of the best."""
    folder = tmp_path_factory.mktemp("landscape")
    for label, best in (("sing_sgd", "1.0"), ("sgd", "5.0")):
        for lr, seed in [*((lr, 0) for lr in RATES), (best, 1), (best, 2)]:
            asked = ["landscape", "small", "--optimizer", label, "--seed", str(seed), "--set", f"optimizer.lr={lr}"]
            assert run.main([*asked, "--results", str(folder / "results"), "--work", str(folder / "work")]) == 0
    return folder / "results"


def test_row_is_of_the_best_point_with_all_its_seeds(results: Path) -> None:
    found = read_runs("landscape", "small", results)
    assert found["sing_sgd"].best == (1.0, 0.0)
    assert [made["seed"] for made in found["sing_sgd"].chosen] == [0, 1, 2]
    assert len(found["sing_sgd"].records) == 5
    assert not found["sing_sgd"].is_best_rate_at_edge
    assert found["sgd"].is_best_rate_at_edge
    (layout,) = tables.layouts("landscape", "small")
    header, first, second = tables.table("landscape", layout, found, {"sgd": "the paper's"})
    row = dict(zip(header, first, strict=True))
    assert (row["optimizer"], row["lr"], row["runs"], row["paper"]) == ("sing_sgd", "1", "5", "–")
    assert row["test: mean (range)"] == "-2.00 (-2.00–-2.00)"
    assert row[f"against {layout['against']}"] in ("better", "worse", "level")
    assert second[0] == "sgd"
    assert second[1] == "5 (edge)"
    assert second[-1] == "the paper's"


def test_runs_with_other_settings_are_in_no_table(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "results")
    asked = ["landscape", "small", "--set", "train.epochs=50", "--results", str(tmp_path / "results")]
    assert run.main([*asked, "--work", str(tmp_path / "work")]) == 0
    assert len(record.read_all("landscape", "small", tmp_path / "results")) == 11
    assert len(read_runs("landscape", "small", tmp_path / "results")["sing_sgd"].records) == 5


@pytest.mark.parametrize(
    ("one", "other", "higher", "expected"),
    [
        ((3, 4, 5), (0, 1, 2), True, "better"),
        ((3, 4, 5), (0, 1, 2), False, "worse"),
        ((0, 1, 2), (3, 4, 5), True, "worse"),
        ((2, 3, 4), (0, 1, 2), True, "level"),
        ((1, 1, 1), (1, 1, 1), True, "level"),
        ((3, 4), (0, 1, 2), True, "–"),
        ((), (0, 1, 2), True, "–"),
    ],
)
def test_better_is_every_seed_better_than_every_seed(one: Any, other: Any, higher: bool, expected: str) -> None:
    assert tables.verdict(one, other, higher_is_better=higher) == expected


@pytest.mark.parametrize(
    ("one", "other", "higher", "expected"),
    [
        ((3, 4, 5), (0, 1, 2), True, 1 / 20),
        ((3, 4, 5), (0, 1, 2), False, 1.0),
        ((0, 1, 2), (3, 4, 5), False, 1 / 20),
        ((2, 4, 5), (0, 1, 3), True, 2 / 20),
        ((0.1, 0.2), (0.1, 0.2), True, 5 / 6),  # ties count, whatever 0.1 + 0.2 is
    ],
)
def test_luck_is_the_share_of_divisions_that_are_as_good(one: Any, other: Any, higher: bool, expected: float) -> None:
    assert tables.luck(one, other, higher_is_better=higher) == pytest.approx(expected)


def runs_of(task: str, name: str, by_seed: list[dict[str, Any]]) -> Runs:
    """Runs of a configuration's AdamW at one point, with what their records have besides, by seed."""
    settings = config.load(task, name, "adamw")
    return Runs(settings, [{**settings.at(5e-3, 5e-2, seed).as_json(), **own} for seed, own in enumerate(by_seed)])


def test_pairs_with_enough_seeds_are_compared_by_their_means() -> None:
    def with_tests(accuracies: list[float]) -> Runs:
        metrics = [{"valid accuracy": 0.9, "test accuracy": accuracy} for accuracy in accuracies]
        return runs_of("cifar100", "replication", [{"metrics": each} for each in metrics])

    layout = {"pairs": [["sing_adamw", "adamw"], ["sing_adamw", "lamb"], ["sing_adamw", "muon"]]}
    found = {"sing_adamw": with_tests([0.92, 0.93, 0.94]), "adamw": with_tests([0.91, 0.9, 0.89])}
    found["muon"] = with_tests([0.95, 0.96])
    header, row = tables.pairs("cifar100", layout, found)
    assert row == ["sing_adamw", "adamw", "3.00", "3, 3", "0.050"]
    assert len(header) == len(row)


def test_growth_of_the_norms_is_from_the_second_fifth_to_the_last_by_seed() -> None:
    def with_norms(*ends: float, layernorms: bool) -> Runs:
        norms = [[9, 9, 4, 4, 9, 9, 9, 9, end, end] for end in ends]
        told = [[[10 * at, norm, 2 * norm * layernorms] for at, norm in enumerate(of, 1)] for of in norms]
        return runs_of("rde", "gradients", [{"metrics": {"valid accuracy": 0.5}, "gradients": rows} for rows in told])

    found = {"adamw": with_norms(5, 6, 7, layernorms=True), "sing_freeze": with_norms(3, 3, 3, layernorms=False)}
    header, *rows = tables.growth({"rows": ["adamw", "sing_adamw", "sing_freeze"]}, found)
    assert rows == [
        ["adamw", "+50 % (+25 to +75)", "+50 % (+25 to +75)"],
        ["sing_freeze", "-25 % (-25 to -25)", "–"],
    ]
    assert len(header) == len(rows[0])


def test_summary_links_the_figures_that_it_draws_and_is_the_same_every_time(results: Path) -> None:
    (section,) = summarize.summarize("landscape", results)
    beside = results / "landscape"
    text = summarize.markdown([section], beside)
    files = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert files == ["small/curves-1.svg", "small/tuning.svg", "small/path.svg"]
    drawn = {file: (beside / file).read_bytes() for file in files}
    assert summarize.markdown(summarize.summarize("landscape", results), beside) == text
    assert {file: (beside / file).read_bytes() for file in files} == drawn


def test_a_figure_whose_numbers_differ_in_their_last_bits_is_the_same_to_the_byte(tmp_path: Path) -> None:
    drawn = []
    for left in (0.125, 0.125 + 1e-13):
        figure, axes = plt.subplots()
        axes.set_position((left, 0.1, 0.75, 0.8))
        axes.plot([1, 2], [3, 4])
        with plt.rc_context(figures.STYLE):
            figures.save(figure, tmp_path / "drawn.svg")
        drawn.append((tmp_path / "drawn.svg").read_text())
    assert 'clip-path="url(#' in drawn[0]
    assert drawn[0] == drawn[1]


def test_a_second_metric_is_shown_where_a_table_asks_for_it(results: Path) -> None:
    found = read_runs("landscape", "small", results)
    (layout,) = tables.layouts("landscape", "small")
    header, *rows = tables.table("landscape", layout | {"also": "place"}, found, {})
    at = header.index("test place: mean (range)")
    assert header[at - 1] == "test: mean (range)"
    assert [row[at] for row in rows] == ["4.00 (4.00–4.00)"] * 2
    assert {len(row) for row in rows} == {len(header)}


def test_what_is_measured_during_training_is_drawn(tmp_path: Path) -> None:
    found = read_runs("rde", "small")
    points = curves.evaluations("valid accuracy")
    last_step, last = points(found["adamw"].chosen[0])[-1]
    assert (last_step, last) == (3750, found["adamw"].metric("valid", "accuracy")[0])
    curves.draw_curves(found, ["adamw", "missing", "muon"], "valid accuracy", tmp_path / "drawn.svg", points)
    drawn = (tmp_path / "drawn.svg").read_text()
    assert "valid accuracy" in drawn
    for label, color in {"adamw": "#1f77b4", "muon": "#ff7f0e"}.items():
        assert len(re.findall(f"stroke: {color}; .*stroke-width: 1.2", drawn)) == 1  # the mean
        assert re.search(f"fill: {color}[^>]*>{label}<", drawn)  # its name, at its end
    assert "missing" not in drawn


def test_norms_of_gradients_are_drawn_for_what_has_gradients(tmp_path: Path) -> None:
    found = read_runs("digits", "small")
    file, labels = tmp_path / "drawn.svg", ["sing_adamw", "sing_no_freeze"]  # LayerNorm is frozen in the first
    assert curves.draw_curves(found, labels, curves.NORM_OF_LAYERNORMS, file, curves.gradient_norms(2))
    drawn = file.read_text()
    assert "sing_no_freeze" in drawn
    assert "sing_adamw" not in drawn
    assert not curves.draw_curves(found, labels[:1], curves.NORM_OF_LAYERNORMS, file, curves.gradient_norms(2))
    assert file.read_text() == drawn


def test_a_band_is_of_the_seeds_that_got_so_far() -> None:
    seeds = [[(1, 1.0), (2, 4.0), (3, 4.0)], [(1, 3.0), (2, 2.0)]]
    assert curves.band(seeds) == ([1, 2, 3], [1, 2, 4], [2, 3, 4], [3, 4, 4])
    smoothed = [[(step, value) for step, value in enumerate((0.0, 3.0, 0.0, 3.0))]]
    assert curves.band(smoothed, window=3)[2] == [1.5, 1, 2, 1.5]
    assert curves.band([]) == curves.band([[]]) == ([], [], [], [])


def test_names_at_the_ends_of_lines_keep_their_order_and_a_distance() -> None:
    assert figures.apart([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    moved = figures.apart([0.1, 0.5, 0.5, 0.51], 0.1)
    assert moved[0] == 0.1
    assert moved[1:] == pytest.approx([0.405, 0.505, 0.605])


def runs_with(rates: dict[float, float]) -> Runs:
    """Tuning runs of RDE with one weight decay and these validation accuracies by learning rate."""
    settings = config.load("rde", "small", "adamw")
    decay = settings.optimizer["weight_decay"]
    records = [
        {
            **settings.at(lr, decay, 0).as_json(),
            "metrics": {"valid accuracy": accuracy},
        }
        for lr, accuracy in rates.items()
    ]
    return Runs(settings, records)


def test_the_basin_is_what_is_within_five_percent_of_the_best() -> None:
    low, high, is_open = runs_with({1e-3: 0.4, 1e-2: 0.8, 1e-1: 0.4}).basin or (0, 0, True)
    assert (low, high) == pytest.approx((1e-2 * 10**-0.1, 1e-2 * 10**0.1))  # 0.04 below the top is a tenth of the way
    assert not is_open
    assert runs_with({1e-3: 0.79, 1e-2: 0.8, 1e-1: 0.0}).basin == pytest.approx((1e-3, 1e-2 * 10**0.05, True))
    assert runs_with({1e-3: 0.79}).basin is None


def test_what_the_paper_reports_is_the_configurations_own() -> None:
    assert tables.reported("imagenet", "paper-resnet34")["sing_adamw"] == "75.67 %"
    assert tables.reported("imagenet", "paper")["sing_adamw"] == "72.93 %"
    assert tables.reported("rde", "small") == tables.reported("rde", "paper")


def test_only_what_is_between_the_marks_of_a_readme_is_written() -> None:
    once = summarize.insert("before\n<!-- results -->\n\nafter\n", "TABLE")
    assert once == "before\n<!-- results -->\n\nTABLE\n\n<!-- end of results -->\n\nafter\n"
    assert summarize.insert(once, "NEW") == once.replace("TABLE", "NEW")
    with pytest.raises(ValueError, match="found 0"):
        summarize.insert("nothing", "TABLE")


def test_published_overview_is_that_of_the_records() -> None:
    readme = (RECIPES / "README.md").read_text()
    assert summarize.insert(readme, summarize.markdown_table(summarize.overview())) == readme


def test_overview_has_both_optimizers_and_who_is_better() -> None:
    found = read_runs("rde", "small")
    header, row = tables.overview({("rde", "small"): found, ("rde", "paper"): {"adamw": found["adamw"]}})
    shown = dict(zip(header, row, strict=True))
    (layout, *_) = tables.layouts("rde", "small")
    columns, *rows = tables.table("rde", layout, found, {})
    by_label = {cells[0]: dict(zip(columns, cells, strict=True)) for cells in rows}
    assert row[:5] == ["rde", "small", "rde", "accuracy", by_label["adamw"]["test: mean (range)"]]
    for column, label in {"sing": "sing_adamw", "sing without softplus": "sing_no_softplus"}.items():
        expected = f"{by_label[label]['test: mean (range)']}, {by_label[label]['against adamw']}"
        assert shown[column] == expected


def test_what_fails_at_multiples_of_the_best_rate_is_counted_on_further_seeds() -> None:
    settings = config.load("digits", "small", "adamw")
    decay = settings.optimizer["weight_decay"]

    def made(lr: float, seed: int, accuracy: float | None, *recoveries: int | None) -> dict[str, Any]:
        metrics = {} if accuracy is None else {"valid accuracy": accuracy, "test accuracy": accuracy}
        spikes = {"spikes": list(range(len(recoveries))), "recoveries": list(recoveries)}
        return {**settings.at(lr, decay, seed).as_json(), "metrics": metrics, **spikes}

    records = [
        *(made(1e-3, seed, 0.97) for seed in (0, 1, 2)),
        *(made(5e-3, seed, accuracy, 40, None) for seed, accuracy in ((0, 0.5), (1, 0.95), (2, 0.1))),
        *(made(1e-2, seed, accuracy, None, None, 3) for seed, accuracy in ((1, 0.1), (2, None))),
    ]
    (layout,) = tables.layouts("digits", "small")
    header, row = tables.beyond("digits", layout, {"adamw": Runs(settings, records)})
    assert header == ["optimizer", "best lr", "at 1 × that", "at 2 × that", "at 5 × that", "at 10 × that"]
    assert row[:4] == ["adamw", "0.001", "0 of 2 fail, 0.0 spikes a run", "–"]
    assert row[4:] == ["1 of 2 fail, 2.0 spikes a run of 40 steps", "2 of 2 fail, 3.0 spikes a run, for good"]


def test_the_best_rates_of_several_configurations_stand_beside_each_other() -> None:
    layout = {"across": ["one", "two"], "rows": ["adamw", "muon"]}
    one, two = runs_with({1e-3: 0.4, 1e-2: 0.8, 1e-1: 0.4}), runs_with({1e-3: 0.8, 1e-2: 0.7})
    found = {"one": {"adamw": one, "muon": one}, "two": {"adamw": two}}
    header, row = tables.across("rde", layout, found)
    assert header == ["optimizer", "one", "two", "largest / smallest"]
    assert row == ["adamw", "0.01, 80.0 %", "0.001 (edge), 80.0 %", "10"]


def test_the_metric_over_the_rate_of_several_configurations_is_drawn_with_the_best_marked(tmp_path: Path) -> None:
    found = {"one": {"adamw": runs_with({1e-3: 0.4, 1e-2: 0.8, 1e-1: 0.4})}, "two": {"muon": runs_with({1e-3: 0.8})}}
    figures.draw_transfer(found, ["one", "two"], ["adamw", "muon", "lamb"], "accuracy", tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_text()
    titles = [text for text in re.findall(r">([\w ]+)</text>", drawn) if text in ("adamw", "muon", "lamb")]
    assert titles == ["adamw", "muon"]
    assert {"one", "two", "learning rate"} <= set(re.findall(r">([\w ]+)</text>", drawn))
    dots, rings = (
        re.findall(f'x="([0-9.]+)" y="([0-9.]+)" style="{fill}; stroke: #440154"', drawn)
        for fill in ("fill: #440154", "fill-opacity: 0")
    )
    assert rings == [min(dots, key=lambda dot: float(dot[1]))]  # SVG counts from above


def test_the_steps_in_docs_size_are_those_of_the_optimizer(tmp_path: Path) -> None:
    page = (size.FOLDER / "size.md").read_text()
    assert summarize.insert(page, summarize.markdown_table(size.table())) == page
    size.draw(tmp_path / "size.svg")
    assert all(label in (tmp_path / "size.svg").read_text() for label in size.DRAWN)


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_tables_are_those_of_the_records(task: str, tmp_path: Path) -> None:
    shutil.copytree(config.task_folder(task) / "results", tmp_path / "results" / task)
    readme = (config.task_folder(task) / "README.md").read_text()
    text = summarize.markdown(summarize.summarize(task, tmp_path / "results"), tmp_path / "results")
    assert summarize.insert(readme, text.replace(f"]({task}/", "](results/")) == readme
    assert all((config.task_folder(task) / file).exists() for file in re.findall(r"\]\((results/[^)]+)\)", readme))


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_records_say_what_made_them(task: str) -> None:
    names = [folder.name for folder in (config.task_folder(task) / "results").iterdir()]
    for made in (each for name in names for each in record.read_all(task, name)):
        file = made["stem"]
        assert re.fullmatch(r"[0-9a-f]{40}", made["commit"]), file
        assert made["changed"] is False, file
        assert made["versions"]["torch"], file
        assert made["hardware"]["processor"], file
        assert made["seconds"] > 0 or task == "landscape", file
        sing = made["optimizer"]["opt"].startswith("sing")
        # fairseq keeps the class's name only
        trained = str(made["optimizer_class"]).startswith(("sing_plugins.", "FairseqSING"))
        assert not made["metrics"] or trained == sing, file


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.depth: list[str] = []
        self.sources: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.cells += tag == "td"
        if tag not in ("meta", "img"):
            self.depth.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag


def test_report_is_one_sound_page_that_loads_nothing_else(results: Path) -> None:
    (section,) = summarize.summarize("landscape", results)
    reader = _Page()
    reader.feed(report.page([section], tables.overview({})))
    assert not reader.depth
    assert reader.cells > 20
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in reader.sources)
    assert sum(source.startswith("data:") for source in reader.sources) == 3
