"""Accelerate: a small convolutional net, in a training loop of one's own, learns handwritten digits."""

from __future__ import annotations

from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from recipes.demo.data import SPLITS, digits
from recipes.demo.plan import Choice, Train
from recipes.demo.report import OnStep, Outcome, Used

WORKLOAD = "convolutional net, digits"
METRIC = "accuracy"
STEPS = 440
BATCH = 48


def prepare(folder: Path) -> Train:
    """Nothing to prepare: scikit-learn brings the data."""
    return train


def train(choice: Choice, on_step: OnStep, steps: int = STEPS) -> Outcome:
    """Train with ``torch.optim.AdamW`` or the optimizer of that name; accuracy is in percent."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    data = {name: TensorDataset(*digits()[name]) for name in SPLITS}

    model = small_net()
    optimizer: torch.optim.Optimizer
    if choice.name == "adamw":
        optimizer = AdamW(model.parameters(), **choice.settings)
    else:
        from sing_accelerate import create_optimizer

        optimizer = create_optimizer(accelerator, model, choice.name, **choice.settings)
    loader = DataLoader(data["train"], batch_size=BATCH, shuffle=True, drop_last=True)
    scheduler = OneCycleLR(optimizer, max_lr=choice.lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    for step, (images, labels) in enumerate(islice(chain.from_iterable(repeat(loader)), steps), start=1):
        loss = cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        on_step(step, steps, loss.item())

    model.eval()
    return Outcome(Used.of(optimizer), {name: accuracy(model, *data[name].tensors) for name in SPLITS})


def small_net() -> nn.Module:
    """Three convolutions and a linear layer: about 60,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((model(images).argmax(dim=1) == labels).float().mean())
