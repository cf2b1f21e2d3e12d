"""timm: a small vision transformer learns handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recipes.demo.data import SPLITS, digits
from recipes.demo.report import OnStep, Outcome, Train, Used

WORKLOAD = "ViT (3 blocks of 96), digits"
METRIC = "accuracy"
EPOCHS = 20
BATCH = 48


def prepare(folder: Path) -> Train:
    """Nothing to prepare: scikit-learn brings the data."""
    return train


def train(optimizer_name: str, lr: float, weight_decay: float, on_step: OnStep, *, epochs: int = EPOCHS) -> Outcome:
    """Train with the optimizer of that name in timm; accuracy is in percent."""
    torch.manual_seed(0)
    data = digits()
    images, labels = data["train"]
    updates = len(images) // BATCH

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=96, depth=3
    )
    optimizer = create_optimizer_v2(model, opt=optimizer_name, lr=lr, weight_decay=weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )

    for step, batch in enumerate(batches(len(images), epochs), start=1):
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step)
        on_step(step, epochs * updates, loss.item())

    model.eval()
    return Outcome(Used.of(optimizer), {name: accuracy(model, *data[name]) for name in SPLITS})


def batches(count: int, epochs: int) -> Iterator[Tensor]:
    """Shuffled indices; the last partial batch of an epoch is dropped."""
    for _ in range(epochs):
        yield from torch.randperm(count)[: count // BATCH * BATCH].split(BATCH)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((model(images).argmax(dim=1) == labels).float().mean())
