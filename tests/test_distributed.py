"""Two processes: what each way of sharding shows the optimizer, and that SING is right or refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_scenarios import SCENARIOS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    directory = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).parent / "distributed_scenarios.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_equal_one_or_are_refused(scenario: str, outcomes: list[dict[str, str]]) -> None:
    for outcome in outcomes:
        assert outcome[scenario] == "as alone", outcome[scenario]
