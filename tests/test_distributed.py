"""Two processes and four: what each way of sharding shows the optimizer, and that SING is right or refuses."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed_scenarios import SCENARIOS

Outcomes = list[dict[str, str]]


@pytest.fixture(scope="module")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcomes]:
    @functools.cache
    def run(count: int) -> Outcomes:
        if count != 2:
            run(2)  # leaves a checkpoint
        directory = tmp_path_factory.mktemp("distributed")
        script = Path(__file__).parent / "distributed_scenarios.py"
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(count), str(directory)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        logs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, logs
        return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(count)]

    return run


def test_one_process_goes_on_from_a_checkpoint_of_two(outcomes_of: Callable[[int], Outcomes]) -> None:
    assert [list(outcome.values()) for outcome in outcomes_of(1)] == [["as alone"]], outcomes_of(1)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_processes_equal_one_or_are_refused(
    scenario: str, processes: int, outcomes_of: Callable[[int], Outcomes]
) -> None:
    for outcome in outcomes_of(processes):
        assert outcome[scenario] == "as alone", outcome[scenario]
