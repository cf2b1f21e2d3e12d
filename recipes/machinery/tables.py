"""What the records of a configuration come to: one row an optimizer, with the rules of recipes/README.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from recipes.machinery import config
from recipes.machinery.runs import Runs, point_of
from recipes.machinery.search import times

SEEDS = 3  # that a comparison needs
COMPARED = ("paper", "small")  # the configurations of the overview; others are about a question of their own
# Columns of the overview beside AdamW's: their labels, of which a configuration has one.
VARIANTS = {
    "sing": ("sing_adamw", "sing"),
    "sing without softplus": ("sing_no_softplus",),
    "sing, softplus_relative=4": ("sing_b4",),
    "sing, softplus_relative=1": ("sing_b1",),
}
TO_PERCENT = {"accuracy": 100, "f1": 1, "em": 1}  # what the metrics that are shown in percent are multiplied by


def verdict(one: Sequence[float], other: Sequence[float], *, higher_is_better: bool) -> str:
    """``"better"`` if every seed of the one is better than every seed of the other; ``"worse"``; else ``"level"``.

    Args:
        one, other: the test metric by seed.
        higher_is_better: of the metric.
    """
    if min(len(one), len(other)) < SEEDS:
        return "–"
    above, below = min(one) > max(other), max(one) < min(other)
    return {(True, False): "better", (False, True): "worse"}.get(
        (above, below) if higher_is_better else (below, above), "level"
    )


def luck(one: Sequence[float], other: Sequence[float], *, higher_is_better: bool) -> float:
    """How often chance alone would put the mean of the one so far ahead: the exact permutation test's one-sided p.

    Args:
        one, other: the test metric by seed.
        higher_is_better: of the metric.

    Returns:
        The share of all ways to divide the values into two of these sizes, with a mean of the first that is as good.
    """
    values = [value if higher_is_better else -value for value in (*one, *other)]
    divisions = [math.fsum(chosen) for chosen in combinations(values, len(one))]
    found = math.fsum(values[: len(one)])
    return sum(total >= found or math.isclose(total, found) for total in divisions) / len(divisions)


HEADER = (
    *("optimizer", "lr", "weight decay", "valid, seed 0", "test: mean (range)", "against"),
    *("spikes a run", "lr within 5 %", "highest stable lr", "runs", "s a run", "paper"),
)


def table(
    task: str, layout: Mapping[str, Any], found: Mapping[str, Runs], reported: Mapping[str, str]
) -> list[list[str]]:
    """The header and a row for each optimizer of a table.

    Args:
        task: one of :data:`recipes.machinery.config.TASKS`.
        layout: an entry of the configuration's ``[[summary]]``: ``title``, ``rows`` (labels), ``against`` (a label) and
            ``also`` (another metric that is to be seen).
        found: as recipes.machinery.runs.read_runs returns it.
        reported: by label, what the paper reports.
    """
    module = config.task_module(task)
    metric, higher = module.METRIC, module.HIGHER_IS_BETTER
    against, also = layout["against"], layout.get("also")
    header = [f"{cell} {against}" if cell == "against" else cell for cell in HEADER]
    at = HEADER.index("against")
    header[at:at] = [f"test {also}: mean (range)"] if also else []
    rows = [header]
    for label in layout["rows"]:
        if label not in found:
            rows.append([label, *["–"] * (len(header) - 2), reported.get(label, "–")])
            continue
        mine = found[label]
        tests = mine.metric("test", metric)
        compared = found[against].metric("test", metric) if against in found and against != label else ()
        stable, basin = (mine.highest_stable_rate, mine.basin) if higher else (None, None)
        diverged = sum(not made["metrics"] for made in mine.records)
        rows.append(
            [
                label,
                _best_rate(mine),
                f"{mine.best[1]:g}",
                _valid(mine, metric),
                _values(tests, metric),
                *([_values(mine.metric("test", also), also)] if also else []),
                "" if against == label else verdict(tests, compared, higher_is_better=higher),
                f"{statistics.fmean(len(made['spikes']) for made in mine.chosen):.1f}",
                "–" if basin is None else "≥ " * basin.is_open + f"× {basin.high / basin.low:.1f}",
                "–" if stable is None else "≥ " * (stable == max(mine.rates)) + f"{stable:g}",
                f"{len(mine.records)}" + f", {diverged} diverged" * (diverged > 0),
                f"{statistics.fmean(made['seconds'] for made in mine.chosen):.0f}",
                reported.get(label, "–"),
            ]
        )
    return rows


def beyond(task: str, layout: Mapping[str, Any], found: Mapping[str, Runs]) -> list[list[str]]:
    """How runs end at multiples of the best learning rate: the header, and a row for each optimizer that has such runs.

    Args:
        task: one of :data:`recipes.machinery.config.TASKS`.
        layout: an entry of the configuration's ``[[summary]]`` with ``failed_below``: the test metric below which a run
            has failed.
        found: as recipes.machinery.runs.read_runs returns it.
    """
    metric = config.task_module(task).METRIC
    factors = [1, *next(iter(found.values())).settings["tune"]["beyond"]] if found else []
    rows = [["optimizer", "best lr", *(f"at {factor:g} × that" for factor in factors)]]
    for label in layout["rows"]:
        if label not in found:
            continue
        mine, cells = found[label], []
        for factor in factors:
            point = times(mine.best[0], factor), mine.best[1]
            at = [made for made in mine.records if made["seed"] and point_of(made) == point]
            failed = sum(made["metrics"].get(f"test {metric}", -math.inf) < layout["failed_below"] for made in at)
            lasted = sorted(
                math.inf if steps is None else steps for made in at for steps in made["recoveries"] if made["spikes"]
            )
            cells.append(_stability(failed, len(at), lasted))
        rows.append([label, f"{mine.best[0]:g}", *cells])
    return rows


def across(task: str, layout: Mapping[str, Any], found: Mapping[str, Mapping[str, Runs]]) -> list[list[str]]:
    """The best learning rate in several configurations, and the validation metric there: the header, and a row for each
    optimizer that all of them have.

    Args:
        task: one of :data:`recipes.machinery.config.TASKS`.
        layout: an entry of a configuration's ``[[summary]]`` with ``across``: the names of the configurations.
        found: by configuration, as recipes.machinery.runs.read_runs returns it.
    """
    metric = config.task_module(task).METRIC
    rows = [["optimizer", *layout["across"], "largest / smallest"]]
    for label in layout["rows"]:
        each = [found.get(name, {}).get(label) for name in layout["across"]]
        mine = [runs_of for runs_of in each if runs_of is not None]
        if len(mine) == len(each):
            rates = [runs_of.best[0] for runs_of in mine]
            cells = [f"{_best_rate(runs_of)}, {_valid(runs_of, metric)}" for runs_of in mine]
            rows.append([label, *cells, f"{max(rates) / min(rates):g}"])
    return rows


def pairs(task: str, layout: Mapping[str, Any], found: Mapping[str, Runs]) -> list[list[str]]:
    """Permutation tests: the header, and a row for each pair of optimizers that have enough seeds.

    Args:
        task: one of :data:`recipes.machinery.config.TASKS`.
        layout: an entry of the configuration's ``[[summary]]`` with ``pairs`` of labels.
        found: as recipes.machinery.runs.read_runs returns it.
    """
    module = config.task_module(task)
    rows = [["is", "ahead of", "in the mean by", "seeds", "p"]]
    for labels in layout["pairs"]:
        tests = [found[label].metric("test", module.METRIC) if label in found else [] for label in labels]
        if min(map(len, tests)) < SEEDS:
            continue
        one, other = tests
        p = luck(one, other, higher_is_better=module.HIGHER_IS_BETTER)
        ahead = (statistics.fmean(one) - statistics.fmean(other)) * TO_PERCENT.get(module.METRIC, 1)
        rows.append([*labels, f"{ahead:.2f}", f"{len(one)}, {len(other)}", f"{p:.3f}"])
    return rows


def growth(layout: Mapping[str, Any], found: Mapping[str, Runs]) -> list[list[str]]:
    """How norms of gradients change from the second fifth of the training, after warm-up, to the last: the header, and
    a row for each optimizer.

    Args:
        layout: an entry of the configuration's ``[[summary]]`` with ``growth``.
        found: as recipes.machinery.runs.read_runs returns it.
    """
    rows = [["optimizer", "all parameters: mean (range)", "LayerNorms: mean (range)"]]
    for label in layout["rows"]:
        if label in found:
            seeds = [made["gradients"] for made in found[label].chosen if made["metrics"] and "gradients" in made]
            rows.append([label, *(_changes([_change(norms, of) for norms in seeds]) for of in (1, 2))])
    return rows


def _change(norms: Sequence[Sequence[float]], of: int) -> float:
    """Of a column of a record's ``gradients``; not a number where there is none, or nothing but zeros."""
    fifth = norms[-1][0] / 5
    spans = ((number * fifth, (number + 1) * fifth) for number in (1, 4))
    early, late = ([row[of] for row in norms if begin < row[0] <= end and len(row) > of] for begin, end in spans)
    return statistics.fmean(late) / statistics.fmean(early) - 1 if early and late and any(early) else math.nan


def _changes(shares: Sequence[float]) -> str:
    if not shares or any(map(math.isnan, shares)):
        return "–"
    low, mean, high = (f"{100 * of(shares):+.0f}" for of in (min, statistics.fmean, max))
    return f"{mean} % ({low} to {high})"


def _stability(failed: int, count: int, lasted: Sequence[float]) -> str:
    if not count:
        return "–"
    spikes = f"{len(lasted) / count:.1f} spikes a run"
    if lasted:
        middle = statistics.median_low(lasted)
        spikes += f" of {middle:.0f} steps" if math.isfinite(middle) else ", for good"
    return f"{failed} of {count} fail, {spikes}"


def overview(found: Mapping[tuple[str, str], Mapping[str, Runs]]) -> list[list[str]]:
    """SING beside AdamW: the header, and a row for each configuration that has records of both.

    Args:
        found: by task and configuration, as recipes.machinery.runs.read_runs returns it.
    """
    rows = [["task", "configuration", "data", "metric", "adamw", *VARIANTS]]
    for (task, name), mine in found.items():
        if name not in COMPARED:
            continue
        module = config.task_module(task)
        metric, higher = module.METRIC, module.HIGHER_IS_BETTER
        labels = [next((label for label in variant if label in mine), None) for variant in VARIANTS.values()]
        if labels[0] is None or "adamw" not in mine:
            continue
        adamw, data = mine["adamw"].metric("test", metric), mine["adamw"].settings["data"]
        cells = [_values(adamw, metric)]
        for label in labels:
            tests = () if label is None else mine[label].metric("test", metric)
            against = verdict(tests, adamw, higher_is_better=higher)
            cells.append("–" if label is None else f"{_values(tests, metric)}, {against}")
        rows.append([task, name, str(data.get("name", data.get("path", task))), metric, *cells])
    return rows


def _best_rate(mine: Runs) -> str:
    return f"{mine.best[0]:g}" + " (edge)" * mine.is_best_rate_at_edge


def _valid(mine: Runs, metric: str) -> str:
    """The validation metric of the run that was chosen by it."""
    return _values(mine.metric("valid", metric)[:1], metric)


def _values(values: Sequence[float], metric: str) -> str:
    if not values:
        return "diverged"
    scale, digits, unit = (TO_PERCENT[metric], 1, " %") if metric in TO_PERCENT else (1, 2, "")
    low, mean, high = (scale * of(values) for of in (min, statistics.fmean, max))
    spread = f" ({low:.{digits}f}–{high:.{digits}f})" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{unit}{spread}"


def layouts(task: str, name: str) -> list[dict[str, Any]]:
    """The tables that a configuration asks for; without ``[[summary]]`` one, of all its optimizers."""
    every = config.labels(task, name)
    asked = config.read(task, name).get("summary")
    return asked or [{"title": f"{task}, {name}", "rows": every, "against": "adamw" if "adamw" in every else every[-1]}]


def reported(task: str, name: str) -> dict[str, str]:
    """What the paper reports, by label: the table ``[reported]`` of the configuration, or of the task's ``paper``."""
    own = config.read(task, name).get("reported")
    is_there = (config.task_folder(task) / "configs" / "paper.toml").exists()
    return dict(own or (config.read(task, "paper").get("reported", {}) if is_there else {}))
