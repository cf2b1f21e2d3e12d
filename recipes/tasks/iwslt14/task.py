"""German to English with a small Transformer (paper, section 5.3). By fairseq's command-line tools."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recipes.machinery.config import Settings
from recipes.machinery.fairseq_tools import read_log, used_optimizer
from recipes.machinery.record import DivergenceError, Outcome, is_point
from recipes.tasks.iwslt14.data import Data, preprocess_command
from recipes.tasks.iwslt14.tools import HELD_OUT, Tools, updates_of

if TYPE_CHECKING:
    from recipes.machinery.run import Run

METRIC = "sacrebleu"
HIGHER_IS_BETTER = True
ON_THE_WAY = "test loss"  # of what is measured during training, what is drawn: the paper's Figure 6

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SAVED = re.compile(r"Saved checkpoint .* \(epoch (?P<epoch>\d+) @ (?P<step>\d+) updates, ")
_NOT_A_NUMBER = re.compile(r"^FloatingPointError: (.*)", re.MULTILINE)
_HYPOTHESIS = re.compile(r"^H-(?P<sentence>\d+)\t[^\t]*\t(?P<text>.*)$", re.MULTILINE)
_BLEU = re.compile(r"^Generate .*: BLEU4 = (?P<bleu>[\d.]+)", re.MULTILINE)


def commands(settings: Settings, data: Path) -> list[list[str]]:
    """What a run does: preprocess (unless that is done), train, and translate the sets that were held out."""
    folder = Data(**settings["data"]).folder(data)
    tools = Tools(settings, folder / "binary", Path("checkpoints"))
    ready = tools.binary.exists()
    updates = updates_of(tools) if ready else f"UPDATES_OF_{tools.training.epochs}_EPOCHS"
    return [
        *([] if ready else [preprocess_command(folder)]),
        tools.train(updates),
        *(tools.generate(split) for split in HELD_OUT),
    ]


def train(run: Run) -> Outcome:
    """Train and translate; metrics: ``loss`` (with label smoothing, of the last weights, in bits a token), ``bleu``
    (fairseq's, of lower-case tokens) and ``sacrebleu`` (of lower-case text)."""
    folder = Data(**run.settings["data"]).prepare(run.data)
    tools = Tools(run.settings, folder / "binary", run.work / "checkpoints")
    if tools.training.threads:
        torch.set_num_threads(tools.training.threads)
    updates = updates_of(tools)
    _follow(run, tools, updates)
    if not run.progress:  # the first process does what is left
        return Outcome({}, "")
    if tools.training.average > 1:
        average(tools, updates)
    metrics = {name: value for name, value in run.curve.evaluations[-1].items() if name.endswith(" loss")}
    for split in HELD_OUT:
        hypotheses, metrics[f"{split} bleu"] = read_translations(_output(tools.generate(split), tools))
        references = (folder / f"{split}.ref").read_text().splitlines()
        metrics[f"{split} sacrebleu"] = sacrebleu_of(hypotheses, references)
    return Outcome(metrics, used_optimizer(tools.last)[0])


def _checkpoint(run: Run, tools: Tools) -> Path | None:
    """That an interrupted run goes on from: of the epoch until which it was told of.

    Raises:
        RuntimeError: it is not there; fairseq itself would begin anew without a word.
    """
    if not run.resumed:
        return None
    file = tools.checkpoints / f"checkpoint{run.curve.evaluations[-1]['epoch']:.0f}.pt"
    if not file.exists():
        raise RuntimeError(f"{file} is not there to go on from. Remove {run.work}, or leave --resume away.")
    return file


def _follow(run: Run, tools: Tools, updates: int) -> None:
    """Run ``fairseq-train`` and tell the run what its log says.

    Raises:
        DivergenceError: losses or gradients are no numbers.
        RuntimeError: it failed.
    """
    losses: dict[str, float] = {}
    with _process(tools.train(updates, _checkpoint(run, tools)), tools.training.threads) as process:
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            tag, logged = read_log(line)
            if tag == "train_inner":
                step = int(logged["num_updates"])
                if is_point(step, updates) and "gnorm" in logged:
                    run.curve.gradient(step, float(logged["gnorm"]))
                run.step(step, updates, float(logged["loss"]))
                continue
            print(line, end="", flush=True)
            if tag in HELD_OUT:
                losses[f"{tag} loss"] = float(logged[f"{tag}_loss"])
            if saved := _SAVED.search(line):
                step = int(saved["step"])
                run.evaluation(step, {"epoch": int(saved["epoch"]), **losses})
                if step < updates:
                    run.checkpointed(step)
            if not_a_number := _NOT_A_NUMBER.match(line):
                raise DivergenceError(not_a_number[1])
    if process.returncode != 0:
        raise RuntimeError(f"fairseq-train failed with exit code {process.returncode}; its output is above.")


@contextlib.contextmanager
def _process(program: Sequence[str], threads: int, alone: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that ends before this one goes on, whatever happens here, SIGTERM included.

    Args:
        program: its command line.
        threads: as in :class:`Training`.
        alone: hide from it that this process may be one of torchrun's.
    """

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    environment = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "HF_HUB_OFFLINE": "1"}  # of this run's own checkpoints
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    inherited = {name: value for name, value in os.environ.items() if not (alone and name in _TORCHRUN)}
    try:
        with subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=inherited | environment
        ) as process:
            try:
                yield process
            except BaseException:
                process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _output(program: Sequence[str], tools: Tools) -> str:
    with _process(program, tools.training.threads, alone=True) as process:
        output, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{Path(program[0]).name} failed with exit code {process.returncode}:\n{output[-5000:]}")
    return output


def read_translations(output: str) -> tuple[list[str], float]:
    """The translations, in the order of the data set and in tokens, and the BLEU that ``fairseq-generate`` prints."""
    found = {int(match["sentence"]): match["text"] for match in _HYPOTHESIS.finditer(output)}
    score = _BLEU.search(output)
    if score is None or sorted(found) != list(range(len(found))):
        raise RuntimeError(f"fairseq-generate printed {len(found)} translations and no score:\n{output[-5000:]}")
    return [found[sentence] for sentence in range(len(found))], float(score["bleu"])


def sacrebleu_of(translations: Sequence[str], references: Sequence[str]) -> float:
    """sacreBLEU, case-insensitive, of translations in tokens and references as they were written."""
    from sacrebleu import corpus_bleu
    from sacremoses import MosesDetokenizer  # type: ignore[import-untyped]

    if len(translations) != len(references):
        raise RuntimeError(f"There are {len(translations)} translations of {len(references)} sentences.")
    moses = MosesDetokenizer(lang="en")
    texts = [moses.detokenize(translation.split()) for translation in translations]
    return corpus_bleu(texts, [list(references)], lowercase=True).score


def average(tools: Tools, updates: int) -> None:
    """Write the checkpoint ``tools.translating``, whose weights are the mean of those of the last epochs.

    Args:
        tools: of the run that wrote the checkpoints; files of anybody else must not be read, for they are pickles.
        updates: how many the run had; the last of them need not end an epoch.
    """
    files = sorted(tools.checkpoints.glob("checkpoint[0-9]*.pt"), key=lambda file: int(file.stem[len("checkpoint") :]))
    files.append(tools.last)
    saved = [torch.load(file, map_location="cpu", weights_only=False) for file in files[-tools.training.average - 1 :]]
    if _updates(saved[-2]) == updates:
        del saved[-2]  # the last checkpoint again
    models = [checkpoint["model"] for checkpoint in saved[-tools.training.average :]]
    mean = {**saved[-1], "last_optimizer_state": None}
    mean["model"] = {name: _mean([model[name] for model in models]) for name in models[0]}
    torch.save(mean, tools.translating)


def _updates(checkpoint: Mapping[str, Any]) -> int:
    return int(checkpoint["optimizer_history"][-1]["num_updates"])


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.double() for tensor in tensors]).mean(dim=0).to(tensors[0].dtype)
