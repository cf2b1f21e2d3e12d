"""A thousand random configurations through every door: right and wrong names, options and values.

For each of them: (a) the optimizer is SING, or what was named, with exactly the options that were given, or there is an
error; (b) a failure leaves the model and all registrations as they were; (c) an error of ours names the argument and
its value; (d) what was accepted trains, and weights stay finite.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from doors import DOORS, go_through

CONFIGURATIONS = {
    "create_optimizer": 250,
    "SING": 200,
    "wrap": 100,
    "timm": 150,
    "transformers": 125,
    "fairseq": 75,
    "accelerate": 100,
}
assert sum(CONFIGURATIONS.values()) == 1000


@pytest.mark.parametrize("door", DOORS)
def test_what_a_door_is_given_is_what_comes_out_or_an_error(door: str, tmp_path: Path) -> None:
    go_through(door, tmp_path, CONFIGURATIONS[door])
