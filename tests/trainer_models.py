"""For the recipes that use Hugging Face's Trainer: tiny models of the words of a text, and runs in this process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from recipes import run
from recipes.machinery import config

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
MODELS = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel)}


def save(folder: Path, texts: Iterable[str], kind: str = "bert") -> Path:
    """Write a model with random weights and a tokenizer that knows the texts' words; returns the folder."""
    torch.manual_seed(0)
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, model_input_names=names, **SPECIAL
    ).save_pretrained(folder)
    config_class, model_class = MODELS[kind]
    config = config_class(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=130,
        pad_token_id=0,
    )
    model_class(config).save_pretrained(folder)
    return folder


def start(task: str, tiny: Path, results: str, *more: str) -> int:
    """Run recipes/run.py with a configuration file; its folder holds everything. Returns the exit code."""
    folder = tiny.parent
    places = ["--data", str(folder), "--work", str(folder / "work"), "--results", str(folder / results)]
    return run.main([task, str(tiny), *places, *more])


def record(tiny: Path, results: str) -> dict[str, Any]:
    """The one record that was written."""
    (file,) = (tiny.parent / results).rglob("*.json")
    made: dict[str, Any] = json.loads(file.read_text())
    return made


def record_of_two_processes(task: str, tiny: Path) -> dict[str, Any]:
    """What a run in two processes wrote."""
    folder = tiny.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["recipes/run.py", task, str(tiny), "--data", str(folder)]
    command += ["--work", str(folder / "work"), "--results", str(folder / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = config.RECIPES.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return record(tiny, "two")
