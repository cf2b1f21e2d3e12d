"""wrap(): a real optimizer around another one, and what it refuses. Its arithmetic is in test_parity."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from problems import gradients, parameters, set_gradients
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from sing_plugins import SING, wrap
from sing_plugins.wrapper import Wrapped


def filled(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [param for param in parameters(dtype) if param.numel()]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for step_grads in grads:
        set_gradients(params, [grad for grad in step_grads if grad.numel()])
        optimizer.step()


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class InitialisesWhatItHasNotSeen(torch.optim.Optimizer):
    """A user's optimizer that takes an empty state, and a missing one, for a parameter that it has not seen."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    if param not in self.state or len(self.state[param]) == 0:
                        self.state[param]["seen"] = 0
                    self.state[param]["seen"] += 1
                    param.sub_(param.grad, alpha=group["lr"])


def test_host_initialises_its_state_although_lookahead_has_some() -> None:
    params = filled()
    optimizer = wrap(InitialisesWhatItHasNotSeen(params))
    train(optimizer, params, list(gradients(7)))
    assert all(state["seen"] == 7 and "lookahead_params" in state for state in optimizer.state.values())


class ClipsInPlace(torch.optim.SGD):
    """As timm 1.0.15's Lamb does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(0.5)
        super().step()


@pytest.mark.parametrize("switches", [{}, {"normalize": False}, {"centralize": False, "normalize": False}], ids=str)
def test_a_host_that_changes_gradients_in_place_does_not_change_ours(switches: dict[str, bool]) -> None:
    params = filled()
    optimizer = wrap(ClipsInPlace(params, lr=0.1), **switches)
    for grads in gradients(3):
        grads = [grad for grad in grads if grad.numel()]
        set_gradients(params, [grad.clone() for grad in grads])
        optimizer.step()
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))


def test_scheduler_and_host_share_the_param_groups() -> None:
    params = filled()
    host = torch.optim.SGD(params, lr=1.0)
    optimizer = wrap(host)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.1)
    train(optimizer, params, list(gradients(1)))
    scheduler.step()
    assert host.param_groups[0]["lr"] == pytest.approx(0.1)


def test_scheduler_that_cycles_momentum_reaches_the_host() -> None:
    params = filled()
    optimizer = wrap(torch.optim.SGD(params, lr=1.0, momentum=0.9))
    OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    assert optimizer.host.param_groups[0]["momentum"] == 0.95


def test_late_group_goes_to_the_host_and_can_override_options() -> None:
    params = filled()
    optimizer = wrap(torch.optim.Adam(params[:2], lr=0.1))
    optimizer.add_param_group({"params": params[2:], "sing_lookahead_k": None, "lr": 0.2})
    train(optimizer, params, list(gradients(1)))
    assert "lookahead_params" in optimizer.state[params[0]]
    assert "lookahead_params" not in optimizer.state[params[2]]
    with pytest.raises(ValueError, match="Invalid lookahead_k: 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "sing_lookahead_k": 0})
    assert len(optimizer.param_groups) == 2


def test_gradient_is_given_back_even_if_the_host_fails() -> None:
    param = nn.Parameter(torch.ones(3))
    host = torch.optim.SGD([param], lr=0.1)
    optimizer = wrap(host)
    grad = param.grad = torch.full((3,), 5.0)

    def fail(*_: object) -> None:
        raise KeyError("host")

    host.register_step_pre_hook(fail)
    with pytest.raises(KeyError):
        optimizer.step()
    assert param.grad is grad
    assert torch.equal(param.grad, torch.full((3,), 5.0))


def test_closure_is_called_once_and_the_host_does_not_see_it() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = wrap(torch.optim.Adam([param]))
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(param.square().sum())
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1


@pytest.mark.parametrize("stop", range(1, 12))
def test_resume_is_exact_at_every_phase_of_the_lookahead_cycle(stop: int, tmp_path: Path) -> None:
    grads = list(gradients(17))
    whole, params = filled(), filled()
    train(wrap(timm.optim.Lamb(whole, lr=0.05)), whole, grads)
    optimizer = wrap(timm.optim.Lamb(params, lr=0.05))
    train(optimizer, params, grads[:stop])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    resumed_params = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = wrap(timm.optim.Lamb(resumed_params, lr=0.05))
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, resumed_params, grads[stop:])
    assert_same(resumed_params, whole)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue_the_same_trajectory(copier: Any) -> None:
    params, grads = filled(), list(gradients(12))
    optimizer = wrap(torch.optim.NAdam(params, lr=0.05))
    train(optimizer, params, grads[:7])
    twin = copier(optimizer)
    train(optimizer, params, grads[7:])
    train(twin, twin.param_groups[0]["params"], grads[7:])
    assert_same(params, twin.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda p: torch.optim.Adam(p), "saved by an optimizer without SING"),
        (
            lambda p: wrap(torch.optim.RAdam(p)),
            r"saved by SING with the host 'torch\.RAdam', but this is SING with the host 'torch\.Adam'",
        ),
        (lambda p: SING(p), "saved by an optimizer without SING"),
    ],
    ids=["host alone", "another host", "SING"],
)
def test_state_dict_of_another_optimizer_is_refused_unchanged(save: Any, message: str) -> None:
    params = filled()
    optimizer = wrap(torch.optim.Adam(params, lr=0.05), lookahead_k=3)
    train(optimizer, params, list(gradients(1)))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(save(filled()).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


def test_low_precision_host_sees_gradients_of_its_dtype() -> None:
    params = filled(torch.bfloat16)
    optimizer = wrap(torch.optim.Adam(params, lr=0.01))
    train(optimizer, params, [[g.bfloat16() for g in grads] for grads in gradients(6)])
    assert all(torch.isfinite(param).all() for param in params)


def test_gradient_scaler_of_mixed_precision_unscales_before_the_host_sees_the_gradient() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = wrap(torch.optim.Adam([param]))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((param * torch.tensor([1.0, float("nan"), 1.0])).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(param, torch.ones(3))
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def one() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


class InBackward(torch.optim.SGD):
    def fused_backward(self, loss: Tensor, lr: float) -> None:
        raise NotImplementedError


class TrainAndEval(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


REFUSED = {
    "closure": (lambda: torch.optim.LBFGS(one()), "calls the closure by itself"),
    "sparse": (lambda: torch.optim.SparseAdam(one()), "wants sparse gradients"),
    "SING": (lambda: SING(one()), "already standardizes"),
    "wrapped": (lambda: wrap(torch.optim.Adam(one())), "already standardizes"),
    "second order": (lambda: timm.optim.Adahessian(one()), "second-order"),
    "Lookahead": (lambda: timm.optim.Lookahead(torch.optim.SGD(one(), lr=0.1)), "itself a wrapper"),
    "backward": (lambda: InBackward(one()), "during backward"),
    "train and eval": (lambda: TrainAndEval(one()), r"train\(\) and eval\(\)"),
    "no optimizer": (lambda: torch.optim.SGD, "Invalid optimizer: .*Accepted: a torch.optim.Optimizer instance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_optimizers_that_cannot_be_wrapped_are_refused_with_the_reason(case: str) -> None:
    create, reason = REFUSED[case]
    with pytest.raises(TypeError, match=reason):
        wrap(create())


@pytest.mark.parametrize(
    "option", [{"norm_eps": 0.0}, {"lookahead_k": 0}, {"centralize": 1}, {"lookahead_alpha": 2}], ids=str
)
def test_invalid_options_name_the_argument_and_its_value(option: dict[str, Any]) -> None:
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
        wrap(torch.optim.SGD(one()), **option)


def test_parameters_replaced_by_a_flat_partition_are_refused() -> None:
    optimizer = wrap(torch.optim.Adam([nn.Parameter(torch.ones(2, 3))]))
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(6))]
    with pytest.raises(RuntimeError, match="SING needs whole tensors"):
        optimizer.step()


def test_wrapped_optimizer_is_a_torch_optimizer() -> None:
    optimizer = wrap(torch.optim.Adam(one()))
    assert isinstance(optimizer, Wrapped)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert repr(optimizer).startswith("Wrapped Adam (")


def test_global_hooks_of_torch_see_one_step_with_the_users_gradients() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params = filled()
    host = torch.optim.Adam(params, lr=0.05)
    own: list[str] = []
    host.register_step_pre_hook(lambda *_: own.append("before"))
    host.register_step_post_hook(lambda *_: own.append("after"))
    torch.optim.lr_scheduler.LambdaLR(host, lambda step: 1.0)  # replaces the step of the instance
    optimizer = wrap(host)
    seen: list[tuple[str, Any, list[Tensor | None]]] = []

    def note(when: str) -> Any:
        return lambda stepped, args, kwargs: seen.append((when, stepped, [param.grad for param in params]))

    handles = [register_optimizer_step_pre_hook(note("before")), register_optimizer_step_post_hook(note("after"))]
    try:
        for param in params:
            param.grad = torch.ones_like(param)
        grads = [param.grad for param in params]
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert [(when, stepped) for when, stepped, _ in seen] == [("before", optimizer), ("after", optimizer)]
    for _, _, found in seen:
        assert all(one is other for one, other in zip(found, grads, strict=True))
    assert own == ["before", "after"]


def test_a_host_whose_step_was_replaced_is_stepped_by_what_replaced_it() -> None:
    params = filled()
    host = torch.optim.SGD(params, lr=0.05)
    calls = []
    host.step = lambda closure=None: calls.append("mine")  # type: ignore[assignment, method-assign]
    wrap(host).step()
    assert calls == ["mine"]


def test_state_of_another_packages_optimizer_of_the_same_name_is_refused() -> None:
    import timm.optim

    saved = wrap(timm.optim.Adafactor(filled(), lr=0.05)).state_dict()
    optimizer = wrap(torch.optim.Adafactor(filled(), lr=0.05))
    with pytest.raises(
        ValueError, match=r"saved by SING with the host 'timm\.Adafactor', but this .* 'torch\.Adafactor'"
    ):
        optimizer.load_state_dict(saved)
    for group in saved["param_groups"]:
        group["sing_host"] = "Adafactor"  # as earlier versions saved it, for either
    wrap(timm.optim.Adafactor(filled(), lr=0.05)).load_state_dict(saved)


def test_slow_weights_of_another_model_and_states_without_a_parameter_are_refused_unchanged() -> None:
    params = filled()
    optimizer = wrap(torch.optim.Adam(params, lr=0.05), lookahead_k=3)
    train(optimizer, params, list(gradients(1)))
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][0]["lookahead_params"] = torch.zeros(2, 2)
    extra = copy.deepcopy(before)
    extra["state"][99] = extra["state"][0]
    for broken, message in ((wrong, "lookahead_params of parameter 0 has the shape"), (extra, "in no group: .'99'")):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(broken)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
