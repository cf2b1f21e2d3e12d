"""Time of whole training steps, with SING and with AdamW as a framework makes them.

MiniLM is trained by Trainer's own loop. timm's package has none: its models are trained by the few lines that its
documentation has.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
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


Steps = Callable[[], float]  # makes a step and returns its seconds


class Training(NamedTuple):
    """A model in a framework.

    Attributes:
        optimizer: makes it for a model: SING for True, else the framework's own AdamW.
        steps: of a size of the batch, with SING or not; what ends them goes to the stack.
    """

    optimizer: Callable[[bool], Optimizer]
    steps: Callable[[Size, bool, Settings, ExitStack], Steps]


def measure(settings: Settings) -> Iterator[Row]:
    """SING's training step against AdamW's, in the trainings that ``settings.batches`` names."""
    for name, size in settings.batches.items():
        yield {"training": name, "batch": list(size), **_timed(TRAININGS[name], size, settings)}
        release(settings.device)


def _timed(training: Training, size: Size, settings: Settings) -> Row:
    with ExitStack() as stack:
        works = {}
        for key in ("reference", "mine"):
            torch.manual_seed(0)
            works[key] = training.steps(size, key == "mine", settings, stack)
            works[key]()  # makes the state
        # Step by step: in the time of a cycle, the machine may have become another.
        times = in_turn(
            works,
            rounds=settings.rounds * CYCLE,
            least=settings.least_rounds * CYCLE,
            budget=settings.training_budget,
        )
    cycles = {key: _cycles(series) for key, series in times.items()}
    return against(cycles["mine"], cycles["reference"], CYCLE)


def _cycles(series: list[float]) -> list[float]:
    """Sums of Lookahead cycles; the last steps that make no whole one are left out."""
    return [sum(series[at : at + CYCLE]) for at in range(0, len(series) - CYCLE + 1, CYCLE)]


# --- timm


def _timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES)


def _by_timm(model: nn.Module, sing: bool) -> Optimizer:
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

    chosen: dict[str, Any] = {"opt": "sing_adamw", "lr": 1e-2} if sing else {"opt": "adamw", "lr": 1e-3}
    return create_optimizer_v2(model, weight_decay=5e-3, **chosen)


def _timm_steps(name: str, size: Size, sing: bool, settings: Settings, stack: ExitStack) -> Steps:
    model = _timm_model(name).to(settings.device).train()
    optimizer = _by_timm(model, sing)
    images = torch.randn(size).to(settings.device)
    labels = torch.randint(CLASSES, size[:1]).to(settings.device)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return partial(seconds, step, settings.device)


def _timm(name: str) -> Training:
    return Training(lambda sing: _by_timm(_timm_model(name), sing), partial(_timm_steps, name))


# --- Trainer


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertForSequenceClassification(config)


def _trainer(sing: bool, folder: str, on_cpu: bool, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    chosen: dict[str, Any] = {"optim": "sing_adamw", "learning_rate": 5e-3} if sing else {}
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=folder, use_cpu=on_cpu, **quiet, **chosen, **options)
    return Trainer(model=_minilm(), args=arguments)


def _by_trainer(sing: bool) -> Optimizer:
    with tempfile.TemporaryDirectory() as folder:
        optimizer: Optimizer = _trainer(sing, folder, on_cpu=True).create_optimizer()
        return optimizer


def _trainer_steps(size: Size, sing: bool, settings: Settings, stack: ExitStack) -> Steps:
    batch, length = size
    folder, on_cpu = stack.enter_context(tempfile.TemporaryDirectory()), settings.device == "cpu"
    trainer = _trainer(sing, folder, on_cpu, max_steps=10**6, per_device_train_batch_size=batch)
    trainer.train_dataset = [
        {"input_ids": torch.randint(30522, (length,)), "labels": torch.randint(2, ())} for _ in range(batch)
    ]
    steps = TrainerSteps(trainer, settings)
    stack.callback(steps.end)
    return steps


class _Ended(Exception):  # noqa: N818  # it is no error
    """There is no further step."""


class TrainerSteps:
    """Lets the loop of a Trainer, in a thread of its own, make one step at a time.

    Args:
        trainer: one that has not begun.
        settings: the run's.
    """

    def __init__(self, trainer: Any, settings: Settings) -> None:
        from transformers import TrainerCallback

        begin: SimpleQueue[bool] = SimpleQueue()
        ended: SimpleQueue[float | BaseException] = SimpleQueue()
        self._begin, self._ended = begin, ended

        class InTurn(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                if not begin.get():
                    raise _Ended
                self.begun = time.perf_counter()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if settings.device != "cpu":
                    torch.accelerator.synchronize()
                ended.put(time.perf_counter() - self.begun)

        def train() -> None:
            torch.set_num_threads(settings.threads)  # which every thread has its own of
            try:
                trainer.train()
            except _Ended:
                pass
            except BaseException as error:
                ended.put(error)

        trainer.add_callback(InTurn)
        self._thread = threading.Thread(target=train)
        self._thread.start()

    def __call__(self) -> float:
        """Make a step; returns its seconds."""
        self._begin.put(True)
        outcome = self._ended.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def end(self) -> None:
        """End the training."""
        self._begin.put(False)
        self._thread.join()


TRAININGS = {
    "ResNet18": _timm("resnet18"),
    "ViT-S": _timm("vit_small_patch16_224"),
    "MiniLM": Training(_by_trainer, _trainer_steps),
}
