"""The recipe squad: metrics and windows by hand, stand-in data, runs with a tiny BERT (exact resume, two processes)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import debian
import numpy as np
import pytest
import trainer_models
from trainer_models import record, record_of_two_processes, start
from transformers import AutoTokenizer

from recipes import run
from recipes.machinery import config, data, office_help
from recipes.machinery.office_help import Paragraph
from recipes.tasks.squad import data as squad_data
from recipes.tasks.squad import metrics, task
from recipes.tasks.squad.train import SCRIPT, Arguments, encode, measure

ROOT = config.RECIPES.parent
PLACES = {"Rome": "Italy", "Paris": "France", "Oslo": "Norway", "Bern": "Switzerland", "Lima": "Peru", "Cairo": "Egypt"}


def squad(places: dict[str, str]) -> dict[str, Any]:
    """SQuAD's format; one article for each place."""
    articles = []
    for city, country in places.items():
        context = f"It is warm. {city} is the capital of {country}, and many people like it."
        answers = [{"text": country, "answer_start": context.index(country)}]
        qas = [{"id": city, "question": f" Of which country is {city} the capital?", "answers": answers}]
        articles.append({"title": city, "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "1.1", "data": articles}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stand-in files, and a model that knows their words."""
    (tmp_path / "downloads").mkdir()
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / "downloads" / name).write_text(json.dumps(squad(PLACES)))
    rows = squad_data.read(tmp_path / "downloads" / "dev-v1.1.json")
    trainer_models.save(tmp_path / "model", [row[key] for row in rows for key in ("context", "question")])
    return tmp_path


@pytest.fixture
def tiny(folder: Path) -> Path:
    """The `paper` configuration with the tiny model and files, and a checkpoint every third step."""
    text = (config.task_folder("squad") / "configs" / "paper.toml").read_text()
    text = text.replace('"bert-base-uncased"', json.dumps(str(folder / "model")))
    files = "\n".join(f"{split}_file = {json.dumps(str(folder / 'downloads' / name))}" for split, name in FILES.items())
    text = text.replace('name = "squad"', files).replace("held_out = 0.05", "held_out = 0.34")
    text = text.replace("batch_size = 12", "batch_size = 2").replace('"epoch"', '"steps"')
    text = text.replace("[train]", "[train]\neval_steps = 3\nsave_steps = 3\nuse_cpu = true")
    (folder / "tiny.toml").write_text(text)
    return folder / "tiny.toml"


FILES = {"train": "train-v1.1.json", "test": "dev-v1.1.json"}


# ----------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("An apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("a-b", "ab"),  # punctuation goes before articles do
    ],
)
def test_normalization(text: str, normalized: str) -> None:
    assert metrics.normalize(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "truth", "f1", "em"),
    [
        ("the Norman conquest", "Norman Conquest.", 1, 1),
        ("Norman", "the Norman conquest of England", 0.4, 0),  # one of one, one of four
        ("no no yes", "no yes yes", 2 / 3, 0),  # each word as often as both have it
        ("", "Rome", 0, 0),
    ],
)
def test_scores_by_hand(prediction: str, truth: str, f1: float, em: float) -> None:
    assert metrics.f1(prediction, truth) == pytest.approx(f1)
    assert metrics.exact_match(prediction, truth) == em


def test_the_best_of_the_true_answers_counts_and_the_mean_is_in_percent() -> None:
    assert metrics.score(["Rome", "Oslo"], [["the city", "Rome"], ["Bern"]]) == {"f1": 50, "em": 50}


def test_the_best_span_is_in_the_context_in_order_and_short_enough() -> None:
    offsets = np.array([[-1, -1], [0, 3], [4, 6], [7, 9], [-1, -1]])
    start = np.array([9.0, 1.0, 0.0, 5.0, 9.0])
    end = np.array([9.0, 2.0, 4.0, 1.0, 9.0])
    assert metrics.best_span([(start, end, offsets)], n_best=20, max_answer_length=1) == (7, 9)
    assert metrics.best_span([(start - 5, end, offsets)], n_best=20, max_answer_length=3) == (7, 9)
    start[3] = -9
    assert metrics.best_span([(start, end, offsets)], n_best=20, max_answer_length=3) == (0, 6)
    assert metrics.best_span([(start, end, offsets)], n_best=20, max_answer_length=1) == (4, 6)
    padded = np.append(start, -100), np.append(end, -100)  # as Trainer pads the scores of shorter windows
    assert metrics.best_span([(*padded, offsets)], n_best=20, max_answer_length=3) == (0, 6)


@pytest.mark.parametrize("max_length", [64, 16])
def test_the_true_tokens_score_everything_in_one_window_and_in_several(folder: Path, max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    arguments = Arguments("", dataset="squad", max_length=max_length, doc_stride=4)
    rows = squad_data.read(folder / "downloads" / "train-v1.1.json")
    encoded = encode(rows, tokenizer, arguments)
    assert (len(encoded) == len(rows)) == (max_length == 64)
    scores = []
    for key in ("start_positions", "end_positions"):
        one_hot = np.zeros((len(encoded), max_length))
        one_hot[np.arange(len(encoded)), encoded[key]] = 1
        scores.append(one_hot)
    for row in encoded:
        tokens = tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])
        assert tokens in (row["truths"][0].lower(), "[CLS]")
    prediction: Any = type("Prediction", (), {"predictions": tuple(scores)})
    assert measure(encoded, prediction, arguments) == {"f1": 100, "em": 100}


# -------------------------------------------------------------------------------------------------------------- data


def test_squads_files_are_read_as_the_hub_has_them(folder: Path) -> None:
    first, *_ = squad_data.read(folder / "downloads" / "train-v1.1.json")
    assert first["answers"] == {"text": ["Italy"], "answer_start": [first["context"].index("Italy")]}
    assert (first["id"], first["title"]) == ("Rome", "Rome")


def test_a_heading_asks_and_the_first_sentence_below_it_answers() -> None:
    lines = [
        ("h1", "Cut"),
        ("p", "Cuts the row out. It is kept."),
        ("h2", "Paste"),
        ("p", "Inserts the row again. See above."),
        ("h2", "Example"),
        ("p", "Rows can be moved in this way."),
        ("h2", "Example"),
        ("p", "Two headings that are alike ask nothing."),
    ]
    article = squad_data.ask("page", [Paragraph(str(n), tag, text) for n, (tag, text) in enumerate(lines)])
    assert article is not None
    asked = {qas["question"]: (part["context"], answer) for part in article["paragraphs"] for qas in part["qas"]
             for answer in qas["answers"]}  # fmt: skip
    assert {question: answer["text"] for question, (_, answer) in asked.items()} == {
        "Cut": "Cuts the row out.",
        "Paste": "Inserts the row again.",
    }
    for context, answer in asked.values():
        assert context[answer["answer_start"] :].startswith(answer["text"])
        assert "Rows can be moved in this way." in context
        assert "Paste" not in context


def test_a_page_is_in_one_split() -> None:
    articles = [{"title": str(number)} for number in range(50)]
    parts = squad_data.split_articles(articles)
    assert {name: len(part) for name, part in parts.items()} == {"validation": 5, "test": 5, "train": 40}
    assert len({article["title"] for part in parts.values() for article in part}) == 50


def test_the_stand_in_is_made_of_the_pages_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "<h2 id=a>Cut {0}</h2><p id=b>Cuts the row {0} out. See above.</p><p id=c>Rows can be moved in this way.</p>"
    pages = {f"usr/share/libreoffice/help/en/text/p{n}.html": page.format(n).encode() for n in range(10)}
    package = tmp_path / "help_1_all.deb"
    package.write_bytes(debian.package(pages))
    monkeypatch.setitem(office_help.PACKAGES, "en", data.Download((package.as_uri(),), data.digest(package)))
    made = data.DATA_SETS["office-help-qa"].fetch(tmp_path / "data")
    files = {split: tmp_path / "data" / name for split, name in squad_data.FILES["office-help-qa"].items()}
    assert sorted(files.values()) == sorted(made.iterdir())
    rows = {split: squad_data.read(file) for split, file in files.items()}
    assert {split: len(part) for split, part in rows.items()} == {"train": 8, "validation": 1, "test": 1}
    for row in (row for part in rows.values() for row in part):
        assert row["answers"]["text"] == [f"Cuts the row {row['question'].removeprefix('Cut ')} out."]


def test_what_cannot_be_downloaded_says_what_to_do(tmp_path: Path) -> None:
    nowhere = data.Download((f"file://{tmp_path}/nothing/train-v1.1.json",), squad_data.SQUAD["train"].digest)
    with pytest.raises(SystemExit, match=rf"curl -L -o train-v1.1.json .*\n.*{nowhere.digest}"):
        data.fetch(nowhere, tmp_path)


# ------------------------------------------------------------------------------------------------------ configuration


def test_the_papers_numbers() -> None:
    found = {}
    for label in ("adamw", "sing_adamw"):
        ((_, _, *line),) = task.commands(config.load("squad", "paper", label), Path("data"))
        own, trainers = SCRIPT.parse(line)
        found[label] = (trainers.learning_rate, trainers.weight_decay, trainers.num_train_epochs)
        assert trainers.per_device_train_batch_size == 12
        assert (own.max_length, own.doc_stride, own.n_best, own.max_answer_length) == (384, 128, 20, 30)
    assert found == {"adamw": (3e-5, 0, 2), "sing_adamw": (8e-4, 3e-3, 3)}


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("stop", [3, 6])  # 2 steps an epoch: in the middle of the second, and at the last step
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny: Path, stop: int) -> None:
    assert start("squad", tiny, "whole") == 0
    assert start("squad", tiny, "parts", "--stop-after", str(stop)) == run.STOPPED
    assert start("squad", tiny, "parts", "--resume") == 0
    whole, parts = record(tiny, "whole"), record(tiny, "parts")
    for key in ("status", "metrics", "curve", "evaluations", "spikes", "optimizer_class"):
        assert whole[key] == parts[key]
    assert whole["optimizer_class"] == "sing_plugins.SING"
    assert set(whole["metrics"]) == {f"{split} {name}" for split in ("valid", "test") for name in ("f1", "em")}
    assert [point[0] for point in whole["curve"]] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in whole["evaluations"]] == [3, 6]


def test_a_checkpoint_after_the_last_one_that_was_told_is_not_used(tiny: Path) -> None:
    assert start("squad", tiny, "whole") == 0
    assert start("squad", tiny, "parts", "--stop-after", "3") == run.STOPPED
    (state,) = (tiny.parent / "work").rglob("run.json")
    told = state.read_text()
    assert start("squad", tiny, "parts", "--resume", "--stop-after", "6") == run.STOPPED
    state.write_text(told)  # as if the run had been killed before it could tell
    assert start("squad", tiny, "parts", "--resume") == 0
    assert record(tiny, "whole")["curve"] == record(tiny, "parts")["curve"]


def test_adamw_is_torchs_and_trains_as_long_as_its_own_table_says(tiny: Path) -> None:
    assert start("squad", tiny, "adamw", "--optimizer", "adamw") == 0
    made = record(tiny, "adamw")
    assert made["optimizer_class"] == "torch.AdamW"
    assert made["curve"][-1][0] == 4


def test_a_loss_that_is_no_number_ends_the_run_as_diverged(tiny: Path) -> None:
    assert start("squad", tiny, "diverged", "--optimizer", "adamw", "--set", "optimizer.lr=1e30") == 0
    assert record(tiny, "diverged")["status"].startswith("diverged: the loss of step")


def test_two_processes_share_the_batch(tiny: Path) -> None:
    made = record_of_two_processes("squad", tiny)
    assert (made["status"], made["curve"][-1][0]) == ("finished", 6)


def test_the_script_by_hand(folder: Path) -> None:
    command = [sys.executable, "recipes/tasks/squad/train.py", "--model_name_or_path", str(folder / "model")]
    command += ["--train_file", str(folder / "downloads" / "train-v1.1.json"), "--optim", "sing_adamw"]
    command += ["--test_file", str(folder / "downloads" / "dev-v1.1.json"), "--output_dir", str(folder / "out")]
    command += ["--max_steps", "2", "--max_length", "32", "--doc_stride", "4", "--use_cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "test f1: " in done.stdout
