"""The command lines of fairseq's tools for a configuration."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.machinery.config import Settings
from recipes.machinery.fairseq_tools import command

HELD_OUT = ("valid", "test")


@dataclass(frozen=True)
class Training:
    """The table ``[train]``; what is not explained is fairseq's flag of that name.

    Attributes:
        epochs: how many times the training set is gone through. fairseq makes new batches for every epoch, whose number
            differs a little, so that this is exact in the number of updates of the first.
        schedule: ``"cosine"`` (to zero with the last update) or ``"inverse_sqrt"``.
        warmup: updates with a linearly rising learning rate; below 1 a share of all updates.
        average: over the weights of the last so many epochs that the translations are made with; 1 for the last only.
            Losses are always the last weights'.
        cpu: whether to leave GPUs alone.
        threads: of torch on the CPU, for each process; 0 leaves it to torch.
    """

    epochs: int
    max_tokens: int
    update_freq: int = 1
    clip_norm: float = 0.0
    label_smoothing: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.05
    average: int = 1
    cpu: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Invalid train.schedule: {self.schedule!r}. Accepted: {', '.join(SCHEDULES)}.")
        for key in ("epochs", "max_tokens", "update_freq", "average"):
            if getattr(self, key) < 1:
                raise ValueError(f"Invalid train.{key}: {getattr(self, key)}. Accepted: 1 or more.")

    @property
    def processes(self) -> int:
        """That fairseq trains with: those of torchrun, or as many as there are GPUs."""
        alone = 1 if self.cpu else max(1, torch.cuda.device_count())
        return int(os.environ.get("WORLD_SIZE", alone))

    def warmup_updates(self, updates: int | str) -> int | str:
        """Of ``updates`` in all, or of as many as ``updates`` is the name of."""
        if self.warmup >= 1:
            return round(self.warmup)
        return round(self.warmup * updates) if isinstance(updates, int) else f"{self.warmup:g}*{updates}"


# schedule -> fairseq's learning rate before the first update
SCHEDULES = {"cosine": 0.0, "inverse_sqrt": 1e-7}


@dataclass(frozen=True)
class Generation:
    """The table ``[generate]``: flags of ``fairseq-generate``."""

    beam: int = 5
    lenpen: float = 1.0
    batch_size: int = 128
    max_len_a: float = 0.0
    max_len_b: int = 200


@dataclass(frozen=True)
class Tools:
    """The command lines of a run.

    Attributes:
        settings: the run's.
        binary: what ``fairseq-preprocess`` made.
        checkpoints: the folder that they are written to.
    """

    settings: Settings
    binary: Path
    checkpoints: Path

    @property
    def training(self) -> Training:
        return Training(**self.settings["train"])

    def train(self, updates: int | str, restore: Path | None = None) -> list[str]:
        """``fairseq-train``.

        Args:
            updates: how many, or a name for a number that is not known yet.
            restore: the checkpoint to go on from.
        """
        training = self.training
        flags: dict[str, Any] = {
            **self.settings["model"],
            "criterion": "label_smoothed_cross_entropy",
            "label_smoothing": training.label_smoothing,
            "max_tokens": training.max_tokens,
            "update_freq": training.update_freq,
            "clip_norm": training.clip_norm,
            **optimizer_flags(self.settings.optimizer),
            "lr_scheduler": training.schedule,
            "warmup_updates": training.warmup_updates(updates),
            "warmup_init_lr": SCHEDULES[training.schedule],
            "max_update": updates,
            "seed": self.settings.seed + 1,  # fairseq's own default is 1
            "valid_subset": ",".join(HELD_OUT),
            "update_epoch_batch_itr": "True",  # else a run that goes on has other batches than one that was not stopped
            "required_batch_size_multiple": 1,  # else what is left of the last batch is left out, of held-out sets too
            "keep_last_epochs": max(5, training.average),  # fairseq may be some ahead of its log when it is stopped
            "save_dir": self.checkpoints,
            "log_format": "json",
            "log_interval": 1,
            "num_workers": 0,
            "data_buffer_size": 0,  # else fairseq sometimes aborts when it is done
        }
        if restore:
            flags["restore_file"] = restore
        if training.cpu:
            flags |= {"cpu": True, "distributed_world_size": training.processes}
            flags |= {"distributed_backend": "gloo", "ddp_backend": "legacy_ddp"}
        if training.cpu and "RANK" in os.environ:  # fairseq takes torchrun's word for it only where there are GPUs
            flags |= {"distributed_rank": os.environ["RANK"], "distributed_init_method": "env://"}
            flags["distributed_no_spawn"] = True
        return command("fairseq-train", _dashed(flags), self.binary)

    @property
    def last(self) -> Path:
        """The checkpoint of the last update."""
        return self.checkpoints / "checkpoint_last.pt"

    @property
    def translating(self) -> Path:
        """The checkpoint that translations are made with."""
        return self.checkpoints / "average.pt" if self.training.average > 1 else self.last

    def generate(self, split: str) -> list[str]:
        """``fairseq-generate`` of a split."""
        flags: dict[str, Any] = {
            **vars(Generation(**self.settings["generate"])),
            "path": self.translating,
            "gen_subset": split,
            "remove_bpe": True,
            "required_batch_size_multiple": 1,
            "distributed_world_size": 1,  # else each GPU would be given its share, and one of them is used
        }
        if self.training.cpu:
            flags["cpu"] = True
        return command("fairseq-generate", _dashed(flags), self.binary)


def optimizer_flags(table: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's flags for the table ``[optimizer]``: options are ``--adam-betas`` for adam, ``--sing-eps`` for sing."""
    prefix = table["opt"].partition("_")[0]
    options = {f"{prefix}_{key}": str(value) for key, value in table["options"].items()}
    return {"optimizer": table["opt"], "lr": table["lr"], "weight_decay": table["weight_decay"], **options}


def _dashed(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in flags.items() if value is not False}


def updates_of(tools: Tools) -> int:
    """How many updates the run's epochs are.

    Raises:
        ValueError: fairseq-train refuses the command line; says why.
    """
    from fairseq import tasks

    cfg = parse(tools.train(1))
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train")
    batches = task.get_batch_iterator(
        task.dataset("train"),
        max_tokens=cfg.dataset.max_tokens,
        max_positions=task.max_positions(),
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        seed=cfg.common.seed,
        num_shards=tools.training.processes,
        epoch=1,
    )
    return tools.training.epochs * math.ceil(len(batches) / tools.training.update_freq)


def parse(train_command: Sequence[str]) -> Any:
    """fairseq's configuration for a ``fairseq-train`` command line.

    Raises:
        ValueError: fairseq-train refuses it; says why.
    """
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = options.parse_args_and_arch(options.get_training_parser(), list(train_command[1:]))
    except SystemExit:
        raise ValueError(f"Invalid configuration: {said.getvalue().strip().splitlines()[-1]}") from None
    return convert_namespace_to_omegaconf(args)
