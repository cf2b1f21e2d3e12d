"""The table of names and the options that every adapter parses with it."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import MatricesOnly
from torch import nn

import sing_plugins
from sing_plugins import SING, create_optimizer
from sing_plugins.names import Foreign, Native, resolve, torch_hosts, valid_names
from sing_plugins.options import OPTIONS, split_options
from sing_plugins.plan import Plan
from sing_plugins.wrapper import Wrapped, wrap


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


@pytest.mark.parametrize("name", valid_names())
def test_every_name_trains_a_model_with_the_optimizer_that_it_names(name: str) -> None:
    net = model()
    if name == "sing_muon":  # torch's Muon takes matrices only
        optimizer = resolve(name).build([net[0].weight, net[2].weight], lr=0.01)
    else:
        optimizer = create_optimizer(net, name, lr=0.01)
    host = name.removeprefix("sing_")
    if isinstance(optimizer, SING):
        assert optimizer.host == ("adamw" if name == "sing" else host)
    else:
        assert isinstance(optimizer, Wrapped)
        assert type(optimizer.host).__name__.lower() == host
    before = net[0].weight.detach().clone()
    net(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before)


def test_native_hosts_go_before_those_of_torch_and_a_framework_before_torch() -> None:
    class Mine(torch.optim.SGD):
        pass

    assert resolve("sing_sgd", {"sgd": Mine}) == Native("sing_sgd", "sgd")
    assert resolve("sing_rmsprop", {"rmsprop": Mine}) == Foreign("sing_rmsprop", "rmsprop", Mine)
    assert resolve("SING_RMSprop") == Foreign("sing_rmsprop", "rmsprop", torch.optim.RMSprop)


@pytest.mark.parametrize(
    "name", ["sing_adamv", "adamw", "sing_", "sing_lbfgs", "sing_sing_adamw", "sing_optimizer", ""]
)
def test_unknown_name_lists_the_valid_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown optimizer '{name}'. Valid: sing, sing_adamw, .*sing_rmsprop"):
        resolve(name)


def test_every_option_of_the_table_has_a_place_and_every_option_is_in_the_table() -> None:
    options = {name for name in inspect.signature(SING).parameters if name not in ("params", "host")}
    options |= {name for name, p in inspect.signature(wrap).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert options == set(OPTIONS) - {"freeze"}


TYPED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sing", {"softplus_beta": "none", "lookahead_k": "5"}, {"softplus_beta": None, "lookahead_k": 5}),
    ("sing", {"softplus_relative": "0.25"}, {"softplus_relative": 0.25}),
    ("sing_adafactor", {"softplus_relative": "none"}, {"softplus_relative": None}),
    ("sing", {"centralize": "False", "normalize": "true"}, {"centralize": False, "normalize": True}),
    ("sing", {"betas": "0.9:0.98"}, {"betas": (0.9, 0.98)}),
    ("sing", {"betas": "(0.9, 0.98)"}, {"betas": (0.9, 0.98)}),
    ("sing", {"betas": [0.9, 0.98], "lr": 1}, {"betas": (0.9, 0.98), "lr": 1.0}),
    ("sing", {"freeze": "None", "foreach": "none"}, {"freeze": "none", "foreach": None}),
    ("sing_sgd", {"nesterov": "1", "momentum": "0.8"}, {"nesterov": True, "momentum": 0.8}),
    ("sing_adafactor", {"clip_threshold": "2"}, {"clip_threshold": 2.0}),
    ("sing_rmsprop", {"centered": "False", "alpha": "0.9"}, {"centered": False, "alpha": 0.9}),
    (
        "sing_adam",
        {"betas": "0.8:0.9", "amsgrad": "yes", "foreach": "None"},
        {"betas": (0.8, 0.9), "amsgrad": True, "foreach": None},
    ),
    ("sing_radam", {"norm_eps": "1e-6"}, {"norm_eps": 1e-6}),
]


@pytest.mark.parametrize(("name", "given", "typed"), TYPED, ids=str)
def test_options_are_typed(name: str, given: dict[str, Any], typed: dict[str, Any]) -> None:
    parsed = resolve(name).parse(given)
    assert parsed == typed
    assert [type(value) for value in parsed.values()] == [type(value) for value in typed.values()]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sing", {"lookahed_k": "5"}, "Unknown option 'lookahed_k' of sing. Valid: betas, .*lookahead_k"),
    ("sing", {"momentum": "0.9"}, "Unknown option 'momentum' of sing. Valid: "),
    ("sing_sgd", {"softplus_beta": "50"}, "Unknown option 'softplus_beta' of sing_sgd"),
    ("sing_sgd", {"softplus_relative": "1"}, "Unknown option 'softplus_relative' of sing_sgd"),
    ("sing_sgd", {"betas": "0.9:0.9"}, "Unknown option 'betas' of sing_sgd"),
    (
        "sing_rmsprop",
        {"softplus_beta": "5"},
        "sing_rmsprop is rmsprop behind standardization and Lookahead, without softplus_beta",
    ),
    ("sing", {"lookahead_k": "2.5"}, "Invalid lookahead_k: '2.5' for sing. Accepted: a whole number of steps >= 1"),
    ("sing", {"lookahead_k": True}, "Invalid lookahead_k: True"),
    ("sing", {"centralize": "nope"}, "Invalid centralize: 'nope' for sing. Accepted: True or False"),
    ("sing", {"betas": "0.9"}, "Invalid betas: '0.9'"),
    ("sing", {"lr": "fast"}, "Invalid lr: 'fast'"),
    ("sing", {"freeze": "everything"}, "Invalid freeze: 'everything' for sing. Accepted: layernorm, norm, none"),
    ("sing_rmsprop", {"centered": "maybe"}, "Invalid centered: 'maybe' for sing_rmsprop"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED, ids=str)
def test_unknown_options_and_bad_values_raise_and_say_what_is_valid(
    name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name).parse(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "-1"}, "Invalid lr: -1.0"),
        ({"softplus_beta": "-3"}, "Invalid softplus_beta: -3.0"),
        ({"softplus_relative": "0"}, "Invalid softplus_relative: 0.0"),
        ({"name": "sing_sgd", "momentum": 0, "nesterov": "true"}, "Invalid nesterov"),
        ({"name": "sing_adam", "betas": "2:3"}, "Invalid beta parameter"),
        ({"typo": 1}, "Unknown option 'typo'"),
        ({"name": "sing_picky", "hosts": {"picky": MatricesOnly}}, "matrices only"),
    ],
    ids=str,
)
def test_errors_leave_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=message):
        create_optimizer(net, **options)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_option_strings_are_split_outside_of_brackets() -> None:
    assert split_options(None) == split_options("") == {}
    assert split_options("a=1, b = (2,3),c=[4,5]") == {"a": "1", "b": "(2,3)", "c": "[4,5]"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "Expected key=value"),
        ("a=1,,b", "got 'b'"),
        ("a=1,a=2", "gives 'a' twice"),
        ("lookahead_k=none,betas=(0.9,0.98,freeze=none", r"a bracket without its '\)'"),
        ("betas=(0.9,0.98],freeze=none", r"Its '\]' closes no bracket"),
        ("betas=0.9,0.98),freeze=none", r"Its '\)' closes no bracket"),
    ],
)
def test_malformed_option_strings_raise(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_options(text)


def test_torch_hosts_are_those_that_can_be_wrapped() -> None:
    assert "lbfgs" not in torch_hosts()
    assert "sparseadam" not in torch_hosts()
    assert torch_hosts()["radam"] is torch.optim.RAdam


@pytest.mark.parametrize("lr", [3e-4, 1e-3, 5e-5])
def test_learning_rate_of_adamw_gets_one_hint(lr: float, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        create_optimizer(model(), lr=lr, freeze="none")
    hints = [record.getMessage() for record in caplog.records if "looks like" in record.getMessage()]
    assert len(hints) == 1
    assert f"lr={lr:g}" in hints[0]


@pytest.mark.parametrize("lr", [0.0, 2e-4, 8e-4, 5e-3, 0.1])
def test_learning_rate_of_the_paper_gets_no_hint(lr: float, caplog: pytest.LogCaptureFixture) -> None:
    create_optimizer(model(), lr=lr, freeze="none")
    assert "looks like" not in caplog.text


def test_without_softplus_adamws_learning_rate_is_right(caplog: pytest.LogCaptureFixture) -> None:
    create_optimizer(model(), lr=1e-3, freeze="none", softplus_beta=None)
    create_optimizer(model(), lr=1e-3, freeze="none", softplus_relative=1)
    assert "looks like" not in caplog.text
    for name, options in (("sing", {"softplus_beta": None}), ("sing_sgd", {}), ("sing_radam", {})):
        caplog.clear()
        Plan(resolve(name), {"lr": 1e-4, **options}, model()).optimizer()
        assert "ten times" not in caplog.text
        Plan(resolve(name), {"lr": 5e-5, **options}, model(), framework_lr=5e-5).optimizer()
        host = {"sing": "adamw"}.get(name, name.removeprefix("sing_"))
        advice = "SING without softplus_beta, or with softplus_relative, usually wants about the best lr of"
        assert f"lr=5e-05 is the framework's default. {advice} {host} alone." in caplog.text


def test_public_names_are_importable_and_listed() -> None:
    assert dir(sing_plugins) == sorted(sing_plugins.__all__)
    for name in sing_plugins.__all__:
        assert callable(getattr(sing_plugins, name))
    with pytest.raises(AttributeError, match="no attribute 'Sing'"):
        sing_plugins.Sing  # noqa: B018


def test_numbers_of_numpy_are_taken_and_kept_as_pythons(tmp_path: Path) -> None:
    given = {"lr": np.float32(0.5), "eps": np.float64(1e-6), "lookahead_k": np.int64(3), "centralize": np.bool_(False)}
    typed = {"lr": 0.5, "eps": 1e-6, "lookahead_k": 3, "centralize": False}
    net = model()
    group = {"params": [nn.Parameter(torch.zeros(2))], "lookahead_alpha": np.float32(0.25)}
    optimizers = [SING(net.parameters(), betas=(np.float32(0.5), 0.75), **given), create_optimizer(net, **given)]
    for optimizer in optimizers:
        optimizer.add_param_group(dict(group))
        for name, value in typed.items():
            assert optimizer.param_groups[0][name] == value
            assert type(optimizer.param_groups[0][name]) is type(value)
        assert type(optimizer.param_groups[-1]["lookahead_alpha"]) is float
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)  # would refuse NumPy's
    assert wrap(torch.optim.SGD(net.parameters()), lookahead_k=np.int64(2)).param_groups[0]["sing_lookahead_k"] == 2


@pytest.mark.parametrize("value", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([[0.1]])])
def test_a_tensor_of_one_element_is_a_learning_rate(value: torch.Tensor) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for param, lr in zip(params, (value, 0.1), strict=True):
        param.grad = torch.tensor([1.0, 2.0])
        SING([param], lr=lr).step()
    torch.testing.assert_close(*params)


@pytest.mark.parametrize("value", [math.inf, math.nan, -0.1])
def test_a_tensor_that_is_no_learning_rate_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="Invalid lr: tensor"):
        SING(model().parameters(), lr=torch.tensor(value))


def test_what_a_host_passes_on_with_kwargs_is_the_hosts_to_judge() -> None:
    class Mine(torch.optim.AdamW):
        def __init__(self, params: Any, amsgrad: bool = False, **kwargs: Any) -> None:
            super().__init__(params, amsgrad=amsgrad, **kwargs)

    hosts = {"mine": Mine}
    given = {"lr": "0.1", "betas": "0.5:0.75", "eps": 1e-6, "amsgrad": "true"}
    optimizer = create_optimizer(model(), "sing_mine", hosts=hosts, weight_decay=0.25, **given)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["amsgrad"]) == (0.1, (0.5, 0.75), 1e-6, True)
    assert group["weight_decay"] == 0.25
    with pytest.raises(ValueError, match="Unknown option 'foreach' of sing_mine"):
        create_optimizer(model(), "sing_mine", hosts=hosts, foreach=True)


def test_none_stands_for_an_option_that_was_not_given() -> None:
    optimizer = create_optimizer(model(), lr=None, eps=None, betas=None, softplus_beta=None)
    group = optimizer.param_groups[0]
    assert (group["eps"], group["betas"], group["softplus_beta"]) == (1e-8, (0.9, 0.999), None)
    assert create_optimizer(model(), "sing_adam", eps=None).param_groups[0]["eps"] == 1e-8


def test_a_schedule_does_not_switch_on_a_momentum_that_nobody_asked_for() -> None:
    def cycle(optimizer: torch.optim.Optimizer) -> None:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    with pytest.raises(ValueError, match="must support momentum or beta1") as refused:
        cycle(torch.optim.Adafactor(model().parameters()))
    for options in ({}, {"momentum": 0.0}):
        with pytest.raises(ValueError, match=re.escape(str(refused.value))):
            cycle(create_optimizer(model(), "sing_adafactor", **options))
    optimizer = create_optimizer(model(), "sing_adafactor", momentum=0.5)
    cycle(optimizer)
    assert optimizer.param_groups[0]["momentum"] == 0.95
