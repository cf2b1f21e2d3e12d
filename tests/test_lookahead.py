"""Lookahead's slow weights where weights, options or state change between two steps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from sing_plugins import SING, sync_lookahead, wrap

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SING": SING,
    "SING, foreach": lambda params, **options: SING(params, foreach=True, **options),
    "wrapped": lambda params, lr, **options: wrap(torch.optim.AdamW(params, lr=lr, weight_decay=0.0), **options),
}
PREFIX = {"SING": "", "SING, foreach": "", "wrapped": "sing_"}


@pytest.fixture(params=OPTIMIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 3), (3,))
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def step(optimizer: Optimizer, params: list[nn.Parameter], times: int = 1) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(times):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        optimizer.step()


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def copy_no_grad(params: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


def replace_data(params: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.data = value.clone()


def load_module(params: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    module = nn.ParameterList(params)
    module.load_state_dict({str(index): value for index, value in enumerate(values)})


def initialize(params: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for param in params:
        nn.init.constant_(param, 7.0)


NOTICED = {"copy": copy_no_grad, "data": replace_data, "state dict": load_module, "init": initialize}


@pytest.mark.parametrize("change", NOTICED.values(), ids=NOTICED)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_weights_that_were_changed_from_outside_stay_where_they_are(kind: str, change: Any, steps: int) -> None:
    params = parameters()
    optimizer = OPTIMIZERS[kind](params, lr=0.1, lookahead_k=3)
    early = [param.detach().clone() for param in params]
    step(optimizer, params, 3 + steps)
    change(params, early)
    found = [param.detach().clone() for param in params]
    set_lr(optimizer, 0.0)
    step(optimizer, params, 7)
    for param, value in zip(params, found, strict=True):
        assert torch.equal(param, value)


def test_a_change_that_leaves_no_trace_is_signalled_by_sync_lookahead(kind: str) -> None:
    params = parameters()
    optimizer = OPTIMIZERS[kind](params, lr=0.1, lookahead_k=3)
    step(optimizer, params, 4)
    for param in params:
        param.data.fill_(7.0)
    sync_lookahead(optimizer)
    assert not any("lookahead_params" in state for state in optimizer.state.values())
    set_lr(optimizer, 0.0)
    step(optimizer, params, 7)
    assert all((param == 7.0).all() for param in params)


def test_what_timm_calls_after_every_epoch_is_not_ours() -> None:
    assert not hasattr(SING(parameters()), "sync_lookahead")


def test_sync_lookahead_refuses_an_optimizer_that_is_not_ours() -> None:
    with pytest.raises(TypeError, match=r"Invalid optimizer: AdamW\. Accepted: an optimizer of SING's"):
        sync_lookahead(torch.optim.AdamW(parameters()))


def test_only_what_was_changed_begins_anew(kind: str) -> None:
    """The other tensor's trajectory is that of a run in which nothing happened."""
    params, twins = parameters(), parameters()
    optimizer, twin = (OPTIMIZERS[kind](which, lr=0.1, lookahead_k=3) for which in (params, twins))
    step(optimizer, params, 4)
    step(twin, twins, 4)
    copy_no_grad(params[:1], [torch.zeros(4, 3)])
    step(optimizer, params, 5)
    step(twin, twins, 5)
    assert torch.equal(params[1], twins[1])
    assert not torch.equal(params[0], twins[0])


def test_one_line_says_that_lookahead_goes_on_from_other_weights(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = OPTIMIZERS[kind](params, lr=0.1, lookahead_k=3)
    step(optimizer, params, 7)
    assert not caplog.records
    for _ in range(2):
        copy_no_grad(params, params)
        with caplog.at_level(logging.WARNING, "sing_plugins"):
            step(optimizer, params)
    (record,) = caplog.records
    assert record.getMessage().startswith("SING: the weights of 2 tensors were changed since the last step. Lookahead")


def test_rows_appended_with_zero_padded_state_are_not_pulled_to_zero(kind: str) -> None:
    param = nn.Parameter(torch.full((2, 3), 10.0))
    optimizer = OPTIMIZERS[kind]([param], lr=0.1, lookahead_k=3)
    step(optimizer, [param], 4)
    grown = nn.Parameter(torch.cat([param.detach(), torch.full((1, 3), 10.0)]))
    state = optimizer.state.pop(param)
    for name, value in state.items():
        if value.dim():
            state[name] = torch.cat([value, torch.zeros(1, 3)])
    optimizer.state[grown] = state
    optimizer.param_groups[0]["params"] = [grown]
    found = grown.detach().clone()
    set_lr(optimizer, 0.0)
    step(optimizer, [grown], 6)
    assert torch.equal(grown, found)


def test_adapters_that_were_merged_and_begun_anew_stay_at_zero(kind: str) -> None:
    """ReLoRA: after a merge the adapter's weights and moments are set to zero."""
    params = parameters()
    optimizer = OPTIMIZERS[kind](params, lr=0.1, lookahead_k=5)
    step(optimizer, params, 8)
    for param in params:
        nn.init.zeros_(param)
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][name].zero_()
    set_lr(optimizer, 0.0)
    step(optimizer, params, 10)
    assert all((param == 0).all() for param in params)


def test_slow_weights_are_dropped_where_lookahead_is_switched_off(kind: str) -> None:
    params, twins = parameters(), parameters()
    optimizer = OPTIMIZERS[kind](params, lr=0.1, lookahead_k=2)
    key = PREFIX[kind] + "lookahead_k"
    step(optimizer, params, 3)
    optimizer.param_groups[0][key] = None
    step(optimizer, params, 20)
    assert not any("lookahead_params" in state for state in optimizer.state.values())
    # From here on it is as if Lookahead had begun at these weights, with these moments.
    fresh = OPTIMIZERS[kind](twins, lr=0.1, lookahead_k=2)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copy_no_grad(twins, [param.detach() for param in params])
    optimizer.param_groups[0][key] = fresh.param_groups[0][key] = 2
    step(optimizer, params, 5)
    step(fresh, twins, 5)
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)


@pytest.mark.parametrize("order", ["weights first", "state first"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_resuming_is_no_change_from_outside(kind: str, order: str, dtype: torch.dtype) -> None:
    params, resumed = parameters(dtype), parameters(dtype)
    optimizer = OPTIMIZERS[kind](params, lr=0.1, lookahead_k=3)
    step(optimizer, params, 4)
    second = OPTIMIZERS[kind](resumed, lr=0.1, lookahead_k=3)
    step(second, resumed, 2)  # a run of its own, which is given up
    if order == "state first":
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copy_no_grad(resumed, [param.detach() for param in params])
    if order == "weights first":
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, params, 5)
    step(second, resumed, 5)
    for param, other in zip(params, resumed, strict=True):
        assert torch.equal(param, other)


def test_a_parameter_that_has_left_the_groups_is_not_kept_alive() -> None:
    import gc
    import weakref

    params = parameters()
    optimizer = SING(params, lr=0.1)
    step(optimizer, params)
    gone = weakref.ref(params[0])
    del optimizer.state[params[0]], optimizer.param_groups[0]["params"][0], params[0]
    step(optimizer, params)
    gc.collect()
    assert gone() is None


class FailsAtTheSecond(torch.optim.SGD):
    """Moves the first parameter and then, once, raises."""

    fails = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            if self.fails and param is self.param_groups[0]["params"][1]:
                raise RuntimeError("out of memory")
            param.sub_(param.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("good", [0, 1])
def test_a_host_that_fails_in_mid_step_leaves_slow_weights_from_before_it(good: int) -> None:
    params = parameters()
    host = FailsAtTheSecond(params, lr=0.1)
    optimizer = wrap(host, lookahead_k=3)
    step(optimizer, params, good)
    before = [param.detach().clone() for param in params]
    first = before if not good else [optimizer.state[param]["lookahead_params"].clone() for param in params]
    host.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(optimizer, params)
    assert not torch.equal(params[0], before[0])  # what the host has moved stays moved
    assert torch.equal(params[1], before[1])
    assert torch.equal(optimizer.state[params[0]]["lookahead_params"], first[0])
    assert optimizer.param_groups[0]["sing_lookahead_step"] == good  # the step is not counted
    host.fails = False
    step(optimizer, params)
    for param, value in zip(params, first, strict=True):
        assert torch.equal(optimizer.state[param]["lookahead_params"], value)
