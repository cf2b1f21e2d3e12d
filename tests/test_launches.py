"""What a step by torch's functions does on a CUDA device, seen through torch's fake tensors, which need none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sing_plugins import SING
from sing_plugins.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
CUDA = torch.device("cuda", 0)
ONE_BY_ONE = "adafactor"
MOST = {False: 13, True: 42}  # for all tensors; True: in a step that may merge


class Launches(TorchDispatchMode):
    """Counts what torch does on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, (list, tuple)) else (result, *args[:1])
        tensors = torch.utils._pytree.tree_leaves([found, args[:1]])
        on_device = any(isinstance(tensor, torch.Tensor) and tensor.device == CUDA for tensor in tensors)
        name = func.name()
        if on_device and not func.is_view and name.startswith("aten::") and "empty" not in name:
            self.counts[name] += 1
        return result


@pytest.fixture(autouse=True)
def fake_tensors() -> Iterator[None]:
    """A look at the entries of a fake tensor is an error."""
    with FakeTensorMode():
        yield


def on_device(shapes: list[tuple[int, ...]], **options: Any) -> SING:
    params = [nn.Parameter(torch.empty(shape, device=CUDA)) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = SING(params, weight_decay=0.1, lookahead_k=2, **options)
    optimizer.step()  # makes the state
    return optimizer


def launches_of(work: Callable[[], object]) -> Counter[str]:
    with Launches() as launches:
        work()
    return launches.counts


@pytest.mark.parametrize("implementation", ["foreach", "loop"])
@pytest.mark.parametrize("host", HOSTS)
def test_nothing_of_a_capturable_step_is_looked_at(host: str, implementation: str) -> None:
    optimizer = on_device([(4, 5), (3, 2, 2), (7,)], host=host, implementation=implementation, capturable=True)
    optimizer.param_groups[0]["lr"] = torch.empty((), device=CUDA)
    for _ in range(2):
        optimizer.step()
    kept = [state["step"] for state in optimizer.state.values()] + [
        optimizer._lookahead.phase(optimizer.param_groups[0])
    ]
    assert {tensor.device for tensor in kept} == {CUDA}


# What a step of the others asks its counters on the CPU, fake tensors cannot answer.
@pytest.mark.parametrize(
    ("host", "capturable"), [("adamw", True), ("adabelief", True), ("sgd", True), ("sgd", False)], ids=str
)
def test_a_step_by_foreach_has_two_launches_for_a_centred_tensor_and_few_for_all(host: str, capturable: bool) -> None:
    few, many = (
        launches_of(on_device([(4, 5)] * matrices + [(7,)] * vectors, host=host, capturable=capturable).step)
        for matrices, vectors in ((1, 1), (31, 51))
    )
    assert many.total() - few.total() == 2 * 30, many - few
    assert few.total() - 2 <= MOST[capturable], few


def test_a_fake_look_is_seen() -> None:
    optimizer = on_device([(4, 5)], implementation="foreach")
    optimizer.param_groups[0]["lr"] = torch.empty((), device=CUDA)
    with pytest.raises(RuntimeError):
        optimizer.step()
