"""timm: a small ConvNeXt learns handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler import CosineLRScheduler  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recipes.demo.data import SPLITS, digits
from recipes.demo.plan import Choice, Train
from recipes.demo.report import OnStep, Outcome, Used

WORKLOAD = "small ConvNeXt, digits"
METRIC = "accuracy"
STEPS = 440
BATCH = 48


def prepare(folder: Path) -> Train:
    """Nothing to prepare: scikit-learn brings the data."""
    return train


def train(choice: Choice, on_step: OnStep, steps: int = STEPS) -> Outcome:
    """Train with the optimizer of that name in timm; accuracy is in percent."""
    torch.manual_seed(0)
    data = digits()
    images, labels = data["train"]

    model = timm.create_model(
        "convnext_atto",
        in_chans=1,
        num_classes=10,
        patch_size=1,
        depths=(1, 1, 1, 1),
        dims=(32, 48, 64, 96),
        ls_init_value=None,
    )
    optimizer = create_optimizer_v2(model, opt=choice.name, **choice.settings)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 20, warmup_prefix=True, t_in_epochs=False
    )

    for step, batch in zip(range(1, steps + 1), batches(len(images)), strict=False):
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step_update(step)
        on_step(step, steps, loss.item())

    model.eval()
    return Outcome(Used.of(optimizer), {name: accuracy(model, *data[name]) for name in SPLITS})


def batches(count: int) -> Iterator[Tensor]:
    """Indices, shuffled anew in each pass; the last partial batch of a pass is dropped."""
    while True:
        yield from torch.randperm(count)[: count // BATCH * BATCH].view(-1, BATCH)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((model(images).argmax(dim=1) == labels).float().mean())
