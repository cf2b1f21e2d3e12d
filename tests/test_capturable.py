"""SING(capturable=True): what a graph of a step has to find on the device is there, and the step is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import gradients, parameters, set_gradients
from torch import Tensor, nn

from sing_plugins import SING, wrap
from sing_plugins.hosts import HOSTS

HOST_OPTIONS: list[dict[str, Any]] = [
    *({"host": name} for name in HOSTS),
    {"host": "sgd", "nesterov": True},
    {"host": "adafactor", "momentum": 0.9},
    {"host": "adamw", "softplus_relative": 1.0},
    {"host": "adamw", "softplus_beta": None},
]
IMPLEMENTATIONS = ["auto", "foreach", "loop"]


def trained(steps: int, **options: Any) -> tuple[list[nn.Parameter], SING]:
    """With a learning rate that is halved after every step."""
    params = parameters()
    lr = torch.tensor(0.1)
    optimizer = SING(params, **{"lr": lr, "weight_decay": 0.1, "lookahead_k": 3, **options})
    train(optimizer, params, steps)
    return params, optimizer


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, first: int = 0) -> None:
    for step, grads in enumerate(gradients(first + steps)):
        if step >= first:
            set_gradients(params, grads)
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", HOST_OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_step_is_the_same(options: dict[str, Any], implementation: str) -> None:
    for steps in (1, 3, 8):
        params, optimizer = trained(steps, implementation=implementation, capturable=True, **options)
        others, other = trained(steps, implementation=implementation, **options)
        for param, expected in zip(params, others, strict=True):
            torch.testing.assert_close(param, expected, rtol=2e-6, atol=1e-7)
            for name, value in other.state[expected].items():
                torch.testing.assert_close(optimizer.state[param][name], value, rtol=2e-6, atol=1e-7)
        phases = [of.state_dict()["param_groups"][0]["lookahead_step"] for of in (optimizer, other)]
        assert phases == [steps % 3] * 2


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_run_goes_on_from_either_kind_of_state(saved: bool, loaded: bool) -> None:
    params, optimizer = trained(4, capturable=saved)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = copy.deepcopy(params)
    other = SING(resumed, lr=torch.tensor(0.1), capturable=loaded)
    other.load_state_dict(state)
    assert other.param_groups[0]["capturable"] is saved  # hyper-parameters are those of the state dict
    other.param_groups[0]["capturable"] = loaded
    train(optimizer, params, 4, first=4)
    train(other, resumed, 4, first=4)
    for param, expected in zip(resumed, params, strict=True):
        torch.testing.assert_close(param, expected, rtol=2e-6, atol=1e-7)
    assert isinstance(other._lookahead.phase(other.param_groups[0]), Tensor) is loaded
    assert other.state_dict()["param_groups"][0]["lookahead_step"] == 8 % 3


def test_a_wrapped_host_that_is_capturable_has_its_phase_on_the_device_too() -> None:
    results = []
    for capturable in (True, False):
        params = parameters()
        host = torch.optim.SGD(params, lr=torch.tensor(0.1))
        for group in host.param_groups:
            group["capturable"] = capturable
        optimizer = wrap(host, lookahead_k=3)
        train(optimizer, params, 4)
        assert isinstance(optimizer._lookahead.phase(optimizer.param_groups[0]), Tensor) is capturable
        assert optimizer.state_dict()["param_groups"][0]["sing_lookahead_step"] == 1
        results.append(params)
    for param, expected in zip(*results, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no device here whose stream could be in this state."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_capture_that_would_repeat_one_step_for_ever_is_refused(request: pytest.FixtureRequest) -> None:
    params, optimizer = trained(1)
    (_, capturable), (_, unstarted) = trained(1, capturable=True), trained(0, capturable=True)
    before = copy.deepcopy(params)
    request.getfixturevalue("capture")
    with pytest.raises(RuntimeError, match="Invalid capturable: False"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for grads in gradients(1):
        set_gradients(unstarted.param_groups[0]["params"], grads)
    with pytest.raises(RuntimeError, match="some state does not exist yet"):
        unstarted.step()
    assert not unstarted.state
    capturable.step()


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_capture_that_would_look_at_gradients_is_refused_before_it_does(
    nonfinite: str, request: pytest.FixtureRequest
) -> None:
    params, optimizer = trained(1, capturable=True, nonfinite=nonfinite)
    for param in params:
        param.grad = torch.full_like(param, torch.nan)
    request.getfixturevalue("capture")
    with pytest.raises(RuntimeError, match=f"Invalid nonfinite: '{nonfinite}'"):
        optimizer.step()
    assert optimizer.param_groups[0]["skipped_steps"] == 0


def _loaded(optimizer: SING) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def _weights_set_from_outside(optimizer: SING) -> None:
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].zero_()


def _kept_elsewhere(optimizer: SING) -> None:
    for state in optimizer.state.values():
        state["step"] = state["step"].to("meta")


CHANGES: dict[str, Any] = {
    "loaded, so that the phase is not on the device": _loaded,
    "weights set from outside, so that slow weights begin anew": _weights_set_from_outside,
    "a count on another device": _kept_elsewhere,
    "momentum raised, which needs a tensor": lambda optimizer: optimizer.param_groups[0].update(momentum=0.9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_capture_that_would_make_state_anew_each_time_is_refused(change: str, request: pytest.FixtureRequest) -> None:
    _, optimizer = trained(2, capturable=True, host="adafactor")
    CHANGES[change](optimizer)
    request.getfixturevalue("capture")
    with pytest.raises(RuntimeError, match="some state does not exist yet"):
        optimizer.step()
