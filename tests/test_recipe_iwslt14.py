"""IWSLT14: its data, fairseq's command lines, and whole runs on a tiny archive in the official format."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import run
from recipes.machinery import config
from recipes.machinery.config import RECIPES
from recipes.machinery.run import Run
from recipes.tasks.iwslt14 import data, task, tools
from recipes.tasks.iwslt14.data import Data, Pair
from recipes.tasks.iwslt14.tools import Tools, Training

TRAIN_DE = """<url>http://www.ted.com/talks/x</url>
<keywords>sea</keywords>
<talkid>1</talkid>
<title>Jane Doe: Das Meer</title>
<description>Ein Film.</description>
 Das Meer (und mehr)!
"""
TRAIN_EN = """<url>http://www.ted.com/talks/x</url>
<keywords>sea</keywords>
<talkid>1</talkid>
<title>Jane Doe: The sea</title>
<description>A film.</description>
 The sea (and more)!
"""
DIGITS = {
    "de": "null eins zwei drei vier fünf sechs sieben acht neun",
    "en": "zero one two three four five six seven eight nine",
}
# The paper's configuration, but for its size. 2 updates are an epoch, and the weights of 5 of 6 epochs are averaged.
TINY = ["model.arch=transformer_tiny", "data.merges=40", "train.epochs=6", "train.max_tokens=400", "train.cpu=true"]


def archive(folder: Path, train: dict[str, str], segments: dict[str, list[str]]) -> Path:
    """An archive like the evaluation campaign's; each of the five sets has the same segments, after its own name."""
    file = folder / "downloads" / "de-en.tgz"
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w:gz") as tar:

        def add(name: str, text: str) -> None:
            member = tarfile.TarInfo(f"de-en/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))

        for language in ("de", "en"):
            add(f"train.tags.de-en.{language}", train[language])
            for name in ("TED.tst2010", "TED.dev2010", "TEDX.dev2012", "TED.tst2012", "TED.tst2011"):
                lines = [f'<seg id="{i}"> {name} {text} </seg>' for i, text in enumerate(segments[language], 1)]
                add(f"IWSLT14.{name}.de-en.{language}.xml", "\n".join(["<doc>", "<title>x</title>", *lines, "</doc>"]))
    return file


def numbers(count: int) -> dict[str, list[str]]:
    """Sentences to translate: digits, in words."""
    rng = random.Random(0)
    drawn = [[rng.randrange(10) for _ in range(rng.randint(4, 8))] for _ in range(count)]
    return {
        language: [" ".join(words.split()[digit] for digit in digits) for digits in drawn]
        for language, words in DIGITS.items()
    }


# ----------------------------------------------------------------------------------------------------------------- data


def test_the_archive_is_read_as_fairseqs_script_reads_it(tmp_path: Path) -> None:
    segments = {"de": ["Es war’s &amp; gut."], "en": ["It was &amp; good."]}
    train, test = data.read_iwslt14(archive(tmp_path, {"de": TRAIN_DE, "en": TRAIN_EN}, segments))
    assert train == [
        ("Jane Doe: Das Meer", "Jane Doe: The sea"),
        ("Ein Film.", "A film."),
        ("Das Meer (und mehr)!", "The sea (and more)!"),
    ]
    names = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
    assert test == [(f"{name} Es war's &amp; gut.", f"{name} It was &amp; good.") for name in names]


def test_sentences_become_lower_case_tokens_beside_the_reference_as_it_was_written() -> None:
    (pair,) = data.tokenize([("Das Meer (und mehr)!", "It's the sea &amp; more.")])
    assert pair.german == "das meer ( und mehr ) !"
    assert pair.english.startswith("it &apos;s the sea &amp;")
    assert pair.reference == "It's the sea & more."


@pytest.mark.parametrize(
    ("german", "english", "kept"),
    [(0, 1, False), (1, 1, True), (2, 3, True), (2, 4, False), (4, 2, False), (175, 175, True), (175, 176, False)],
)
def test_sentences_that_are_too_long_or_too_unequal_are_left_out(german: int, english: int, kept: bool) -> None:
    pair = Pair(" ".join("a" * german), " ".join("b" * english), "")
    assert list(data.clean([pair], 1, 175, ratio=1.5)) == [pair] * kept


def test_every_23rd_line_that_is_kept_is_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"zahl{i}" if i != 5 else "" for i in range(1, 50)]  # one is left out
    text = "".join(f"{line}\n" for line in lines)
    file = archive(tmp_path, {"de": text, "en": text}, {"de": ["a"], "en": ["b"]})
    monkeypatch.setattr(data, "fetch_iwslt14", lambda folder: file)
    corpus = data.iwslt14(Data("iwslt14", 10), tmp_path)
    assert [pair.german for pair in corpus["valid"]] == ["zahl24", "zahl47"]
    assert len(corpus["train"]) == 46
    assert len(corpus["test"]) == 5
    few = data.iwslt14(Data("iwslt14", 10, valid=1, test=2), tmp_path)
    assert (few["train"], len(few["valid"]), len(few["test"])) == (corpus["train"], 1, 2)


def test_pages_are_held_out_and_nothing_of_them_is_trained_on() -> None:
    def page(number: int) -> list[Pair]:
        own = [Pair(f"de {number} {i}", f"en {number} {i}", "") for i in range(3)]
        return [*own, own[0], Pair("hilfe", f"help {number}", ""), Pair(f"siehe {number}", "see also", "")]

    corpus = data.split_pages([page(number) for number in range(20)], valid=7, test=8)
    assert (len(corpus["valid"]), len(corpus["test"])) == (7, 8)
    assert len(corpus["train"]) > 40
    pairs = [(pair.german, pair.english) for split in corpus.values() for pair in split]
    assert len(set(pairs)) == len(pairs)
    sides = {split: {side for pair in corpus[split] for side in (pair.german, pair.english)} for split in corpus}
    assert not sides["train"] & (sides["valid"] | sides["test"])
    assert not sides["valid"] & sides["test"]


def test_another_file_than_the_campaigns_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path, {"de": TRAIN_DE, "en": TRAIN_EN}, {"de": ["a"], "en": ["b"]})
    with pytest.raises(
        SystemExit, match=r"(?s)has the md5 .*\n  curl -L .*md5 must be.* into .*downloads.*office-help"
    ):
        data.fetch_iwslt14(tmp_path)
    assert (tmp_path / "downloads" / "de-en.tgz").exists()
    missing = replace(data.ARCHIVE, urls=(f"file://{tmp_path}/nowhere.tgz",))
    monkeypatch.setattr(data, "ARCHIVE", missing)
    with pytest.raises(SystemExit, match=r"could not be had \(.*No such file"):
        data.fetch_iwslt14(tmp_path)
    assert not (tmp_path / "downloads" / "nowhere.tgz").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "wmt", "merges": 1}, "Invalid data.name: 'wmt'. Accepted: iwslt14, office-help."),
        ({"name": "office-help", "merges": 1, "valid": 3}, "Invalid data.test: 0. Accepted for office-help: >= 1."),
        ({"name": "iwslt14", "merges": 0}, "Invalid data.merges: 0"),
    ],
)
def test_data_that_there_are_not_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(**table)


# -------------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name in ("paper", "small") for label in config.labels("iwslt14", name)]
)
def test_every_optimizer_of_a_configuration_is_taken_by_fairseq(name: str, label: str, tmp_path: Path) -> None:
    settings = config.load("iwslt14", name, label)
    cfg = tools.parse(Tools(settings, tmp_path, tmp_path).train(1000))
    assert cfg.optimizer._name == settings.optimizer["opt"] in ("adam", "sing")
    assert (cfg.optimization.lr, cfg.optimizer.weight_decay) == (
        [settings.optimizer["lr"]],
        settings.optimizer["weight_decay"],
    )
    assert (cfg.lr_scheduler._name, cfg.optimization.max_update) == (settings["train"]["schedule"], 1000)
    assert cfg.model.encoder.normalize_before if hasattr(cfg.model, "encoder") else cfg.model.encoder_normalize_before
    assert Data(**settings["data"])


def test_the_papers_settings_arrive(tmp_path: Path) -> None:
    ours, theirs = (
        tools.parse(Tools(config.load("iwslt14", "paper", label), tmp_path, tmp_path).train(55_000))
        for label in ("sing", "adamw")
    )
    assert (ours.lr_scheduler.warmup_updates, theirs.lr_scheduler.warmup_updates) == (2750, 1000)
    assert ours.optimizer.sing_freeze == "layernorm"
    assert str(theirs.optimizer.adam_betas) == "(0.9, 0.98)"
    assert (ours.model.encoder_layers, ours.model.encoder_embed_dim, ours.model.dropout) == (6, 512, 0.3)
    assert (ours.dataset.max_tokens, ours.optimization.update_freq, ours.criterion.label_smoothing) == (4096, [4], 0.1)


def test_what_fairseq_does_not_know_is_refused(tmp_path: Path) -> None:
    settings = config.load("iwslt14", "small")
    settings["model"]["encoder_layer_count"] = 2
    with pytest.raises(ValueError, match="unrecognized arguments: --encoder-layer-count 2"):
        tools.parse(Tools(settings, tmp_path, tmp_path).train(1))
    with pytest.raises(ValueError, match=r"Invalid train.schedule: 'linear'. Accepted: cosine, inverse_sqrt"):
        Training(epochs=1, max_tokens=1, schedule="linear")
    with pytest.raises(ValueError, match=r"Invalid train.average: 0"):
        Training(epochs=1, max_tokens=1, average=0)


# --------------------------------------------------------------------------------------------------------- translations


def test_translations_are_put_into_the_order_of_the_data_set() -> None:
    output = "H-1\t-0.5\tb .\nD-1\t-0.5\tb .\nH-0\t-1.25\ta .\nGenerate test with beam=5: BLEU4 = 12.34, (BP=1)\n"
    assert task.read_translations(output) == (["a .", "b ."], 12.34)
    with pytest.raises(RuntimeError, match="printed 1 translations"):
        task.read_translations("H-1\t-0.5\tb\nGenerate test with beam=5: BLEU4 = 0.00, (BP=1)\n")


def test_sacrebleu_is_of_text_and_takes_no_notice_of_case() -> None:
    text = "it &apos;s the sea ( and more ) , isn &apos;t it ?"
    assert task.sacrebleu_of([text], ["It's the sea (and more), isn't it?"]) == pytest.approx(100)
    with pytest.raises(RuntimeError, match="1 translations of 2 sentences"):
        task.sacrebleu_of(["a"], ["a", "b"])


@pytest.mark.parametrize(("last", "mean"), [(10, 8.0), (11, 9.0)])
def test_the_weights_of_the_last_epochs_are_averaged(last: int, mean: float, tmp_path: Path) -> None:
    def save(name: str, updates: int) -> None:
        weights = {"w": torch.full((2,), float(updates))}
        torch.save({"model": weights, "optimizer_history": [{"num_updates": updates}]}, tmp_path / f"{name}.pt")

    for epoch in range(2, 11):
        save(f"checkpoint{epoch}", epoch)
    save("checkpoint_best", 4)
    save("checkpoint_last", last)
    of = Tools(config.load("iwslt14", "paper"), tmp_path, tmp_path)  # averages 5
    task.average(of, last)
    averaged = torch.load(of.translating)
    torch.testing.assert_close(averaged["model"]["w"], torch.full((2,), mean))
    assert averaged["optimizer_history"][-1]["num_updates"] == last


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the prepared data in it."""
    folder = tmp_path_factory.mktemp("iwslt14")
    train = {language: "".join(f"{line}\n" for line in lines) for language, lines in numbers(180).items()}
    file = archive(folder, train, {language: lines[:3] for language, lines in numbers(3).items()})
    content = file.read_bytes()
    known = replace(data.ARCHIVE, digest=hashlib.md5(content).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ARCHIVE", known)
        prepared = Data("iwslt14", 40).prepare(folder)
        assert Data("iwslt14", 40).prepare(folder) == prepared
    assert [path.name for path in prepared.parent.iterdir()] == [prepared.name]
    return folder


def arguments(folder: Path, results: str, *more: str, tiny: list[str] = TINY) -> list[str]:
    changes = [argument for change in tiny for argument in ("--set", change)]
    places = ["--data", f"{folder}", "--work", f"{folder / results}-work", "--results", f"{folder / results}"]
    return ["iwslt14", "paper", *changes, *places, *more]


def record_of(folder: Path, results: str) -> dict[str, Any]:
    (file,) = (folder / results / "iwslt14" / "paper").glob("*.json")
    record: dict[str, Any] = json.loads(file.read_text())
    return record


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, int]:
    """Exit codes of runs that other processes do, two at a time; what they say is in ``NAME.log``."""

    def python(name: str, *command: str) -> int:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (folder / f"{name}.log").open("a") as log:
            program = [sys.executable, *command]
            return subprocess.run(program, env=environment, timeout=600, stdout=log, stderr=log).returncode

    def once(results: str, *more: str, tiny: list[str] = TINY) -> int:
        return python(results, str(RECIPES / "run.py"), *arguments(folder, results, *more, tiny=tiny))

    def twice() -> int:
        stopped = once("parts", "--stop-after", "6")
        return stopped * 100 + once("parts", "--resume")

    def two_processes() -> int:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
        few = [*TINY, "train.epochs=2", "train.update_freq=2", "train.average=1"]
        return python("two", *launcher, str(RECIPES / "run.py"), *arguments(folder, "two", tiny=few))

    with ThreadPoolExecutor(2) as pool:
        jobs = {
            "parts": pool.submit(twice),
            "whole": pool.submit(once, "whole"),
            "two": pool.submit(two_processes),
            "diverged": pool.submit(once, "diverged", "--optimizer", "adamw", "--set", "optimizer.lr=1e30"),
        }
        return {name: job.result() for name, job in jobs.items()}


def test_the_papers_configuration_runs(folder: Path, runs: dict[str, int]) -> None:
    assert runs["whole"] == 0, (folder / "whole.log").read_text()
    record = record_of(folder, "whole")
    assert (record["status"], record["optimizer_class"]) == ("finished", "FairseqSING")
    names = {f"{split} {metric}" for split in ("valid", "test") for metric in ("loss", "bleu", "sacrebleu")}
    assert set(record["metrics"]) == names
    assert [evaluation["epoch"] for evaluation in record["evaluations"]] == list(range(1, 7))
    assert record["curve"][-1][0] == record["evaluations"][-1]["step"]
    assert [step for step, norm in record["gradients"] if norm > 0] == [step for step, _ in record["curve"]]
    assert record["metrics"]["test loss"] == record["evaluations"][-1]["test loss"]


def test_a_run_that_was_stopped_goes_on_exactly(folder: Path, runs: dict[str, int]) -> None:
    assert runs["parts"] == 100 * run.STOPPED, (folder / "parts.log").read_text()
    whole, parts = (record_of(folder, results) for results in ("whole", "parts"))
    assert parts.pop("seconds") != whole.pop("seconds")
    assert parts == whole


def test_two_processes_share_an_epoch(folder: Path, runs: dict[str, int]) -> None:
    assert runs["two"] == 0, (folder / "two.log").read_text()
    record, alone = record_of(folder, "two"), record_of(folder, "whole")
    assert (record["status"], record["hardware"]["processes"]) == ("finished", 2)
    assert record["evaluations"][0]["step"] == alone["evaluations"][0]["step"]
    # The four batches of the first update are the same, but for dropout.
    assert record["curve"][0] == [1, pytest.approx(alone["curve"][0][1], rel=0.02)]


def test_a_run_that_diverges_is_recorded(folder: Path, runs: dict[str, int]) -> None:
    assert runs["diverged"] == 0, (folder / "diverged.log").read_text()
    record = record_of(folder, "diverged")
    assert record["status"].startswith("diverged: ")
    assert record["metrics"] == {}


def test_a_run_without_its_checkpoint_does_not_begin_anew(folder: Path, runs: dict[str, int], tmp_path: Path) -> None:
    stopped = Run(config.load("iwslt14", "paper", changes=TINY), folder, tmp_path, None, resumed=True)
    stopped.curve.evaluate(2, {"epoch": 1})
    with pytest.raises(RuntimeError, match=r"checkpoint1.pt is not there to go on from"):
        task.train(stopped)


def test_a_dry_run_shows_the_number_of_updates_once_the_data_are_there(folder: Path) -> None:
    settings = config.load("iwslt14", "paper", changes=TINY)
    train, valid, test = task.commands(settings, folder)
    assert int(train[train.index("--max-update") + 1]) % 6 == 0
    assert [command[command.index("--gen-subset") + 1] for command in (valid, test)] == ["valid", "test"]
    first, train, *_ = task.commands(config.load("iwslt14", "paper"), folder)
    assert Path(first[0]).name == "fairseq-preprocess"
    assert train[train.index("--max-update") + 1] == "UPDATES_OF_200_EPOCHS"
