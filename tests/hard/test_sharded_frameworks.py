"""Trainer with FSDP2 in two processes: hosts, kinds of checkpoints, and resumption in every phase of Lookahead."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_with_transformers import assert_sharded_as_alone


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_every_native_host_equals_one_process_and_resumes(kind: str, tmp_path: Path) -> None:
    names = ["sing_adamw", "sing_adabelief", "sing_adafactor", "sing_sgd"]
    assert_sharded_as_alone(tmp_path, kind, "3,5,6", names, within=1e-12)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_wrapped_host_equals_one_process_and_resumes(kind: str, tmp_path: Path) -> None:
    assert_sharded_as_alone(tmp_path, kind, "3,5,6", ["sing_adamw_torch", "sing_radam"], within=1e-9)
