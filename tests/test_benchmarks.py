"""The benchmark runs, and README has what its published records give. No test compares times."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import imports, memory, optimizers, report, shapes, targets, timing
from benchmarks.settings import QUICK, Settings
from benchmarks.training import TRAININGS

TINY: shapes.Shapes = [(8, 3, 3, 3), (8,), (4, 8)]
SETTINGS = Settings(
    models={"ResNet18": TINY},
    memory_models={"ResNet18": TINY},
    every_memory=False,
    rounds=2,
    least_rounds=1,
    training_budget=0.0,
    import_rounds=1,
    parameters=(1_000, 10**15),
    tensors=(10,),
    tensor_entries=1_000,
    thread_entries=1_000,
    batches={"ResNet18": (2, 3, 32, 32), "MiniLM": (2, 4)},
)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Of all sections, of a tiny run."""
    return benchmark.measure(SETTINGS, list(benchmark.SECTIONS))


def rows(record: dict[str, Any], section: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record["sections"][section]
    return found


def test_every_optimizer_is_timed_against_the_reference(record: dict[str, Any]) -> None:
    timed = rows(record, "step")
    assert [row["optimizer"] for row in timed] == list(optimizers.OPTIMIZERS)
    old = set() if hasattr(torch.optim, "Muon") else {"Muon, matrices only"}
    assert {row["optimizer"] for row in timed if "skipped" in row} == old
    for row in timed:
        if "ratio" in row:
            assert row["rounds"] == 2
            assert all(0 < low <= median <= high for low, median, high in [row["ratio"], row["milliseconds"]])


def test_states_are_counted_to_the_byte(record: dict[str, Any]) -> None:
    counter = 4 * len(TINY) / shapes.entries(TINY)
    found = {row["optimizer"]: row.get("state_bytes") for row in rows(record, "memory")}
    expected = {"SING": 12, "SING without Lookahead": 8}
    assert {name: found[name] for name in expected} == {
        name: pytest.approx(value + counter, abs=1e-3) for name, value in expected.items()
    }


def test_peak_is_what_a_step_holds_for_a_while() -> None:
    foreach, fused = memory.in_child(("AdamW, foreach", "AdamW, fused"), [(1024, 1024)] * 8, SETTINGS)
    assert foreach["transient_bytes"] == pytest.approx(4, abs=0.5)  # its denominators
    assert fused["transient_bytes"] < 0.5


def test_trainings_imports_and_curves_are_measured(record: dict[str, Any]) -> None:
    assert [row["training"] for row in rows(record, "training")] == ["ResNet18", "MiniLM"]
    assert all(row["ratio"][1] > 0 for row in rows(record, "training"))
    assert {row["import"] for row in rows(record, "imports")} == {
        name for codes in imports.PROCESSES.values() for name in codes
    }
    measured = [(row["curve"], row["at"]) for row in rows(record, "scaling") if "ratio" in row]
    assert measured[:2] == [("parameters", 1_000), ("tensors", 10)]
    assert measured[2][0] == "threads"
    assert [row["skipped"] for row in rows(record, "scaling") if row["at"] == 10**15] == [
        "does not fit in half of the free memory"
    ]
    assert torch.get_num_threads() == SETTINGS.threads


@pytest.mark.parametrize("sing", [True, False])
@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_have_the_optimizer_that_they_say(name: str, sing: bool) -> None:
    optimizer = TRAININGS[name].optimizer(sing)
    assert type(optimizer).__name__ == ("SING" if sing else "AdamW")


def test_record_tables_and_figure_are_written(record: dict[str, Any], tmp_path: Path) -> None:
    file = benchmark.write(record, tmp_path)
    assert json.loads(file.read_text())["sections"].keys() == benchmark.SECTIONS.keys()
    assert file.with_suffix(".svg").read_text().startswith("<?xml")
    text = file.with_suffix(".md").read_text()
    assert all(f"| {name} |" in text for name in optimizers.OPTIMIZERS)
    assert "](cpu.svg)" in text


@pytest.mark.parametrize("section", benchmark.SECTIONS)
def test_a_record_of_one_section_can_be_written(record: dict[str, Any], section: str, tmp_path: Path) -> None:
    alone = {section: record["sections"][section]}
    benchmark.write({**record, "sections": alone, "targets": targets.rows(alone)}, tmp_path)


def test_a_target_is_met_up_to_its_limit() -> None:
    def verdicts(milliseconds: float, ratio: float) -> list[str]:
        sections = {
            "imports": [{"import": imports.ADDED, "milliseconds": [0, milliseconds, 9]}],
            "step": [{"model": "ViT-S", "optimizer": "SING", "ratio": [0, ratio, 9]}],
        }
        wanted = (imports.ADDED, "SING: step, ViT-S")
        made = targets.rows(sections)
        found = {row["target"]: row["verdict"] for row in made if row["measured"] is not None}
        assert len(found) == 2
        assert len(made) == len(targets.TARGETS)
        return [found[name] for name in wanted]

    assert verdicts(5, 1.3) == ["met", "met"]
    assert verdicts(5.1, 1.6) == ["missed", "met, goal missed"]
    assert verdicts(4.9, 1.61) == ["met", "missed"]


def test_works_are_done_in_turn_until_time_is_up() -> None:
    done: list[str] = []
    works = {name: lambda name=name: done.append(name) for name in "abc"}
    timing.in_turn(works, rounds=4)
    assert [sorted(done[at : at + 3]) for at in range(0, 12, 3)] == [list("abc")] * 4
    assert len({tuple(done[at : at + 3]) for at in range(0, 12, 3)}) > 1
    for least, patience, expected in ((1, 9.0, 1), (3, 9.0, 3), (3, 0.0, 1)):
        counted = timing.in_turn({"a": lambda: None}, rounds=9, least=least, budget=0.0, patience=patience)
        assert len(counted["a"]) == expected
    assert timing.quartiles([1, 2, 3, 4, 5]) == [2, 3, 4]
    assert timing.quartiles([7]) == [7, 7, 7]


def test_shapes_are_those_of_the_models() -> None:
    import timm
    import torchvision
    from transformers import BertConfig, BertModel

    vit = timm.create_model("vit_small_patch16_224")  # which timm 1.0.12 cannot build on meta
    with torch.device("meta"):
        models = {"ResNet18": torchvision.models.resnet18(), "ViT-S": vit, "BERT base": BertModel(BertConfig())}
    for name, model in models.items():
        assert sorted(shapes.MODELS[name]()) == sorted(tuple(param.shape) for param in model.parameters())
    assert [shapes.matrices(count, 2_560_000)[0] for count in (10, 10_000)] == [(500, 512), (16, 16)]


def test_targets_are_of_what_is_measured() -> None:
    assert {*shapes.REAL, *QUICK["models"]} <= {*Settings().models} == {*shapes.MODELS}
    assert {*memory.WITH_TARGET} <= {*optimizers.OPTIMIZERS}
    assert {*Settings().batches} == {*TRAININGS}
    assert all(math.isfinite(target.limit) for target in targets.TARGETS)


def test_readme_has_the_tables_of_the_published_records(tmp_path: Path) -> None:
    assert report.published(), "no record in benchmarks/results"
    copy = tmp_path / "README.md"
    copy.write_text(report.README.read_text())
    report.update_readme(copy)
    assert copy.read_text() == report.README.read_text(), "run python -m benchmarks --update-readme"
    for file in report.RESULTS.glob("*.json"):
        published = json.loads(file.read_text())
        assert targets.rows(published["sections"]) == published["targets"]
        assert file.with_suffix(".md").read_text() == report.markdown(published, f"{file.stem}.svg") + "\n"
        assert file.with_suffix(".svg").exists()
