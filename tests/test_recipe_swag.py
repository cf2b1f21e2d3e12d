"""The recipe swag: stand-in data by hand, pairs, and runs with a tiny RoBERTa: exact resume, two processes."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainer_models
from trainer_models import record, record_of_two_processes, start
from transformers import AutoTokenizer

from recipes import run
from recipes.machinery import config, trainer
from recipes.tasks.swag import data, task
from recipes.tasks.swag.data import ENDINGS
from recipes.tasks.swag.train import SCRIPT, Arguments, encode, measure

ROOT = config.RECIPES.parent


def questions(count: int = 9) -> list[dict[str, Any]]:
    """With more columns than are used, as in SWAG's files; three of each video."""
    words = ["sits", "runs", "sings", "sleeps"]
    return [
        {
            "": number,
            "video-id": f"video {number // 3}",
            "startphrase": "unused",
            "sent1": "A dog comes in, and looks around.",
            "sent2": "It",
            **{name: f"{words[(number + shift) % 4]} for {shift} minutes." for shift, name in enumerate(ENDINGS)},
            "label": number % 4,
        }
        for number in range(count)
    ]


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="") as content:
        writer = csv.DictWriter(content, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stand-in files, and a model that knows their words."""
    write_csv(tmp_path / "train.csv", questions())
    write_csv(tmp_path / "val.csv", questions(5))
    texts = [str(row[key]) for row in questions() for key in ("sent1", "sent2", *ENDINGS)]
    trainer_models.save(tmp_path / "model", texts, "roberta")
    return tmp_path


@pytest.fixture
def tiny(folder: Path) -> Path:
    """The `paper` configuration with the tiny model and files, and a checkpoint every fourth step."""
    text = (config.task_folder("swag") / "configs" / "paper.toml").read_text()
    text = text.replace('"roberta-base"', json.dumps(str(folder / "model")))
    files = (("train", "train.csv"), ("test", "val.csv"))
    lines = "\n".join(f"{split}_file = {json.dumps(str(folder / name))}" for split, name in files)
    text = text.replace('name = "swag"', lines).replace("held_out = 0.05", "held_out = 0.34")
    text = text.replace("batch_size = 32", "batch_size = 4").replace('"epoch"', '"steps"')
    text = text.replace("[train]", "[train]\neval_steps = 4\nsave_steps = 3\nuse_cpu = true")
    (folder / "tiny.toml").write_text(text)
    return folder / "tiny.toml"


# -------------------------------------------------------------------------------------------------------------- data


def test_csv_and_both_kinds_of_json_are_read_alike(tmp_path: Path) -> None:
    files = [write_csv(tmp_path / "a.csv", questions()), tmp_path / "b.json", tmp_path / "c.json"]
    files[1].write_text(json.dumps(questions()))
    files[2].write_text("\n".join(map(json.dumps, questions())))
    first, *others = map(data.read, files)
    assert others == [first, first]
    assert tuple(first[0]) == data.COLUMNS
    assert [row["label"] for row in first] == [number % 4 for number in range(9)]


def test_a_quoted_line_break_is_part_of_a_field(tmp_path: Path) -> None:
    rows = [{**questions(1)[0], "sent1": "One\nline, and \u2028another."}]
    assert data.read(write_csv(tmp_path / "a.csv", rows))[0]["sent1"] == rows[0]["sent1"]


def test_a_file_without_a_column_is_refused(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "ending2"} for row in questions()]
    with pytest.raises(ValueError, match=r"a\.csv has no ending2\. Expected: sent1, "):
        data.read(write_csv(tmp_path / "a.csv", rows))


def test_all_questions_to_a_video_are_held_out_together() -> None:
    parts = trainer.hold_out(questions(), SCRIPT.group, 0.3)
    videos = {split: {row["video-id"] for row in rows} for split, rows in parts.items()}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 6, "validation": 3}
    assert not videos["train"] & videos["validation"]
    assert trainer.hold_out(questions(), SCRIPT.group, 0.3) == parts


def serialized(lines: list[str], kind: int = 16) -> bytes:
    """An object of an R lazy-load database."""
    elements = b"".join(struct.pack(">Ii", 0x00040009, len(line.encode())) + line.encode() for line in lines)
    content = b"X\n" + struct.pack(">IIII", 3, 0x040201, 0x030500, 5) + b"UTF-8"
    content += struct.pack(">II", kind, len(lines)) + elements
    return struct.pack(">I", len(content)) + zlib.compress(content)


def test_rs_character_vectors() -> None:
    vectors = [["EMMA", "", "naïve"], [], ["x"]]
    assert list(data.character_vectors(b"".join(map(serialized, vectors)))) == vectors
    with pytest.raises(ValueError, match="Not a database of character vectors"):
        list(data.character_vectors(serialized(["x"], kind=19)))


def test_a_novel_is_split_into_chapters_and_sentences() -> None:
    lines = ["EMMA", "", "By nobody", "VOLUME I", "CHAPTER I", "", '"Is Mr. Knightley', 'here?" Asked Mrs. Weston.']
    lines += ["He was. ", "", "Chapter 2", "It rained!  Yes", "", "FINIS", "", "A note."]
    assert data.chapters(lines) == [
        ['"Is Mr. Knightley here?"', "Asked Mrs. Weston.", "He was."],
        ["It rained!", "Yes"],
    ]


def test_the_next_sentence_is_among_three_of_other_chapters() -> None:
    texts = [[f"Chapter {c} has a sentence {s} here." for s in range(6)] for c in range(4)]
    rows = data.continuations("Emma", [*texts, ["Too short.", "Far too short."]])
    assert len(rows) == 4 * 5
    for row in rows:
        _, chapter, *_, number, _ = row["sent1"].split()
        endings = [row[name] for name in ENDINGS]
        assert endings[row["label"]] == f"Chapter {chapter} has a sentence {int(number) + 1} here."
        assert sum(ending.startswith(f"Chapter {chapter}") for ending in endings) == 1
        assert len(set(endings)) == 4
    assert data.continuations("Emma", texts) == data.continuations("Emma", texts)


@pytest.mark.parametrize(
    ("choices", "kept"),
    [
        (["One", "Two", "Three", "Four"], True),
        (["One", "Two", "Three", "All of the above."], False),
        (["One", "Two", "Three", "Both A & B"], False),
        (["One", "Two", "Three", "Neither A or B."], False),
        (["One", "Two", "Three", "None of these answers are correct"], False),
        (["One", "Two", "Three", "***<This answer left blank by the FCC>"], False),
        (["One", "Two", "Three", "At any antenna above 30 MHz"], True),
        (["One", "Two", "Three", "three"], False),
        (["One", "Two", "Three"], False),
    ],
)
def test_which_exam_questions_are_kept(choices: list[str], kept: bool) -> None:
    lines = ["E0A01 (B)", "What is", " it?", *(f"{key}. {text}" for key, text in zip("ABCD", choices, strict=False))]
    file = ("usr/share/hamexam/E/E0A01", "\n".join(lines).encode())
    rows = list(data.exam_questions([file, file]))
    assert len(rows) == kept  # and only once
    if kept:
        assert rows[0]["sent1"] == "What is it?"
        assert rows[0][f"ending{rows[0]['label']}"] == "Two"


def test_an_exam_question_about_a_figure_is_left_out() -> None:
    choices = "A. 1\nB. 2\nC. 3\nD. 4"
    for question, kept in {"What is in Figure E5-2?": 0, "How is a noise figure defined?": 1}.items():
        file = ("usr/share/fccexam/E7R/7R-1A1", f"7R-1A1 A\n{question}\n{choices}\n".encode())
        assert len(list(data.exam_questions([file]))) == kept


def test_all_questions_of_a_topic_are_in_one_split() -> None:
    rows = [{"video-id": f"{topic}{number}"} for topic in ("E0A0", "1-10B", "G2C1", "T1A0", "3-7F") for number in "123"]
    parts = data.split_by_topic(rows)
    assert {split: len(part) for split, part in parts.items()} == {"validation": 3, "test": 3, "train": 9}
    assert all(len({row["video-id"][:-1] for row in parts[split]}) == 1 for split in ("validation", "test"))


# -------------------------------------------------------------------------------------------------------------- pairs


def test_four_pairs_of_the_first_sentence_and_the_second_with_an_ending(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    row, *_ = encode(data.read(folder / "train.csv"), tokenizer, Arguments("", dataset="swag"))
    expected = "[CLS] a dog comes in, and looks around. [SEP] it runs for 1 minutes. [SEP]"
    assert " ".join(tokenizer.decode(row["input_ids"][1]).replace(" ,", ",").replace(" .", ".").split()) == expected
    assert (len(row["input_ids"]), row["labels"]) == (4, 0)
    short, *_ = encode(data.read(folder / "train.csv"), tokenizer, Arguments("", dataset="swag", max_length=8))
    assert {len(tokens) for tokens in short["input_ids"]} == {8}


def test_accuracy_by_hand() -> None:
    prediction: Any = type(
        "Prediction", (), {"predictions": np.eye(4)[[0, 1, 2, 3]], "label_ids": np.array([0, 1, 2, 0])}
    )
    assert measure(None, prediction, Arguments("", dataset="swag")) == {"accuracy": 0.75}


# ------------------------------------------------------------------------------------------------------ configuration


def test_the_papers_numbers() -> None:
    found = {}
    for label in ("adamw", "sing_adamw"):
        ((_, _, *line),) = task.commands(config.load("swag", "paper", label), Path("data"))
        own, trainers = SCRIPT.parse(line)
        batch = trainers.per_device_train_batch_size
        found[label] = (trainers.learning_rate, trainers.weight_decay, trainers.num_train_epochs, batch)
        assert own.max_length == 80
    assert found == {"adamw": (5e-5, 0, 3, 16), "sing_adamw": (2e-4, 3e-3, 4, 32)}


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("stop", [3, 6])  # 2 steps an epoch: in the middle of the second, and at the end of the third
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny: Path, stop: int) -> None:
    assert start("swag", tiny, "whole") == 0
    assert start("swag", tiny, "parts", "--stop-after", str(stop)) == run.STOPPED
    assert start("swag", tiny, "parts", "--resume") == 0
    whole, parts = record(tiny, "whole"), record(tiny, "parts")
    for key in ("status", "metrics", "curve", "evaluations", "spikes", "optimizer_class"):
        assert whole[key] == parts[key]
    assert whole["optimizer_class"] == "sing_plugins.SING"
    assert set(whole["metrics"]) == {"valid accuracy", "test accuracy"}
    assert [point[0] for point in whole["curve"]] == list(range(1, 9))
    assert [line["step"] for line in whole["evaluations"]] == [4, 8]


def test_without_a_validation_set_only_the_test_set_is_evaluated(tiny: Path) -> None:
    assert start("swag", tiny, "tested", "--set", "data.held_out=0.0", "--set", "train.num_train_epochs=1") == 0
    made = record(tiny, "tested")
    assert (set(made["metrics"]), made["evaluations"]) == ({"test accuracy"}, [])


def test_two_processes_share_the_batch(tiny: Path) -> None:
    made = record_of_two_processes("swag", tiny)
    assert (made["status"], made["curve"][-1][0]) == ("finished", 8)
