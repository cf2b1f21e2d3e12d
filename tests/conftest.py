"""Seeds and threads for every test, and no test that silently does not run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from sing_plugins import messages

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_seeded_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    messages._said.clear()  # every test sees the lines that a process logs once
    yield
    torch.set_num_threads(threads)


# Those of many processes first: whoever is last works alone. xdist's own order goes by the number of tests.
FIRST = (
    "test_recipe_iwslt14",
    "test_wheel",
    "test_autoload",
    "test_with_fairseq",
    "test_with_transformers",
    "test_cli",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: position for position, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A skipped test is a failed one: a missing framework must not turn the suite green."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which counts as failed here: {report.longrepr}"
    return report
