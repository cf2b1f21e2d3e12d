"""Fine-tune a model to choose the ending that goes with a text, with Hugging Face's Trainer.

    python recipes/tasks/swag/train.py --model_name_or_path roberta-base --dataset swag --optim sing_adamw \\
        --learning_rate 2e-4 --weight_decay 3e-3 --num_train_epochs 4 --per_device_train_batch_size 32
    torchrun --nproc_per_node=2 recipes/tasks/swag/train.py --train_file train.csv --test_file val.csv …

Files are CSV or JSON with SWAG's columns: sent1, sent2, ending0 to ending3, label; video-id for --held_out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # instead of this folder

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice, EvalPrediction

from recipes.machinery import trainer
from recipes.machinery.trainer import Row, Script
from recipes.tasks.swag import data
from recipes.tasks.swag.data import ENDINGS


@dataclass
class Arguments(trainer.Arguments):
    max_length: int = field(default=80, metadata={"help": "of sent1, sent2 and an ending together, in tokens"})


def encode(rows: list[Row], tokenizer: Any, arguments: Arguments) -> Dataset:
    """A row for every question, with the tokens of four pairs: ``sent1``, and ``sent2`` with an ending."""

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        count = len(batch["label"])
        first = [text for text in batch["sent1"] for _ in ENDINGS]
        second = [f"{batch['sent2'][row]} {batch[name][row]}".strip() for row in range(count) for name in ENDINGS]
        encoded = tokenizer(first, second, truncation=True, max_length=arguments.max_length)
        grouped = {
            key: [values[at : at + len(ENDINGS)] for at in range(0, len(values), len(ENDINGS))]
            for key, values in encoded.items()
        }
        return {**grouped, "labels": batch["label"]}

    dataset = Dataset.from_list(rows)
    return dataset.map(pairs, batched=True, remove_columns=dataset.column_names)


def measure(dataset: Dataset, prediction: EvalPrediction, arguments: Arguments) -> dict[str, float]:
    """The share of the questions whose right ending has the highest score."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


SCRIPT = Script(
    path="recipes/tasks/swag/train.py",
    arguments=Arguments,
    model=AutoModelForMultipleChoice,
    read=data.read,
    group=lambda row: str(row.get("video-id") or row["sent1"]),
    encode=encode,
    collator=DataCollatorForMultipleChoice,
    measure=measure,
    metrics=("accuracy",),
    files=data.FILES,
)

if __name__ == "__main__":
    trainer.finetune(SCRIPT)
