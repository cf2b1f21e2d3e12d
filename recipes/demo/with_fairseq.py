"""fairseq: a small Transformer learns to translate user-interface messages from German, by the command-line tools."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from recipes.demo.data import SPLITS, Message, fetch, read_messages, translations, words
from recipes.demo.plan import Choice, Train
from recipes.demo.report import OnStep, Outcome, Used
from recipes.machinery.data import split
from recipes.machinery.fairseq_tools import command, read_log, used_optimizer

WORKLOAD = "Transformer (2+2 layers of 128), UI messages de→en"
METRIC = "perplexity"
STEPS = 800
MODEL = {
    "arch": "transformer",
    "encoder-layers": 2,
    "encoder-embed-dim": 128,
    "encoder-ffn-embed-dim": 256,
    "encoder-attention-heads": 4,
    "decoder-layers": 2,
    "decoder-embed-dim": 128,
    "decoder-ffn-embed-dim": 256,
    "decoder-attention-heads": 4,
    "encoder-normalize-before": True,
    "decoder-normalize-before": True,
    "share-all-embeddings": True,
    "dropout": 0.1,
}
SETUP = {
    "criterion": "label_smoothed_cross_entropy",
    "label-smoothing": 0.1,
    "max-tokens": 1024,
    "valid-subset": "valid,test",
    "validate-interval": 1000,
    "save-interval": 1000,
    "no-epoch-checkpoints": True,
    "data-buffer-size": 0,
    "num-workers": 0,
    "seed": 1,
    "cpu": True,
    "log-format": "json",
    "log-interval": 1,
}


def prepare(folder: Path) -> Train:
    """Read the messages and preprocess them."""
    messages = translations(read_messages(fetch(folder / "wheels")))
    return partial(train, binary=preprocess(messages, folder / "de-en"), output=folder / "fairseq")


def preprocess(messages: Sequence[Message], folder: Path) -> Path:
    """Write the split messages in sub-words and run ``fairseq-preprocess``; returns the folder to train from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts = split(messages, held_out=250)
    segment = sub_words([text for message in parts["train"] for text in (message.german, message.english)])
    for name in SPLITS:
        (folder / f"{name}.de").write_text("".join(segment(message.german) + "\n" for message in parts[name]))
        (folder / f"{name}.en").write_text("".join(segment(message.english) + "\n" for message in parts[name]))
    options = {"source-lang": "de", "target-lang": "en", "joined-dictionary": True, "destdir": folder / "binary"}
    options |= {f"{name}pref": folder / name for name in SPLITS}
    subprocess.run(command("fairseq-preprocess", options), check=True)
    return folder / "binary"


def train(
    choice: Choice,
    on_step: OnStep,
    steps: int = STEPS,
    *,
    binary: Path,
    output: Path,
) -> Outcome:
    """Run ``fairseq-train --optimizer`` with that name and read its log and its checkpoint."""
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "optimizer": choice.name,
        "lr": choice.lr,
        "weight-decay": choice.weight_decay,
        **{f"sing-{option.replace('_', '-')}": value for option, value in choice.options.items()},
        "lr-scheduler": "cosine",
        "warmup-updates": steps // 20,
        "warmup-init-lr": 0.0,
        "max-update": steps,
        "save-dir": output,
    }
    metrics = {}
    with subprocess.Popen(
        command("fairseq-train", {**MODEL, **SETUP, **options}, binary),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    ) as process:
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            print(line, end="", flush=True)
            tag, logged = read_log(line)
            if tag == "train_inner":
                on_step(int(logged["num_updates"]), steps, float(logged["loss"]))
            elif tag in ("valid", "test"):
                metrics[tag] = float(logged[f"{tag}_ppl"])
    if process.returncode != 0:
        raise RuntimeError(f"fairseq-train failed with exit code {process.returncode}")
    return Outcome(Used(*used_optimizer(output / "checkpoint_last.pt")), metrics)


def sub_words(texts: Sequence[str], vocabulary: int = 1000) -> Callable[[str], str]:
    """Learn a byte-pair encoding; returns the function that writes a text in it, ``wo@@ rd`` for a word in two."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    end = "</w>"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<unk>"], end_of_word_suffix=end, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words(text)) for text in texts], trainer)

    def segment(text: str) -> str:
        pieces = tokenizer.encode(" ".join(words(text))).tokens
        return " ".join(piece.removesuffix(end) if piece.endswith(end) else f"{piece}@@" for piece in pieces)

    return segment
