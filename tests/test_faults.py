"""Gradients that are not finite, wrong options and states, steps that a scaler leaves out: nothing by halves."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import gradients, parameters, set_gradients
from torch import Tensor, nn
from torch.optim import Optimizer

from sing_plugins import SING, wrap
from sing_plugins.hosts import HOSTS

Create = Callable[[list[nn.Parameter]], Optimizer]


def sing(**options: Any) -> Create:
    return lambda params: SING(_groups(params), **{"lr": 0.1, "lookahead_k": 3, **options})


def wrapped(host: type[Optimizer], **options: Any) -> Create:
    return lambda params: wrap(host(_groups(params), lr=0.1), **{"lookahead_k": 3, **options})  # type: ignore[call-arg]


def _groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[::2]}, {"params": params[1::2]}]


def every(**options: Any) -> dict[str, Create]:
    hosts = {name: sing(host=name, **options) for name in HOSTS}
    own = {f"wrap({host.__name__})": wrapped(host, **options) for host in (torch.optim.AdamW, torch.optim.SGD)}
    return {**hosts, "adamw by foreach": sing(implementation="foreach", **options), **own}


def train(
    optimizer: Optimizer, params: list[nn.Parameter], steps: range, spoil: Callable[[int], None] = lambda _: None
) -> None:
    for step, grads in enumerate(gradients(steps.stop)):
        if step in steps:
            set_gradients(params, grads)
            spoil(step)
            optimizer.step()


def everything(optimizer: Optimizer, params: list[nn.Parameter]) -> dict[str, Any]:
    return copy.deepcopy({"weights": [param.detach() for param in params], "optimizer": optimizer.state_dict()})


def assert_equal(one: Any, other: Any, but: tuple[str, ...] = ()) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - set(but):
            assert_equal(one[key], other[key], but)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b, but)
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


COUNTS = ("skipped_steps", "sing_skipped_steps")

# --- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", every())
def test_a_skipped_step_has_not_been(name: str, entry: float, caplog: pytest.LogCaptureFixture) -> None:
    create, clean = every(nonfinite="skip")[name], parameters()
    params, other = parameters(), create(clean)
    optimizer = create(params)

    def spoil(step: int) -> None:
        if step in (2, 5):
            large = next(param for param in reversed(params) if param.numel() > 1)
            assert large.grad is not None
            large.grad.view(-1)[-1] = entry

    with caplog.at_level(logging.WARNING, "sing_plugins"):
        train(optimizer, params, range(8), spoil)
    for step, grads in enumerate(gradients(8)):
        if step not in (2, 5):
            set_gradients(clean, grads)
            other.step()
    assert_equal(everything(optimizer, params), everything(other, clean), COUNTS)
    (count,) = {group[key] for group in optimizer.state_dict()["param_groups"] for key in COUNTS if key in group}
    assert count == 2
    said = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(said) == 1
    assert "of param group 1, of shape" in said[0] or "of param group 0, of shape" in said[0]


@pytest.mark.parametrize("name", every())
def test_raising_names_a_tensor_before_anything_has_changed(name: str) -> None:
    params = parameters()
    optimizer = every(nonfinite="raise")[name](params)
    train(optimizer, params, range(2))
    before = everything(optimizer, params)
    set_gradients(params, next(gradients(1)))
    bad = next(param for param in params if param.dim() > 1 and param.numel())
    assert bad.grad is not None
    bad.grad.view(-1)[0] = math.nan
    with pytest.raises(RuntimeError, match=r"1 gradients have entries that are not finite, that of parameter \d+ of"):
        optimizer.step()
    assert_equal(everything(optimizer, params), before)


def test_a_named_parameter_is_named() -> None:
    model = nn.Linear(3, 2)
    optimizer = SING(model.named_parameters(), nonfinite="raise")
    for param in model.parameters():
        param.grad = torch.full_like(param, math.nan if param.dim() == 1 else 1.0)
    with pytest.raises(RuntimeError, match="that of bias among them"):
        optimizer.step()


@pytest.mark.parametrize("name", every())
def test_by_default_an_entry_goes_where_the_arithmetic_takes_it(name: str) -> None:
    """Over its own tensor, and no other."""
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
    optimizer = every()[name](params)
    for param in params:
        param.grad = torch.randn_like(param)
    assert params[0].grad is not None
    params[0].grad[1, 2] = math.nan
    optimizer.step()
    assert not params[0].isfinite().any()
    assert params[1].isfinite().all()


def test_one_group_may_raise_where_another_takes_it_in() -> None:
    free, watched = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SING([{"params": [free]}, {"params": [watched], "nonfinite": "raise"}])
    free.grad, watched.grad = torch.full((3,), math.nan), torch.ones(3)
    optimizer.step()
    watched.grad = torch.full((3,), math.nan)
    with pytest.raises(RuntimeError, match="parameter 0 of param group 1"):
        optimizer.step()


# --- options and gradients that are wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"), [("lr", -1.0), ("lr", math.nan), ("betas", (0.9, 1.0)), ("eps", 0), ("lookahead_k", 0)]
)
def test_a_bad_option_in_a_late_group_is_found_before_the_first_group_moves(option: str, value: Any) -> None:
    params = parameters()
    optimizer = sing()(params)
    train(optimizer, params, range(2))
    optimizer.param_groups[-1][option] = value
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=f"Invalid {option}: "):
        train(optimizer, params, range(2, 3))
    assert str(everything(optimizer, params)) == str(before)


def test_a_bad_option_of_a_wrapped_optimizer_is_found_too() -> None:
    params = parameters()
    optimizer = wrapped(torch.optim.SGD)(params)
    optimizer.param_groups[-1]["sing_lookahead_alpha"] = 2.0
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=r"Invalid lookahead_alpha: 2\.0"):
        train(optimizer, params, range(1))
    assert_equal(everything(optimizer, params), before)


@pytest.mark.parametrize("host", HOSTS)
def test_a_gradient_of_higher_precision_is_taken(host: str) -> None:
    """As autograd may leave it where a parameter's dtype was changed; a wrapped host may not be able to."""
    results = []
    for dtype in (torch.float32, torch.float64):
        param = nn.Parameter(torch.ones(4, 3))
        optimizer = sing(host=host)([nn.Parameter(torch.ones(2)), param])
        for step in range(4):
            grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            param.grad = grad
            grad.data = grad.data.to(dtype)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    optimizer = wrapped(torch.optim.AdamW)([param])
    with pytest.raises(RuntimeError, match=r"torch\.float32 has a gradient of torch\.float64"):
        optimizer.step()
    assert param.grad is grad


# --- state dicts ------------------------------------------------------------------------------------------------------


def _change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state_dict: dict[str, Any]) -> None:
        place: Any = state_dict
        *parts, last = (int(part) if part.isdecimal() else part for part in path.split("."))
        for part in parts:
            place = place[part]
        if value is None and last in place and isinstance(place, dict) and parts[0] == "param_groups":
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("param_groups.1.lr", None, "a param group has no 'lr'"),
        ("param_groups.1.lr", -1.0, "Invalid lr: -1.0"),
        ("param_groups.1.lookahead_k", -1, "Invalid lookahead_k: -1"),
        ("param_groups.1.lookahead_step", 99, "lookahead_step is 99"),
        ("param_groups.1.lookahead_step", -1, "lookahead_step is -1"),
        ("state.0", None, "the state of parameter 0 is None"),
        ("state.0.lookahead_params", torch.ones(17), r"lookahead_params of parameter 0 has the shape \(17,\)"),
        ("state.0.exp_avg", torch.ones(17), r"exp_avg of parameter 0 has the shape \(17,\)"),
        ("state.99", {"step": torch.tensor(1.0)}, "states of parameters that are in no group"),
    ],
)
def test_a_broken_state_dict_is_refused_before_anything_changes(path: str, value: Any, message: str) -> None:
    params = parameters()
    optimizer = sing()(params)
    train(optimizer, params, range(2))
    broken = copy.deepcopy(optimizer.state_dict())
    _change(path, value)(broken)
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    assert_equal(everything(optimizer, params), before)


@pytest.mark.parametrize(("option", "value"), [("sing_lookahead_k", -1), ("sing_lookahead_step", 7), ("lr", None)])
def test_a_broken_state_dict_of_a_wrapped_optimizer_is_refused(option: str, value: Any) -> None:
    params = parameters()
    optimizer = wrapped(torch.optim.AdamW)(params)
    train(optimizer, params, range(2))
    broken = copy.deepcopy(optimizer.state_dict())
    _change(f"param_groups.0.{option}", value)(broken)
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match="Invalid state_dict: "):
        optimizer.load_state_dict(broken)
    assert_equal(everything(optimizer, params), before)


# --- loss scaling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every())
def test_a_loss_scale_has_no_effect(name: str) -> None:
    results = []
    for power in (0, 8, 24):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = every()[name](list(model.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
        for step in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(everything(optimizer, list(model.parameters())))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("name", every())
def test_a_step_that_overflows_is_left_out_whole(name: str) -> None:
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
    optimizer = every()[name](params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False):
        before = everything(optimizer, params)
        optimizer.zero_grad()
        scaler.scale(sum((param * param).sum() for param in params)).backward()
        if bad:
            assert params[1].grad is not None
            params[1].grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert_equal(everything(optimizer, params), before)
    assert scaler.get_scale() == 2.0


# --- low precision ----------------------------------------------------------------------------------------------------


def regression(dtype: torch.dtype, **options: Any) -> float:
    """The loss after many steps at a small learning rate, of weights that begin at 1."""
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(256, 8, generator=generator), torch.linspace(0.5, 1.5, 8)
    weight = nn.Parameter(torch.ones(1, 8, dtype=dtype))
    optimizer = SING([weight], lr=1e-3, softplus_beta=None, **options)
    for _ in range(1500):
        optimizer.zero_grad()
        (inputs @ weight.float().T - inputs @ target[:, None]).square().mean().backward()
        optimizer.step()
    return float((inputs @ weight.float().T - inputs @ target[:, None]).square().mean())


@pytest.mark.parametrize("options", [{}, {"lookahead_k": None}, {"host": "adafactor"}], ids=str)
def test_kahan_sums_let_bfloat16_learn_what_float32_learns(options: dict[str, Any]) -> None:
    exact = regression(torch.float32, **options)
    rounded = regression(torch.bfloat16, **options)
    compensated = regression(torch.bfloat16, kahan_sum=True, **options)
    assert exact < 0.02 < 0.5 < rounded  # no weight moves
    assert compensated == pytest.approx(exact, abs=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_has_lost_is_in_the_state_and_resumes_exactly(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(4, 3, dtype=dtype)), nn.Parameter(torch.ones(5, dtype=dtype))]
    optimizer = SING(params, lr=1e-3, lookahead_k=3, kahan_sum=True)

    def step(params: list[nn.Parameter], optimizer: Optimizer, seed: int) -> None:
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.step()

    for seed in range(4):
        step(params, optimizer, seed)
    lost = [optimizer.state[param]["kahan_compensation"] for param in params]
    assert all(value.dtype == dtype and value.count_nonzero() for value in lost)
    twins = copy.deepcopy(params)
    resumed = SING(twins, lr=1e-3, lookahead_k=3, kahan_sum=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(4, 9):
        step(params, optimizer, seed)
        step(twins, resumed, seed)
    assert_equal(everything(resumed, twins), everything(optimizer, params))
    optimizer.param_groups[0]["kahan_sum"] = False
    step(params, optimizer, 9)
    assert all("kahan_compensation" not in state for state in optimizer.state.values())
