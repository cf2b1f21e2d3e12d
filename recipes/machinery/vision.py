"""The training loop of the vision recipes: a timm model, an optimizer by name through timm, Accelerate around both.

Checkpoints are written at the ends of epochs. Every epoch begins with seeds of its own, so that a run that was
interrupted goes on exactly as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.optim import create_optimizer_v2, param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from recipes.machinery.config import Settings
from recipes.machinery.record import Outcome, class_name, is_point

if TYPE_CHECKING:
    from recipes.machinery.run import Run

Batch = Any  # what the data set gives: a tuple of tensors


@dataclass(frozen=True)
class Training:
    """The table ``[train]``.

    Attributes:
        epochs: how many times the training set is gone through.
        batch_size: of all processes together.
        warmup: share of the steps with a linearly rising learning rate.
        schedule: ``"cosine"``, ``"constant-cosine"`` (constant for 60 % of the steps, then cosine) or ``"constant"``.
        threads: of torch on the CPU, for each process; 0 leaves it to torch.
        workers: processes that load data.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        weights: ``"float32"`` or ``"bfloat16"``, in which the weights are kept.
        clip: largest norm of all gradients together; 0 for no clipping.
        gradients: tell the norms of the gradients, of all and of LayerNorms, at each point of the curve.
        evaluate_every: epochs between two evaluations on the validation set; the last is always evaluated.
    """

    epochs: int
    batch_size: int
    warmup: float = 0.05
    schedule: str = "cosine"
    threads: int = 0
    workers: int = 0
    precision: str = "no"
    weights: str = "float32"
    clip: float = 0.0
    gradients: bool = False
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Invalid train.schedule: {self.schedule!r}. Accepted: {', '.join(SCHEDULES)}.")
        if self.weights not in WEIGHTS:
            raise ValueError(f"Invalid train.weights: {self.weights!r}. Accepted: {', '.join(WEIGHTS)}.")


class Tensors(Dataset[Any]):
    """A data set that lies in memory, and is asked for whole batches.

    Args:
        tensors: of equal length.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# schedule -> share of the learning rate at the share of steps since the warm-up
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "constant-cosine": lambda progress: _cosine(max(0.0, (progress - 0.6) / 0.4)),
    "constant": lambda progress: 1.0,
}


def schedule(optimizer: Optimizer, training: Training, steps: int) -> LambdaLR:
    """The learning rate of each of the run's steps."""
    warmup = round(training.warmup * steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return SCHEDULES[training.schedule]((step - warmup) / max(1, steps - warmup))

    return LambdaLR(optimizer, share)


def create_optimizer(model: nn.Module, table: Mapping[str, Any]) -> Optimizer:
    """The optimizer of the table ``[optimizer]``, by name, with timm's rule for weight decay.

    Args:
        model: not yet prepared by Accelerate.
        table: ``opt``, ``lr``, ``weight_decay``, ``options`` and ``library``: ``"timm"`` (default) or
            ``"pytorch_optimizer"``.

    Raises:
        ValueError: an unknown library.
    """
    name, lr, weight_decay, options = table["opt"], table["lr"], table["weight_decay"], table["options"]
    library = table.get("library", "timm")
    if library == "timm":
        return create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay, **options)
    if library == "pytorch_optimizer":
        from pytorch_optimizer import load_optimizer

        build: Any = load_optimizer(name)
        groups = param_groups_weight_decay(model, weight_decay)
        optimizer: Optimizer = build(groups, lr=lr, weight_decay=weight_decay, **options)
        return optimizer
    raise ValueError(f"Invalid optimizer.library: {library!r}. Accepted: timm, pytorch_optimizer.")


def hold_out(count: int, valid: int, seed: int, train: int | None = None) -> tuple[Tensor, Tensor]:
    """Take a validation set out of a training set, at random.

    Args:
        count: of samples in the training set.
        valid: how many are held out; 0 is accepted.
        seed: of the choice.
        train: how many are kept for training; None for all that are left.

    Returns:
        Indices of the samples that are kept, and of those that are held out, in ascending order.

    Raises:
        ValueError: there are not as many samples, or none would be left.
    """
    kept = count - valid if train is None else train
    if not (valid >= 0 and 0 < kept <= count - valid):
        raise ValueError(
            f"Invalid data.train, data.valid: {train}, {valid}. There are {count} samples for both of them."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[valid : valid + kept].sort().values, order[:valid].sort().values


def commands(settings: Settings, data: Path) -> list[list[str]]:
    """How the same is started by Accelerate, on as many GPUs as it was configured for."""
    return [["accelerate", "launch", "recipes/run.py", *settings.arguments, "--data", str(data)]]


def fit(
    run: Run,
    build: Callable[[], nn.Module],
    train_set: Dataset[Any],
    loss: Callable[[nn.Module, Batch], Tensor],
    measure: Callable[[nn.Module, Batch], dict[str, Tensor]],
    held_out: Mapping[str, Dataset[Any]],
    panels: Callable[[nn.Module], Any] | None = None,
) -> Outcome:
    """Train and evaluate.

    Args:
        run: what is trained, and where it is told.
        build: makes the model; called with the run's seed set.
        train_set: the training set.
        loss: of a batch, a scalar; applies the model, and augments if it wants to.
        measure: metric → its values, one for each sample of a batch; the mean over the samples is reported.
        held_out: split → data set; ``"valid"``, if it is there, is evaluated on the way.
        panels: what the figures need, from the trained model.
    """
    training = Training(**run.settings["train"])
    if training.threads:
        torch.set_num_threads(training.threads)
    seed = run.settings.seed
    accelerator = Accelerator(
        mixed_precision=training.precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed),
    )
    set_seed(seed)
    model = build().to(WEIGHTS[training.weights])
    optimizer = create_optimizer(model, run.settings.optimizer)
    used = class_name(optimizer)
    norms = [param for module in model.modules() if isinstance(module, nn.LayerNorm) for param in module.parameters()]
    model, optimizer, loader = accelerator.prepare(model, optimizer, _loader(train_set, training, shuffle=True))
    loaders = {split: accelerator.prepare(_loader(dataset, training)) for split, dataset in held_out.items()}
    on_the_way = {split: loader for split, loader in loaders.items() if split == "valid"}
    total = training.epochs * len(loader)
    scheduler = schedule(optimizer, training, total)
    accelerator.register_for_checkpointing(scheduler)

    first_epoch = 0
    metrics: dict[str, float] = {}
    if run.resumed:
        accelerator.load_state(str(run.work / "state"))
        first_epoch = scheduler.last_epoch // len(loader)
    for epoch in range(first_epoch, training.epochs):
        set_seed(seed + 1000 * (epoch + 1), device_specific=True)
        loader.set_epoch(epoch)
        model.train()
        for position, batch in enumerate(loader, 1):
            value = loss(model, batch)
            optimizer.zero_grad()
            accelerator.backward(value)
            step = epoch * len(loader) + position
            if training.gradients and is_point(step, total):
                run.curve.gradient(step, _norm(model.parameters()), _norm(norms))
            if training.clip:
                accelerator.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            scheduler.step()
            run.step(step, total, accelerator.reduce(value.detach(), "mean").item())
        done = (epoch + 1) * len(loader)
        if on_the_way and ((epoch + 1) % training.evaluate_every == 0 or epoch + 1 == training.epochs):
            metrics = evaluate(accelerator, model, on_the_way, measure)
            run.evaluation(done, metrics)
        if epoch + 1 < training.epochs:
            accelerator.save_state(str(run.work / "state"))
            run.checkpointed(done)
    others = {split: loader for split, loader in loaders.items() if split not in on_the_way}
    metrics |= evaluate(accelerator, model, others, measure)
    model = accelerator.unwrap_model(model).eval()
    return Outcome(metrics, used, panels(model) if panels else None)


def _norm(params: Iterable[nn.Parameter]) -> float:
    """Of the gradients of parameters that have one, together."""
    return float(nn.utils.get_total_norm([param.grad for param in params if param.grad is not None]))


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loaders: Mapping[str, DataLoader[Any]],
    measure: Callable[[nn.Module, Batch], dict[str, Tensor]],
) -> dict[str, float]:
    """``"<split> <metric>"`` → its mean over all samples of the split."""
    model.eval()
    means: dict[str, float] = {}
    for split, loader in loaders.items():
        parts = [accelerator.gather_for_metrics(measure(model, batch)) for batch in loader]
        means |= {
            f"{split} {name}": torch.cat([part[name] for part in parts]).double().mean().item() for name in parts[0]
        }
    return means


def _loader(dataset: Dataset[Any], training: Training, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=training.batch_size,
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=training.workers,
        collate_fn=_whole if isinstance(dataset, Tensors) else None,
    )


def _whole(batch: Batch) -> Batch:
    return batch
