"""The scenarios of test_distributed with every host, of which the default run has a few."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_runs import run


def test_every_host_is_as_one_process_however_its_tensors_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARD", "1")
    for count in (2, 4):  # two leave a checkpoint for four
        directory = tmp_path / str(count)
        directory.mkdir()
        for outcome in run(count, directory, seconds=1200):
            assert [name for name, of in outcome.items() if of["error"]] == [], outcome
