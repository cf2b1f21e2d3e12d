"""SING as a torch optimizer: inputs, errors, state."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import gradients, parameters, set_gradients
from torch import Tensor, nn
from torch.optim import Optimizer

from sing_plugins import SING, create_optimizer, wrap
from sing_plugins.hosts import HOSTS

PUBLISHED = Path(__file__).parent / "data" / "published_sing_step7.pt"


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for step_grads in grads:
        set_gradients(params, step_grads)
        optimizer.step()


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_gradients_are_not_changed_and_not_kept() -> None:
    params = parameters()
    optimizer = SING(params, centralize=False, normalize=False)
    grads = next(gradients(1))
    set_gradients(params, grads)
    optimizer.step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))
    kept = {value.data_ptr() for state in optimizer.state.values() for value in state.values() if value.numel()}
    assert not kept & {param.grad.data_ptr() for param in params if param.numel()}


def test_state_is_made_at_the_first_step_only_and_for_parameters_with_a_gradient_only() -> None:
    params = parameters()
    optimizer = SING(params)
    assert not optimizer.state
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    assert list(optimizer.state) == [params[2]]


def test_generator_of_parameters_is_read_once() -> None:
    reads = []

    def generate() -> Iterator[nn.Parameter]:
        for param in parameters():
            reads.append(param)
            yield param

    optimizer = SING(generate())
    assert optimizer.param_groups[0]["params"] == reads


def test_named_parameters_and_late_groups_with_their_own_options_are_taken() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = SING(model[0].named_parameters(), lr=0.1)
    late = {"params": list(model[1].named_parameters()), "lr": 0.0, "lookahead_k": None}
    optimizer.add_param_group(late)
    assert optimizer.param_groups[1]["param_names"] == ["weight", "bias"]
    before = copy.deepcopy(model)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[1].weight, before[1].weight)
    assert "lookahead_params" not in optimizer.state[model[1].weight]


def test_parameter_without_gradient_keeps_its_place_in_the_cycle() -> None:
    """Its slow weights are merged only at a step at which it has a gradient, as in the published optimizer."""
    param, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = SING([param, other], lr=0.1, lookahead_k=2)
    for step in range(4):
        param.grad = None if step == 1 else torch.ones(3)
        other.grad = torch.ones(3)
        optimizer.step()
        if step == 1:
            assert torch.equal(optimizer.state[param]["lookahead_params"], torch.zeros(3))
    assert torch.equal(optimizer.state[param]["lookahead_params"], param)


def test_closure_is_called_once_with_gradients_enabled_and_its_loss_is_returned() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = SING([param])
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert not torch.equal(param, torch.ones(3))


def test_tensor_learning_rate_equals_the_same_number() -> None:
    results = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        params = parameters()
        train(SING(params, lr=lr, weight_decay=0.1), params, list(gradients(6)))
        results.append(params)
    assert_same(*results)


def test_maximize_goes_the_opposite_way() -> None:
    down, up = parameters(), parameters()
    down_optimizer, up_optimizer = SING(down), SING(up, maximize=True)
    for grads in gradients(6):
        set_gradients(down, grads)
        set_gradients(up, [-grad for grad in grads])
        down_optimizer.step()
        up_optimizer.step()
    assert_same(down, up)


@pytest.mark.parametrize("host", HOSTS)
def test_zero_gradients_change_nothing(host: str) -> None:
    for softplus_beta in (50.0, None):
        options = {} if host == "sgd" else {"softplus_beta": softplus_beta}
        params = parameters(torch.float32)
        before = [param.detach().clone() for param in params]
        optimizer = SING(params, lr=0.1, host=host, **options)
        train(optimizer, params, [[torch.zeros_like(param) for param in params]] * 7)
        assert_same(params, before)


@pytest.mark.parametrize("host", HOSTS)
def test_memory_layout_does_not_matter(host: str) -> None:
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    layouts = [
        weight.clone(),
        weight.clone(memory_format=torch.channels_last),
        weight.repeat_interleave(2, dim=3)[..., ::2],
    ]
    params = [nn.Parameter(layout) for layout in layouts]
    assert [param.is_contiguous() for param in params] == [True, False, False]
    optimizer = SING(params, lr=0.1, host=host)
    for _ in range(7):
        grad = torch.randn_like(weight)
        for param, layout in zip(
            params, (torch.contiguous_format, torch.channels_last, torch.contiguous_format), strict=True
        ):
            param.grad = grad.clone(memory_format=layout)
        optimizer.step()
    for param in params[1:]:
        torch.testing.assert_close(param, params[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_low_precision_parameters_are_updated_in_float32(host: str, dtype: torch.dtype) -> None:
    """They are the float32 trajectory, rounded once a step."""
    low = parameters(dtype)
    optimizer = SING(low, lr=1e-3, host=host, lookahead_k=None)
    for grads in gradients(6, dtype):
        exact = [nn.Parameter(param.detach().float()) for param in low]
        exact_optimizer = SING(exact, lr=1e-3, host=host, lookahead_k=None)
        for param, twin in zip(low, exact, strict=True):
            exact_optimizer.state[twin] = copy.deepcopy(optimizer.state[param]) if param in optimizer.state else {}
        set_gradients(low, grads)
        set_gradients(exact, [grad.float() for grad in grads])
        optimizer.step()
        exact_optimizer.step()
        assert_same(low, [param.detach().to(dtype) for param in exact])
    assert all(value.dtype == torch.float32 for state in optimizer.state.values() for value in state.values())


def test_gradient_scaler_skips_and_unscales_as_for_any_optimizer() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = SING([param], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((param * torch.tensor([1.0, float("inf"), 1.0])).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(param, torch.ones(3))
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


# --- errors ---------------------------------------------------------------------------------------------------------

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, "Invalid lr: -0.1"),
    ({"lr": float("nan")}, "Invalid lr: nan"),
    ({"lr": True}, "Invalid lr: True"),
    ({"lr": torch.tensor([0.1, 0.2])}, r"Invalid lr: 'a tensor of shape \(2,\)'"),
    ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ({"betas": (1.0, 0.9)}, r"Invalid betas: \(1.0, 0.9\)"),
    ({"betas": (0.9, 0.9, 0.9)}, "two numbers in"),
    ({"betas": 0.9}, "Invalid betas: 0.9"),
    ({"eps": 0.0}, "Invalid eps: 0.0"),
    ({"weight_decay": -1}, "Invalid weight_decay: -1"),
    ({"host": "adam"}, "Invalid host: 'adam'. Accepted: adamw, adabelief, adafactor, sgd"),
    ({"host": "sgd", "momentum": 1.0}, "Invalid momentum: 1.0"),
    ({"host": "sgd", "momentum": 0.0, "nesterov": True}, "Invalid nesterov: True with momentum 0"),
    ({"host": "sgd", "betas": (0.9, 0.9)}, "The host 'sgd' has no betas"),
    ({"host": "sgd", "softplus_beta": 20.0}, "Invalid softplus_beta: 20.0. The host 'sgd'"),
    ({"momentum": 0.9}, r"The host 'adamw' has no momentum \(adafactor, sgd have it\)"),
    ({"host": "adafactor", "decay_rate": -0.8}, "Invalid decay_rate: -0.8"),
    ({"host": "adafactor", "clip_threshold": 0}, "Invalid clip_threshold: 0"),
    ({"softplus_beta": 0}, "Invalid softplus_beta: 0"),
    ({"softplus_relative": -1.0}, "Invalid softplus_relative: -1.0"),
    ({"host": "sgd", "softplus_relative": 1.0}, "Invalid softplus_relative: 1.0. The host 'sgd'"),
    ({"softplus_relative": 1.0, "softplus_beta": 20.0}, "Invalid softplus_beta: 20.0 with softplus_relative=1.0"),
    ({"softplus_relative": 1.0, "softplus_beta": None}, "Invalid softplus_beta: None with softplus_relative=1.0"),
    ({"softplus_relative": 1.0, "normalize": False}, "Invalid normalize: False with softplus_relative=1.0"),
    ({"lookahead_k": 0}, "Invalid lookahead_k: 0"),
    ({"lookahead_k": 2.5}, "Invalid lookahead_k: 2.5"),
    ({"lookahead_alpha": 0.0}, "Invalid lookahead_alpha: 0.0"),
    ({"lookahead_alpha": 1.5}, "Invalid lookahead_alpha: 1.5"),
    ({"centralize": "False"}, "Invalid centralize: 'False'"),
    ({"normalize": 1}, "Invalid normalize: 1"),
    ({"foreach": "yes"}, "Invalid foreach: 'yes'"),
    ({"maximize": None}, "Invalid maximize: None"),
    ({"decay_all": 1}, "Invalid decay_all: 1"),
    ({"centralize_rows_of_one": 1}, "Invalid centralize_rows_of_one: 1"),
]


@pytest.mark.parametrize(("options", "message"), INVALID, ids=str)
def test_invalid_options_name_the_argument_and_its_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SING(parameters(), **options)


def test_invalid_group_is_refused_before_anything_changes() -> None:
    optimizer = SING(parameters())
    for group in ({"lr": -1.0}, {"host": "sgd"}, {"lookahead_k": "5"}):
        with pytest.raises(ValueError, match=re.escape(str(next(iter(group.values()))))):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **group})
    assert len(optimizer.param_groups) == 1


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="weight_decy"):
        SING(parameters(), weight_decy=0.1)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused_before_any_parameter_changes(kind: str) -> None:
    fine = nn.Parameter(torch.ones(3))
    if kind == "sparse":
        bad = nn.Embedding(4, 3, sparse=True)
        bad(torch.tensor([1])).sum().backward()
        param = bad.weight
    else:
        param = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        param.grad = torch.ones_like(param)
    fine.grad = torch.ones(3)
    optimizer = SING([fine, param])
    with pytest.raises(RuntimeError, match=f"does not support {kind} gradients"):
        optimizer.step()
    assert torch.equal(fine, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("count", [1, 2])
def test_parameters_replaced_by_a_flat_partition_are_refused(count: int) -> None:
    """What DeepSpeed ZeRO-1 and ZeRO-2 do to a group, without leaving any mark."""
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))][:count]
    optimizer = SING(params)
    flat = nn.Parameter(torch.ones(6))
    flat.grad = torch.ones(6)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="SING needs whole tensors"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(6))


def test_parameters_replaced_by_whole_ones_without_what_was_frozen_are_taken() -> None:
    """What DeepSpeed does at stage 0, whose copies in float32 leave out what is not trained."""
    frozen, *others = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,), (3, 2)))
    optimizer = SING([frozen.requires_grad_(False), *others])
    copies = [nn.Parameter(param.detach().clone()) for param in others]
    optimizer.param_groups[0]["params"] = copies
    for param in copies:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert not any(torch.equal(param, torch.ones_like(param)) for param in copies)


def test_a_group_can_be_added_between_steps() -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (4,), (2, 2))]
    optimizer = SING(params[:1])
    for param in params:
        if param is not params[0]:
            optimizer.add_param_group({"params": [param]})
        for trained in params:
            trained.grad = torch.randn(trained.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [6, 4, 2]


def flattened(optimizer: Optimizer) -> tuple[Optimizer, nn.Parameter]:
    flat = nn.Parameter(torch.ones(9))
    flat.grad = torch.ones(9)
    optimizer.param_groups[0]["params"] = [flat]
    return optimizer, flat


def loaded(optimizer: Optimizer) -> Optimizer:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def one_group_more(optimizer: Optimizer) -> Optimizer:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    return optimizer


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("create", [SING, lambda params: wrap(torch.optim.Adam(params))], ids=["SING", "wrap"])
@pytest.mark.parametrize("between", [lambda it: it, loaded, copy.deepcopy, one_group_more])
def test_a_flat_partition_is_refused_whatever_came_before_it(
    steps: int, create: Callable[[Any], Optimizer], between: Callable[[Optimizer], Optimizer]
) -> None:
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]
    optimizer = create(params)
    for _ in range(steps):
        set_gradients(params, [torch.ones(2, 3), torch.ones(3)])
        optimizer.step()
    optimizer, flat = flattened(between(optimizer))
    with pytest.raises(RuntimeError, match=r"SING needs whole tensors.*ZeRO-1/2.*Use DDP, .*ZeRO stage 0"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(9))


@pytest.mark.parametrize("after", [loaded, copy.deepcopy, one_group_more])
def test_a_flat_partition_is_refused_whatever_comes_after_it(after: Callable[[Optimizer], Optimizer]) -> None:
    optimizer, _ = flattened(SING([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]))
    optimizer = after(optimizer)
    for group in optimizer.param_groups:
        set_gradients(group["params"], list(map(torch.ones_like, group["params"])))
    with pytest.raises(RuntimeError, match="SING needs whole tensors"):
        optimizer.step()
    assert all(
        torch.equal(param, torch.ones_like(param)) for group in optimizer.param_groups for param in group["params"]
    )


def test_groups_without_parameters_may_go() -> None:
    """DeepSpeed drops them at every stage."""
    params = [nn.Parameter(torch.ones(2, 3))]
    optimizer = SING([{"params": []}, {"params": params}], lr=0.1)
    optimizer.param_groups[:] = optimizer.param_groups[1:]
    set_gradients(params, [torch.arange(6.0).reshape(2, 3)])
    optimizer.step()
    assert not torch.equal(params[0], torch.ones(2, 3))


def test_parameters_marked_by_zero_3_are_refused() -> None:
    param = nn.Parameter(torch.empty(0))
    param.ds_id = 0  # type: ignore[attr-defined]
    param.grad = torch.empty(0)
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO-3"):
        SING([param]).step()


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_resume_is_exact_at_every_phase_of_the_lookahead_cycle(host: str, dtype: torch.dtype, tmp_path: Path) -> None:
    grads = list(gradients(17, dtype))
    whole = parameters(dtype)
    train(SING(whole, lr=0.05, weight_decay=0.1, host=host), whole, grads)
    for stop in range(1, 12):
        params = parameters(dtype)
        optimizer = SING(params, lr=0.05, weight_decay=0.1, host=host)
        train(optimizer, params, grads[:stop])
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

        resumed_params = [nn.Parameter(param.detach().clone()) for param in params]
        resumed = SING(resumed_params, lr=0.05, weight_decay=0.1, host=host)
        resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        train(resumed, resumed_params, grads[stop:])
        assert_same(resumed_params, whole)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue_the_same_trajectory(copier: Any) -> None:
    params, grads = parameters(), list(gradients(12))
    optimizer = SING(params, lr=0.05)
    train(optimizer, params, grads[:7])
    twin = copier(optimizer)
    train(optimizer, params, grads[7:])
    train(twin, twin.param_groups[0]["params"], grads[7:])
    assert_same(params, twin.param_groups[0]["params"])


@pytest.mark.parametrize("constructed_with", [{}, {"softplus_relative": 4.0}, {"softplus_beta": None}], ids=str)
def test_state_dict_of_the_published_optimizer_continues_its_trajectory(constructed_with: dict[str, Any]) -> None:
    """The file was written by the optimizer published with the paper, 7 steps into a run of two groups.

    It ran with float64 as the default dtype, since it takes the bias corrections from a tensor of the default dtype.
    What remains is torch's softplus, which becomes the identity above βx = 20: an error below 1e-10.
    """
    published = torch.load(PUBLISHED, weights_only=True)
    params = [nn.Parameter(param) for param in published["params"]]
    optimizer = SING([{"params": params[:2]}, {"params": params[2:]}], **constructed_with)
    optimizer.load_state_dict(published["state_dict"])
    assert [group["lookahead_step"] for group in optimizer.param_groups] == [2, 2]
    for grads, expected in zip(published["grads"], published["trajectory"], strict=True):
        set_gradients(params, grads)
        optimizer.step()
        for param, value in zip(params, expected, strict=True):
            torch.testing.assert_close(param.detach(), value, rtol=1e-8, atol=1e-10)
    optimizer.load_state_dict(optimizer.state_dict())  # from here on it is ours


def test_published_state_dict_keeps_its_switches() -> None:
    published = torch.load(PUBLISHED, weights_only=True)
    published["state_dict"]["param_groups"][0].update(softplus=False, lookahead_active=False, grad_norm=False)
    params = [nn.Parameter(param) for param in published["params"]]
    optimizer = SING([{"params": params[:2]}, {"params": params[2:]}], softplus_relative=4.0)
    optimizer.load_state_dict(published["state_dict"])
    group = optimizer.param_groups[0]
    assert (group["softplus_beta"], group["lookahead_k"], group["normalize"]) == (None, None, False)
    assert optimizer.param_groups[1]["softplus_beta"] == 50.0


def test_state_dict_of_another_host_is_refused_unchanged() -> None:
    params = parameters()
    optimizer = SING(params, host="sgd")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="saved by SING with the host 'adamw', but this is SING with the host 'sgd'"):
        optimizer.load_state_dict(SING(parameters()).state_dict())
    assert optimizer.state_dict() == before


def test_state_dict_of_an_ordinary_optimizer_is_refused() -> None:
    """As when a run with AdamW is resumed with SING: its moments are those of gradients of another scale."""
    with pytest.raises(ValueError, match="saved by an optimizer without SING"):
        SING(parameters()).load_state_dict(torch.optim.AdamW(parameters()).state_dict())


def test_lookahead_can_be_switched_on_in_mid_run() -> None:
    params = parameters()
    optimizer = SING(params, lookahead_k=None)
    grads = list(gradients(8))
    train(optimizer, params, grads[:3])
    optimizer.param_groups[0]["lookahead_k"] = 2
    train(optimizer, params, grads[3:5])
    assert all("lookahead_params" in state for state in optimizer.state.values())


def test_momentum_schedule_may_start_at_zero() -> None:
    params = parameters()
    optimizer = SING(params, host="sgd", momentum=0.0)
    grads = list(gradients(2))
    train(optimizer, params, grads[:1])
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, params, grads[1:])
    assert all("momentum_buffer" in state for state in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_around_loading_see_and_change_what_is_loaded(dtype: torch.dtype) -> None:
    params = [nn.Parameter(param.detach().to(dtype)) for param in parameters()]
    optimizer = SING(params)
    set_gradients(params, [torch.ones_like(param) for param in params])
    optimizer.step()
    seen: list[Any] = []

    def zero_first_moments(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {key: {**value, "exp_avg": value["exp_avg"] * 0} for key, value in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def halve(loaded: Any) -> None:
        seen.extend(value["exp_avg_sq"].dtype for value in loaded.state.values())
        for value in loaded.state.values():
            value["exp_avg_sq"] /= 2

    second = SING(params)
    second.register_load_state_dict_pre_hook(zero_first_moments)
    second.register_load_state_dict_post_hook(halve)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(seen) == {torch.float32}
    for param, theirs in optimizer.state.items():
        mine = second.state[param]
        assert not mine["exp_avg"].any()
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"] / 2)
        assert torch.equal(mine["lookahead_params"], theirs["lookahead_params"])
    assert len(second._optimizer_load_state_dict_pre_hooks) == 1  # ours are gone
    assert len(second._optimizer_load_state_dict_post_hooks) == 1


def test_a_hook_may_convert_the_state_of_another_optimizer() -> None:
    params = parameters()
    adamw = torch.optim.AdamW(params, lr=0.25)
    set_gradients(params, [torch.ones_like(param) for param in params])
    adamw.step()
    optimizer = SING(params)

    def convert(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "host": "adamw"} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(convert)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.step()


def _without(name: str) -> Any:
    return lambda saved: saved["state"][1].pop(name)


BROKEN: dict[str, tuple[Any, str]] = {
    "truncated": (_without("exp_avg_sq"), "the state of parameter 1 lacks 'exp_avg_sq'"),
    "without its counter": (_without("step"), "the state of parameter 1 lacks 'step'"),
    "of another shape": (
        lambda saved: saved["state"][1].update(exp_avg=torch.zeros(9, 9)),
        r"exp_avg of parameter 1 has the shape \(9, 9\)",
    ),
    "slow weights of another shape": (
        lambda saved: saved["state"][1].update(lookahead_params=torch.zeros(9, 9)),
        r"lookahead_params of parameter 1 has the shape \(9, 9\)",
    ),
    "with too much": (
        lambda saved: saved["state"].update({99: {}}),
        r"states of parameters that are in no group: \['99'",
    ),
    "of fewer parameters": (lambda saved: saved["param_groups"][0]["params"].pop(), "doesn't match the size"),
    "of more groups": (
        lambda saved: saved["param_groups"].append({**saved["param_groups"][0], "params": []}),
        "groups",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_state_is_refused_before_anything_has_changed(case: str) -> None:
    params = parameters()
    optimizer = SING(params)
    set_gradients(params, [torch.ones_like(param) for param in params])
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(before)
    breaks, message = BROKEN[case]
    breaks(broken)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ ambient state


@contextmanager
def ambient(what: str) -> Iterator[None]:
    """What scripts set for the whole process."""
    if what == "meta":
        with torch.device("meta"):  # torch 2.7 does not get over set_default_device(None)
            yield
        return
    torch.set_default_dtype(getattr(torch, what))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run(host: str, steps: int) -> tuple[list[Tensor], SING]:
    params = [nn.Parameter(torch.full(shape, 0.5, dtype=torch.float32, device="cpu")) for shape in ((3, 2), (2,))]
    optimizer = SING(params, lr=1e-3, host=host)
    generator = torch.Generator("cpu").manual_seed(3)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32, device="cpu")
        optimizer.step()
    return [param.detach() for param in params], optimizer


@pytest.mark.parametrize("what", ["bfloat16", "float16", "float64", "meta"])
@pytest.mark.parametrize("host", HOSTS)
def test_default_dtype_and_device_change_nothing(host: str, what: str) -> None:
    expected, _ = run(host, 520)
    with ambient(what):
        params, optimizer = run(host, 520)
        loaded = SING(params, host=host)
        loaded.load_state_dict(optimizer.state_dict())
        assert [state["step"].item() for state in loaded.state.values()] == [520.0, 520.0]
        counted = optimizer.state_dict()
        for state in counted["state"].values():
            state["step"] = 513  # a number, as the optimizer published with the paper saves it
        loaded.load_state_dict(counted)
        assert [state["step"].item() for state in loaded.state.values()] == [513.0, 513.0]
        weight = nn.Linear(2, 2, device="cpu", dtype=torch.float32)
        assert create_optimizer(weight, f"sing_{host}")
    for param, value in zip(params, expected, strict=True):
        assert torch.equal(param, value)
