"""SING and wrapped hosts against the float64 reference, every step, parameters and state."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import timm.optim
import torch
from problems import gradients, learning_rate, parameters, set_gradients, set_learning_rate
from reference import Reference, centralized, normalized
from torch import Tensor, nn
from transformers.optimization import Adafactor

from sing_plugins import SING, wrap

STEPS = 40  # eight of Lookahead's cycles
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}

HOSTS: list[dict[str, Any]] = [
    {"host": "adamw", "betas": (0.9, 0.99)},
    {"host": "adabelief", "betas": (0.9, 0.99)},
    {"host": "adafactor", "decay_rate": 0.7, "clip_threshold": 0.5, "momentum": 0.0},
    {"host": "adafactor", "momentum": 0.9},
    {"host": "sgd", "momentum": 0.0},
    {"host": "sgd", "momentum": 0.9},
    {"host": "sgd", "momentum": 0.9, "nesterov": True},
]
OFF: dict[str, Any] = {"centralize": False, "normalize": False, "softplus_beta": None, "lookahead_k": None}
SWITCHES = [
    dict(zip(OFF, values, strict=True)) for values in product((True, False), (True, False), (50.0, None), (5, None))
]


class Comparison:
    """Asserts an error relative to the largest entry that the tensor has had so far.

    So far, since a tensor that crosses zero keeps the rounding of what it was before.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.largest: dict[str, float] = {}

    def __call__(self, actual: Tensor, expected: Tensor, what: str, step: int) -> None:
        assert actual.shape == expected.shape, what
        self.largest[what] = max(self.largest.get(what, 0.0), expected.abs().max().item())
        error = (actual.double() - expected.double()).abs().max().item()
        assert error <= self.tolerance * self.largest[what], f"{what}, step {step}: {error / self.largest[what]}"


def run_against_reference(optimizer: SING, params: list[nn.Parameter], options: dict[str, Any]) -> None:
    references = [Reference(param, **options) for param in params]
    dtype = params[0].dtype
    assert_close = Comparison(TOLERANCE[dtype])
    for step, grads in enumerate(gradients(STEPS, dtype)):
        lr = learning_rate(step)
        set_gradients(params, grads)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        for param, grad, reference in zip(params, grads, references, strict=True):
            if not param.numel():
                continue
            reference.step(grad, lr)
            where = f"shape {tuple(param.shape)}"
            assert_close(param, reference.param, where, step)
            state = dict(optimizer.state[param])
            assert state.pop("step") == step + 1
            assert state.keys() == reference.state.keys()
            for key, value in state.items():
                assert_close(value, reference.state[key], f"{where}, {key}", step)


def describe(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items())


# Where the host has no denominator, softplus switches nothing; in float32 the loop's operations are those of float64.
CASES = [
    pytest.param(
        host, switches, implementation, dtype, id=f"{describe(host)}-{describe(switches)}-{implementation}-{dtype}"
    )
    for host, switches in product(HOSTS, SWITCHES)
    if host["host"] != "sgd" or switches["softplus_beta"]
    for implementation, dtype in (("loop", torch.float64), ("fused", torch.float32), ("loop", torch.float32))
    if (implementation, dtype) != ("loop", torch.float32) or len(set(map(bool, switches.values()))) == 1
]


@pytest.mark.parametrize(("host", "switches", "implementation", "dtype"), CASES)
def test_every_host_and_switch_follows_the_reference(
    host: dict[str, Any], switches: dict[str, Any], implementation: str, dtype: torch.dtype
) -> None:
    options = {**host, **switches, "weight_decay": 0.1}
    params = parameters(dtype)
    run_against_reference(SING(params, lr=1.0, implementation=implementation, **options), params, options)


@pytest.mark.parametrize(
    "option",
    [
        {"softplus_beta": 5.0},
        {"softplus_relative": 0.065},
        {"softplus_relative": 4.0, "centralize": False},
        {"softplus_relative": 1.0, "host": "adabelief"},
        {"softplus_relative": 1.0, "host": "adafactor", "clip_threshold": 0.5},
        {"lookahead_k": 3},
        {"lookahead_k": 1, "lookahead_alpha": 0.3},
        {"lookahead_alpha": 1.0},
        {"centralize_rows_of_one": True},
        {"decay_all": True},
        {"eps": 1e-3},
        {"betas": (0.0, 0.0)},
    ],
    ids=describe,
)
def test_every_other_option_follows_the_reference(option: dict[str, Any]) -> None:
    options = {"weight_decay": 0.1, **option}
    params = parameters()
    run_against_reference(SING(params, lr=1.0, **options), params, options)


@pytest.mark.parametrize("implementation", ["loop", "fused"])
@pytest.mark.parametrize("host", ["adamw", "adabelief", "adafactor"])
def test_with_relative_softplus_a_tensor_and_many_copies_of_it_take_the_same_step(
    host: str, implementation: str
) -> None:
    """Of the copies side by side, the normalized gradient is smaller by the root of their number, and so is its eps."""
    small, large = nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(6, 8 * 4096))
    options: dict[str, Any] = {"host": host, "implementation": implementation, "softplus_relative": 4.0, "eps": 1e-4}
    optimizer = SING([small, large], lr=0.1, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        small.grad = 1e6 * torch.randn(6, 8, generator=generator)
        large.grad = small.grad.repeat(1, 4096)
        optimizer.step()
    torch.testing.assert_close(large.detach(), small.detach().repeat(1, 4096), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS, ids=describe)
def test_multi_tensor_path_equals_the_plain_loop_to_the_last_bit(host: dict[str, Any]) -> None:
    results = []
    for foreach in (False, True):
        params = [p for dtype in (torch.float32, torch.float64, torch.bfloat16) for p in parameters(dtype)]
        optimizer = SING(params, lr=1e-2, weight_decay=0.1, foreach=foreach, **host)
        for grads in gradients(12):
            set_gradients(params, [g.to(p.dtype) for g, p in zip(grads * 3, params, strict=True)])
            optimizer.step()
        results.append(params)
    assert all(torch.equal(loop, multi) for loop, multi in zip(*results, strict=True))


ORDINARY = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1.0, betas=(0.9, 0.99), weight_decay=0.1),
    "adabelief": lambda p: timm.optim.AdaBelief(
        p, lr=1.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, rectify=False
    ),
    "adafactor": lambda p: Adafactor(p, lr=1.0, weight_decay=0.1, scale_parameter=False, relative_step=False),
    "sgd": lambda p: timm.optim.SGDW(p, lr=1.0, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: timm.optim.SGDW(p, lr=1.0, momentum=0.9, weight_decay=0.1, nesterov=True),
    "torch sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
}
SAME_HERE: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.99), "weight_decay": 0.1},
    "adabelief": {"host": "adabelief", "betas": (0.9, 0.99), "weight_decay": 0.1},
    "adafactor": {"host": "adafactor", "weight_decay": 0.1},
    "sgd": {"host": "sgd", "weight_decay": 0.1},
    "sgd nesterov": {"host": "sgd", "weight_decay": 0.1, "nesterov": True},
    "torch sgd": {"host": "sgd"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ORDINARY)
def test_with_its_features_off_every_host_equals_its_ordinary_counterpart(name: str, dtype: torch.dtype) -> None:
    ours, theirs = ([p for p in parameters(dtype) if p.numel()] for _ in range(2))
    optimizers = (SING(ours, lr=1.0, decay_all=True, **OFF, **SAME_HERE[name]), ORDINARY[name](theirs))
    assert_close = Comparison(TOLERANCE[dtype])
    for step, grads in enumerate(gradients(STEPS, dtype)):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, [grad for grad in grads if grad.numel()])
            set_learning_rate(optimizer, learning_rate(step))
            optimizer.step()
        for our, their in zip(ours, theirs, strict=True):
            assert_close(our, their.detach(), f"shape {tuple(our.shape)}", step)


WRAPPED = {
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1.0, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1.0, momentum=0.5),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=1.0),
    "timm Lamb": lambda p: timm.optim.Lamb(p, lr=1.0),
    "timm Lion": lambda p: timm.optim.Lion(p, lr=1.0),
}


@pytest.mark.parametrize("switches", [{}, {"centralize": False}, {"normalize": False}, {"lookahead_k": None}], ids=str)
@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_host_sees_standardized_gradients_and_is_followed_by_lookahead(
    name: str, switches: dict[str, Any]
) -> None:
    options = {"centralize": True, "normalize": True, "lookahead_k": 5, **switches}
    ours, theirs = ([p for p in parameters() if p.numel()] for _ in range(2))
    optimizer, host = wrap(WRAPPED[name](ours), **options), WRAPPED[name](theirs)
    slow = [p.detach().clone() for p in theirs]
    assert_close = Comparison(1e-12)
    for step, grads in enumerate(gradients(STEPS)):
        grads = [grad for grad in grads if grad.numel()]
        set_learning_rate(optimizer, learning_rate(step))
        set_learning_rate(host, learning_rate(step))
        set_gradients(ours, grads)
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, grads, strict=True))

        for param, grad in zip(theirs, grads, strict=True):
            param.grad = centralized(grad) if options["centralize"] else grad
            param.grad = normalized(param.grad, 1e-8) if options["normalize"] else param.grad
        host.step()
        if options["lookahead_k"] and (step + 1) % 5 == 0:
            for param, weight in zip(theirs, slow, strict=True):
                weight += 0.5 * (param.detach() - weight)
                param.data = weight.clone()
        for our, their in zip(ours, theirs, strict=True):
            assert_close(our, their.detach(), f"shape {tuple(our.shape)}", step)
