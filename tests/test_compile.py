"""torch.compile(optimizer.step): one graph, the same numbers, and no new graph when lr or step changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import gradients, parameters, set_gradients
from torch import nn

from sing_plugins import SING
from sing_plugins.hosts import HOSTS

HOST_OPTIONS: list[dict[str, Any]] = [
    *({"host": name} for name in HOSTS),
    {"host": "sgd", "nesterov": True, "maximize": True},
    {"host": "adafactor", "momentum": 0.9},
    {"host": "adamw", "softplus_relative": 1.0},
    {"host": "adamw", "softplus_beta": None, "lookahead_k": None},
    {"host": "adamw", "normalize": False, "centralize": False},
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(steps: int, backend: str | None, **options: Any) -> tuple[list[nn.Parameter], SING]:
    params = parameters()
    lr = torch.tensor(0.1)
    optimizer = SING(params, **{"lr": lr, "weight_decay": 0.1, "lookahead_k": 3, **options})
    step = torch.compile(optimizer.step, backend=backend, fullgraph=True) if backend else optimizer.step
    for number, grads in enumerate(gradients(steps)):
        set_gradients(params, grads)
        # The first call makes the state; the second one sees it.
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            step()
        lr.mul_(0.8)
    return params, optimizer


def assert_close(ours: tuple[list[nn.Parameter], SING], theirs: tuple[list[nn.Parameter], SING]) -> None:
    for param, expected in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(param, expected, rtol=2e-6, atol=1e-7)
        for name, value in theirs[1].state[expected].items():
            torch.testing.assert_close(ours[1].state[param][name], value, rtol=2e-6, atol=1e-7)
    phases = [optimizer.state_dict()["param_groups"][0]["lookahead_step"] for _, optimizer in (ours, theirs)]
    assert phases[0] == phases[1]


@pytest.mark.parametrize("options", HOST_OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_compiled_step_is_one_graph_and_the_same(options: dict[str, Any]) -> None:
    assert_close(trained(7, "eager", **options), trained(7, None, **options))


def test_a_step_that_inductor_has_compiled_is_the_same() -> None:
    assert_close(trained(7, "inductor"), trained(7, None))


def test_a_compiled_step_may_follow_and_be_followed_by_others() -> None:
    params = parameters()
    optimizer = SING(params, lr=torch.tensor(0.1), lookahead_k=3)
    others = parameters()
    other = SING(others, lr=torch.tensor(0.1), lookahead_k=3)
    compiled = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for number, grads in enumerate(gradients(9)):
        for step, of in ((other.step, others), (compiled if 2 <= number < 6 else optimizer.step, params)):
            set_gradients(of, grads)
            step()
    assert_close((params, optimizer), (others, other))


def test_parameters_in_low_precision_and_in_several_groups() -> None:
    results = []
    for backend in (None, "eager"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3).to(dtype)) for dtype in (torch.float32, torch.bfloat16) for _ in "ab"]
        optimizer = SING([{"params": params[:3]}, {"params": params[3:], "lr": 1e-3}], lookahead_k=2, kahan_sum=True)
        step = torch.compile(optimizer.step, backend=backend, fullgraph=True) if backend else optimizer.step
        for _ in range(5):
            for param in params:
                param.grad = torch.randn(4, 3).to(param.dtype)
            step()
        results.append([param.detach().float() for param in params])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_what_a_graph_cannot_decide_is_refused(nonfinite: str) -> None:
    params = parameters()
    optimizer = SING(params, nonfinite=nonfinite)
    before = [param.detach().clone() for param in params]
    set_gradients(params, next(gradients(1)))
    with pytest.raises(Exception, match="no other nonfinite than 'propagate'"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened", "ds_id"])
def test_flat_pieces_are_refused(mark: str) -> None:
    param = nn.Parameter(torch.ones(5))
    setattr(param, mark, True)
    param.grad = torch.ones(5)
    with pytest.raises(Exception, match="SING needs whole tensors"):
        torch.compile(SING([param]).step, backend="eager", fullgraph=True)()
    assert torch.equal(param, torch.ones(5))
