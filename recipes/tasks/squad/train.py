"""Fine-tune a model to answer questions by a part of a text, with Hugging Face's Trainer.

    python recipes/tasks/squad/train.py --model_name_or_path bert-base-uncased --dataset squad --optim sing_adamw \\
        --learning_rate 8e-4 --weight_decay 3e-3 --num_train_epochs 3 --per_device_train_batch_size 12
    torchrun --nproc_per_node=2 recipes/tasks/squad/train.py --train_file train.json --test_file dev.json …

Files are in SQuAD's format. The metrics are SQuAD v1.1's, in percent.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # instead of this folder

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, EvalPrediction

from recipes.machinery import trainer
from recipes.machinery.trainer import Row, Script
from recipes.tasks.squad import data, metrics


@dataclass
class Arguments(trainer.Arguments):
    doc_stride: int = field(default=128, metadata={"help": "tokens that two windows of a long context have in common"})
    n_best: int = field(default=20, metadata={"help": "best first and last tokens that are combined to answers"})
    max_answer_length: int = field(default=30, metadata={"help": "in tokens"})


def encode(rows: list[Row], tokenizer: Any, arguments: Arguments) -> Dataset:
    """A row for every window of every context: tokens, the answer's first and last token, and what the metrics need.

    Where the answer is not in the window, both are token 0, the one before the text.
    """

    def windows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            [question.strip() for question in batch["question"]],
            batch["context"],
            truncation="only_second",
            max_length=arguments.max_length,
            stride=arguments.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources = encoded.pop("overflow_to_sample_mapping")
        offsets = [
            np.where(np.equal(encoded.sequence_ids(window), 1)[:, None], pairs, -1)
            for window, pairs in enumerate(encoded.pop("offset_mapping"))
        ]
        answers = [batch["answers"][source] for source in sources]
        spans = [_tokens_of(answer, tokens) for answer, tokens in zip(answers, offsets, strict=True)]
        return {
            **encoded,
            "start_positions": [start for start, _ in spans],
            "end_positions": [end for _, end in spans],
            "offsets": [tokens.tolist() for tokens in offsets],
            "question_id": [batch["id"][source] for source in sources],
            "text": [batch["context"][source] for source in sources],
            "truths": [answer["text"] for answer in answers],
        }

    dataset = Dataset.from_list(rows)
    return dataset.map(windows, batched=True, remove_columns=dataset.column_names)


def _tokens_of(answer: Row, offsets: metrics.Offsets) -> tuple[int, int]:
    """The first and last token of the first true answer; zeros where it is not all in the window."""
    begin, end = answer["answer_start"][0], answer["answer_start"][0] + len(answer["text"][0])
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or begin < offsets[inside[0], 0] or end > offsets[inside[-1], 1]:
        return 0, 0
    first = inside[offsets[inside, 1] > begin][0]
    last = inside[offsets[inside, 0] < end][-1]
    return int(first), int(last)


def measure(dataset: Dataset, prediction: EvalPrediction, arguments: Arguments) -> dict[str, float]:
    """Exact match and F1 of the questions of an encoded data set, whose windows follow each other."""
    scores: Any = prediction.predictions
    starts, ends = scores
    answers, truths = [], []
    numbered = enumerate(dataset.select_columns(["question_id", "offsets", "text", "truths"]))
    for _, group in groupby(numbered, key=lambda pair: pair[1]["question_id"]):
        windows = list(group)
        begin, end = metrics.best_span(
            ((starts[number], ends[number], np.array(window["offsets"])) for number, window in windows),
            arguments.n_best,
            arguments.max_answer_length,
        )
        answers.append(windows[0][1]["text"][begin:end])
        truths.append(windows[0][1]["truths"])
    return metrics.score(answers, truths)


SCRIPT = Script(
    path="recipes/tasks/squad/train.py",
    arguments=Arguments,
    model=AutoModelForQuestionAnswering,
    read=data.read,
    group=lambda row: str(row["title"]),
    encode=encode,
    collator=DataCollatorWithPadding,
    measure=measure,
    metrics=tuple(metrics.METRICS),
    files=data.FILES,
)

if __name__ == "__main__":
    trainer.finetune(SCRIPT)
