"""Two processes and four: what each way of sharding shows the optimizer, and that SING is right or refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable

import distributed_runs
import pytest
from distributed_runs import Outcomes
from distributed_scenarios import SCENARIOS


@pytest.fixture(scope="module")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcomes]:
    @functools.cache
    def run(count: int) -> Outcomes:
        if count != 2:
            run(2)  # leaves a checkpoint
        return distributed_runs.run(count, tmp_path_factory.mktemp("distributed"))

    return run


def test_one_process_goes_on_from_a_checkpoint_of_two(outcomes_of: Callable[[int], Outcomes]) -> None:
    ((outcome,),) = ([*outcomes.values()] for outcomes in outcomes_of(1))
    assert outcome["error"] is None, outcome["error"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_processes_equal_one_or_are_refused(
    scenario: str, processes: int, outcomes_of: Callable[[int], Outcomes]
) -> None:
    for outcome in outcomes_of(processes):
        assert outcome[scenario]["error"] is None, outcome[scenario]["error"]
