"""fairseq's command-line tools: how they are called, and what their logs and checkpoints say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def command(tool: str, options: dict[str, Any], *positional: Path) -> list[str]:
    """A command line of one of fairseq's tools, which are installed beside this interpreter."""
    flags: list[str] = []
    for name, value in options.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [str(Path(sys.executable).with_name(tool)), *map(str, positional), *flags]


def read_log(line: str) -> tuple[str, dict[str, Any]]:
    """Tag and values of a line that ``fairseq-train`` logged of a step or an evaluation; no values of another line."""
    parts = line.split(" | ", maxsplit=3)
    if len(parts) < 4 or parts[2] not in ("train_inner", "valid", "test"):
        return "", {}
    return parts[2], json.loads(parts[3])


def used_optimizer(checkpoint: Path) -> tuple[str, bool]:
    """What a checkpoint says about the optimizer that wrote it.

    Args:
        checkpoint: of a run of one's own; files of anybody else must not be read, for they are pickles.

    Returns:
        fairseq's class for it, and whether SING's own state is in it.
    """
    saved = torch.load(checkpoint, weights_only=False)
    state = saved["last_optimizer_state"]["state"].values()
    sing = any("lookahead_params" in tensors for tensors in state)
    return saved["optimizer_history"][-1]["optimizer_name"], sing
