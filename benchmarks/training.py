"""Time of whole training steps, with SING and with AdamW as a framework makes them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.optimizers import CYCLE
from benchmarks.settings import Settings
from benchmarks.timing import Row, against, in_turn, release, seconds

CLASSES = 1000

Batch = dict[str, Tensor]
Size = tuple[int, ...]


class Training(NamedTuple):
    """A model, its data, and how its framework makes an optimizer.

    Attributes:
        model: of random weights.
        batch: of a size, on the CPU.
        loss: of a model and a batch.
        optimizer: SING for True, else the framework's own AdamW.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[Size], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    optimizer: Callable[[nn.Module, bool], Optimizer]


def measure(settings: Settings) -> Iterator[Row]:
    """SING's training step against AdamW's, in the trainings that ``settings.batches`` names."""
    for name, size in settings.batches.items():
        yield {"training": name, "batch": list(size), **_timed(TRAININGS[name], size, settings)}
        release(settings.device)


def _timed(training: Training, size: Size, settings: Settings) -> Row:
    batch = {key: value.to(settings.device) for key, value in training.batch(size).items()}
    works = {}
    for key in ("reference", "mine"):
        torch.manual_seed(0)
        model = training.model().to(settings.device).train()
        step = partial(train_step, model, training.optimizer(model, key == "mine"), training.loss, batch)
        step()  # makes the state
        works[key] = partial(seconds, step, settings.device)
    # Step by step: in the time of a cycle, the machine may have become another.
    times = in_turn(
        works,
        rounds=settings.rounds * CYCLE,
        least=settings.least_rounds * CYCLE,
        budget=settings.training_budget,
    )
    cycles = {key: _cycles(series) for key, series in times.items()}
    return against(cycles["mine"], cycles["reference"], CYCLE)


def train_step(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch
) -> None:
    """Forward, backward, step."""
    optimizer.zero_grad()
    loss(model, batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _cycles(series: list[float]) -> list[float]:
    """Sums of Lookahead cycles; the last steps that make no whole one are left out."""
    return [sum(series[at : at + CYCLE]) for at in range(0, len(series) - CYCLE + 1, CYCLE)]


def _timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES)


def _images(size: Size) -> Batch:
    return {"images": torch.randn(size), "labels": torch.randint(CLASSES, size[:1])}


def _image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["images"]), batch["labels"])


def _by_timm(model: nn.Module, sing: bool) -> Optimizer:
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

    chosen: dict[str, Any] = {"opt": "sing_adamw", "lr": 1e-2} if sing else {"opt": "adamw", "lr": 1e-3}
    return create_optimizer_v2(model, weight_decay=5e-3, **chosen)


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertForSequenceClassification(config)


def _texts(size: Size) -> Batch:
    return {"input_ids": torch.randint(30522, size), "labels": torch.randint(2, size[:1])}


def _text_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _by_trainer(model: nn.Module, sing: bool) -> Optimizer:
    from transformers import Trainer, TrainingArguments

    chosen: dict[str, Any] = {"optim": "sing_adamw", "learning_rate": 5e-3} if sing else {}
    cpu = next(model.parameters()).device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, report_to=[], use_cpu=cpu, **chosen)
        return Trainer(model=model, args=arguments).create_optimizer()


TRAININGS = {
    "ResNet18": Training(partial(_timm_model, "resnet18"), _images, _image_loss, _by_timm),
    "ViT-S": Training(partial(_timm_model, "vit_small_patch16_224"), _images, _image_loss, _by_timm),
    "MiniLM": Training(_minilm, _texts, _text_loss, _by_trainer),
}
