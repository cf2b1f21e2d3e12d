"""SING by name in timm, with timm's own tiny models."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import (
    OptimInfo,
    OptimizerRegistry,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    optimizer_kwargs,
)
from timm.optim import create_optimizer as legacy_create_optimizer
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from timm.utils import ParseKwargs
from torch import nn

import sing_plugins
import sing_timm
from sing_plugins import SING, wrap
from sing_plugins.names import valid_names
from sing_plugins.wrapper import Wrapped

timm_hosts = sorted(
    name
    for name, info in default_registry._optimizers.items()
    # Apex and bitsandbytes (named by a string) need CUDA; Adahessian needs second-order gradients.
    if isinstance(info.opt_class, type) and not info.second_order and not name.startswith("sing")
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Autoload has done it where the distribution is installed; this also covers a bare checkout."""
    sing_plugins.enable("timm")
    yield
    sing_plugins.enable("timm")


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=16, patch_size=8, in_chans=1, num_classes=10, **options)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", in_chans=1, num_classes=10)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    images = torch.tensor(data.images[:64], dtype=torch.float32)[:, None] / 8 - 1
    return nn.functional.interpolate(images, size=(16, 16)), torch.tensor(data.target[:64])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    images, labels = digits()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_tiny(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 7) -> None:
    torch.manual_seed(1)  # Kron draws random numbers
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()


def named_rates(model: nn.Module, optimizer: torch.optim.Optimizer, key: str = "weight_decay") -> dict[str, float]:
    """Parameter name -> the value of its param group."""
    rates = {param: group[key] for group in optimizer.param_groups for param in group["params"]}
    return {name: rates[param] for name, param in model.named_parameters() if param in rates}


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


# --- names


@pytest.mark.parametrize(
    ("opt", "host"),
    [
        ("sing", "adamw"),
        ("sing_adamw", "adamw"),
        ("SING_AdamW", "adamw"),
        ("singadamw", "adamw"),
        ("sing_sgd", "sgd"),
        ("sing_adabelief", "adabelief"),
        ("SingAdafactor", "adafactor"),
    ],
)
def test_a_native_name_creates_sing_with_its_host(opt: str, host: str) -> None:
    optimizer = create_optimizer_v2(vit(), opt=opt, lr=0.01)
    assert type(optimizer) is SING
    assert optimizer.host == host


CREATE = """
import timm
from timm.optim import create_optimizer_v2
model = timm.create_model("test_resnet")
print(type(create_optimizer_v2(model, opt="sing_adamw")).__name__)
"""


def test_timm_alone_would_silently_build_adamw_until_sing_is_enabled_by_hand() -> None:
    enable_late = "import sing_plugins\nsing_plugins.enable('timm')\n" + CREATE
    assert run(CREATE + enable_late, SING_PLUGINS_AUTOLOAD="0") == "AdamW\nSING"


def test_no_import_of_ours_is_needed() -> None:
    assert run(CREATE) == "SING"


def test_the_adapter_may_be_imported_before_timm() -> None:
    assert run("import sing_timm" + CREATE) == "SING"


def test_every_registry_knows_the_names() -> None:
    optimizer = OptimizerRegistry().create_optimizer(vit(), "sing_adamw", 0.01, 0.05)
    assert type(optimizer) is SING
    assert optimizer.defaults["lr"] == 0.01
    assert set(named_rates(vit(), optimizer).values()) <= {0.0, 0.05}
    optimizer = OptimizerRegistry().create_optimizer(vit(), opt="sing_radam")  # from torch.optim
    assert type(optimizer.host) is torch.optim.RAdam  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "opt",
    [
        "sing_admw",
        "sing_",
        "sing_adamw_",
        "sing__adamw",
        "adamw_sing",
        "my_sing_adamw",
        "my_singadamw",
        "sing_lookahead_adamw",
        "sing_adahessian",
        "sing_sing_adamw",
    ],
)
def test_a_name_that_looks_like_ours_but_is_none_raises(opt: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown optimizer '{opt}'\. Valid: sing, sing_adamw, .*sing_lamb"):
        create_optimizer_v2(vit(), opt=opt)


@pytest.mark.parametrize("opt", ["lookahead_sing_adamw", "Lookahead_singadamw", "lookahead_sing"])
def test_timms_lookahead_does_not_come_on_top_of_ours(opt: str) -> None:
    with pytest.raises(ValueError, match="has Lookahead inside: use 'sing"):
        create_optimizer_v2(vit(), opt=opt)


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "sgd", "Lamb", "nonsense_adamw"])
def test_other_names_are_timms(opt: str) -> None:
    ours = create_optimizer_v2(vit(), opt=opt, lr=0.1, weight_decay=0.05)
    sing_plugins.disable("timm")
    theirs = create_optimizer_v2(vit(), opt=opt, lr=0.1, weight_decay=0.05)
    assert type(ours) is type(theirs)
    assert ours.defaults == theirs.defaults
    assert type(ours) is not SING


def test_unknown_names_are_still_refused_by_timm() -> None:
    with pytest.raises(ValueError, match="not found in registry"):
        create_optimizer_v2(vit(), opt="nonsense")


def test_every_name_is_listed() -> None:
    listed = set(list_optimizers("sing*"))
    names = valid_names(timm_hosts)
    assert "sing_lamb" in names
    assert "sing_rprop" in names  # torch's, unknown to timm
    assert set(names) <= listed
    assert {name.replace("_", "") for name in names} <= listed
    assert "sing_adahessian" not in listed


def test_listing_filters_and_descriptions() -> None:
    assert list_optimizers("sing_*lamb") == [f"sing_{name}" for name in list_optimizers("*lamb", ["sing*"])]
    assert not [name for name in list_optimizers(exclude_filters=["sing*"]) if "sing" in name]
    assert "lamb" in list_optimizers()  # programs that go through the whole list, as timm's own tests, mean timm's own
    assert not [name for name in list_optimizers() if "sing" in name]
    assert not [name for name, _ in list_optimizers(["*adam*"], with_description=True) if "sing" in name]
    assert "sing_adam" in list_optimizers(["lamb", "sing*"])
    described = dict(list_optimizers("sing*", with_description=True))
    assert "adabelief" in described["sing_adabelief"]
    assert get_optimizer_info("lamb").description in described["sing_lamb"]


def test_get_optimizer_info_tells_what_the_optimizer_takes() -> None:
    info = get_optimizer_info("SING_AdamW")
    assert (info.name, info.has_betas, info.has_eps, info.has_momentum) == ("sing_adamw", True, True, False)
    info = get_optimizer_info("sing_sgd")
    assert (info.has_betas, info.has_momentum) == (False, True)
    info = get_optimizer_info("singlion")
    assert (info.name, info.has_betas, info.has_eps) == ("singlion", True, False)


@pytest.mark.parametrize("bind_defaults", [True, False])
def test_get_optimizer_class_builds_the_named_optimizer(bind_defaults: bool) -> None:
    build: Callable[..., Any] = get_optimizer_class("sing_sgd", bind_defaults=bind_defaults)
    assert build(vit().parameters(), lr=0.1, momentum="0.5").host == "sgd"
    build = get_optimizer_class("singlambc", bind_defaults=bind_defaults)
    optimizer = build(vit().parameters(), lr=0.1)
    assert type(optimizer) is Wrapped
    assert optimizer.param_groups[0]["trust_clip"] is True


# --- patching


def test_disable_restores_timm_exactly() -> None:
    sing_plugins.disable("timm")
    method, names = OptimizerRegistry.create_optimizer, dict(default_registry._optimizers)
    assert method.__module__.startswith("timm")
    assert not hasattr(method, "__wrapped__")
    assert not list_optimizers("*sing*")
    assert type(create_optimizer_v2(vit(), opt="sing_adamw")) is torch.optim.AdamW  # as if SING were not installed
    sing_plugins.enable("timm")
    assert OptimizerRegistry.create_optimizer is not method
    sing_plugins.disable("timm")
    assert OptimizerRegistry.create_optimizer is method
    assert default_registry._optimizers == names


def test_patching_twice_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    method, names = OptimizerRegistry.create_optimizer, dict(default_registry._optimizers)
    sing_timm.patch()
    assert OptimizerRegistry.create_optimizer is method
    assert default_registry._optimizers == names
    assert sing_timm.is_patched()
    assert not caplog.records  # timm warns when a name is overwritten


def test_a_hook_of_somebody_else_on_top_of_ours_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptimizerRegistry, "create_optimizer", OptimizerRegistry.create_optimizer)
    ours = OptimizerRegistry.create_optimizer

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    OptimizerRegistry.create_optimizer = theirs  # type: ignore[method-assign]
    sing_plugins.disable("timm")
    assert OptimizerRegistry.create_optimizer is theirs
    assert type(create_optimizer_v2(vit(), opt="sing_adamw")) is torch.optim.AdamW


# --- param groups


def test_layernorm_is_frozen_and_the_rest_decayed_by_module_type() -> None:
    model = vit()
    optimizer = create_optimizer_v2(model, opt="sing_adamw", lr=0.01, weight_decay=0.05)
    rates = named_rates(model, optimizer)
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() or type(module).__name__ == "LayerScale"
        for leaf, _ in module.named_parameters(recurse=False)
    }
    assert frozen == norms
    assert set(rates) == {name for name, _ in model.named_parameters()} - frozen
    no_decay = {name for name in rates if name.endswith("bias")} | set(model.no_weight_decay()) & set(rates)
    assert {name for name, rate in rates.items() if rate == 0.0} == no_decay
    assert "pos_embed" in no_decay
    assert {rates[name] for name in set(rates) - no_decay} == {0.05}


def test_freeze_is_an_option() -> None:
    model = resnet()
    create_optimizer_v2(model, opt="sing_sgd", lr=0.1)
    assert all(param.requires_grad for param in model.parameters())  # BatchNorm only
    create_optimizer_v2(model, opt="sing_sgd", lr=0.1, freeze="norm")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # but for the last ones of the blocks, which begin at zero
        assert [param.requires_grad for param in norm.parameters()] == [not norm.weight.any()] * 2
    assert {norm.weight.requires_grad for norm in norms} == {True, False}
    model = vit()
    create_optimizer_v2(model, opt="sing_lamb", lr=0.1, freeze=None)  # as --opt-kwargs freeze=None arrives
    assert all(param.requires_grad for param in model.parameters())


def test_freezing_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match="would freeze all"):
        create_optimizer_v2(nn.Sequential(nn.LayerNorm(3)), opt="sing_adamw")


@pytest.mark.parametrize("opt", ["sing_adamw", "sing_lamb"])
def test_filter_bias_and_bn_false_decays_biases_and_norms_too(opt: str) -> None:
    model = resnet()
    options = {"lr": 0.01, "weight_decay": 0.05}
    assert 0.0 in named_rates(model, create_optimizer_v2(model, opt=opt, **options)).values()
    optimizer = create_optimizer_v2(model, opt=opt, filter_bias_and_bn=False, **options)
    assert set(named_rates(model, optimizer).values()) == {0.05}
    assert optimizer.defaults.get("decay_all", True) is True  # SING itself passes over 1-D tensors otherwise
    optimizer = create_optimizer_v2(model, opt=opt, decay_all="True", **options)
    assert set(named_rates(model, optimizer).values()) == {0.05}
    optimizer = create_optimizer_v2(model, opt=opt, decay_all="False", **options)
    assert 0.0 in named_rates(model, optimizer).values()


@pytest.mark.parametrize("opt", ["sing_adamw", "sing_radam"])
def test_layer_decay_reaches_the_groups_and_timms_scheduler(opt: str) -> None:
    model, plain = vit(), vit()
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.02, weight_decay=0.05, layer_decay=0.5)
    theirs = create_optimizer_v2(plain, opt="adamw", lr=0.02, weight_decay=0.05, layer_decay=0.5)
    scales = named_rates(model, optimizer, "lr_scale")
    assert {name: scale for name, scale in named_rates(plain, theirs, "lr_scale").items() if name in scales} == scales
    assert len(set(scales.values())) > 2
    assert set(scales) == {name for name, param in model.named_parameters() if param.requires_grad}
    assert {rate for name, rate in named_rates(model, optimizer).items() if name.endswith("bias")} == {0.0}
    assert 0.05 in named_rates(model, optimizer).values()

    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    for epoch in range(3):
        train(model, optimizer, steps=2)
        scheduler.step(epoch + 1)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(scheduler._get_lr(3)[0] * group["lr_scale"])


def test_param_group_fn_keeps_its_groups_but_for_what_is_frozen() -> None:
    model = vit()

    def by_part(module: nn.Module) -> list[dict[str, Any]]:
        head = list(module.head.parameters())  # type: ignore[union-attr, operator]
        ids = set(map(id, head))
        body = (param for param in module.parameters() if id(param) not in ids)
        return [{"params": body, "lr": 1e-4, "part": "body"}, {"params": head, "weight_decay": 0.2, "part": "head"}]

    optimizer = create_optimizer_v2(model, opt="sing_adamw", lr=0.02, weight_decay=0.1, param_group_fn=by_part)
    parts, rates = named_rates(model, optimizer, "part"), named_rates(model, optimizer)
    assert set(parts) == {name for name, param in model.named_parameters() if param.requires_grad}
    assert not [name for name in parts if ".norm" in name]
    assert named_rates(model, optimizer, "lr")["head.weight"] == 0.02
    assert named_rates(model, optimizer, "lr")["blocks.0.attn.qkv.weight"] == 1e-4
    # Groups of the user's own stay what they are: two, and with the decay that they say.
    assert [group["part"] for group in optimizer.param_groups] == ["body", "head"]
    assert rates["head.weight"] == rates["head.bias"] == 0.2
    assert rates["blocks.0.attn.qkv.weight"] == rates["blocks.0.attn.qkv.bias"] == 0.1


def test_param_group_fn_may_return_bare_parameters() -> None:
    model = mlp()
    optimizer = create_optimizer_v2(
        model, opt="sing_adamw", weight_decay=0.1, param_group_fn=lambda module: module.parameters()
    )
    assert named_rates(model, optimizer) == {"0.weight": 0.1, "0.bias": 0.0, "3.weight": 0.1, "3.bias": 0.0}


def test_param_group_fn_that_unfreezes_does_not_undo_the_freezing() -> None:
    model = mlp()
    model.requires_grad_(False)

    def unfreeze(module: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(module.requires_grad_(True).parameters())}]

    optimizer = create_optimizer_v2(model, opt="sing_adamw", param_group_fn=unfreeze)
    assert set(named_rates(model, optimizer)) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_bad_option_raises_before_the_model_is_touched() -> None:
    model, called = vit(), []
    for bad in ({"lookahedk": 3}, {"lookahead_k": 0}, {"weight_decay": -1.0}, {"lr": -1.0}, {"freeze": "layer_norm"}):
        with pytest.raises(
            ValueError, match=r"Unknown option 'lookahedk' .* Valid: .*lookahead_k|Invalid .* Accepted:"
        ):
            create_optimizer_v2(model, opt="sing_adamw", param_group_fn=called.append, **bad)
    assert not called
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("opt", ["sing_adamw", "sing_lamb"])
def test_plain_parameters_are_not_frozen(opt: str, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = create_optimizer_v2(model.parameters(), opt=opt, lr="0.02", weight_decay=0.1, lookahead_k="3")
    assert len(optimizer.param_groups[0]["params"]) == 6
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert "no normalization layer is frozen" in caplog.text
    caplog.clear()
    groups = [{"params": list(model[0].parameters()), "lr": 0.5}, {"params": list(model[3].parameters())}]  # type: ignore[index]
    optimizer = create_optimizer_v2(groups, opt=opt, lr=0.02, freeze="none")
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.02]
    assert not caplog.records
    with pytest.raises(ValueError, match=r"Invalid freeze: 'layernorm' for parameters .* Pass the model"):
        create_optimizer_v2(model.parameters(), opt=opt, freeze="layernorm")
    with pytest.raises(ValueError, match="Unknown option 'lookahedk'"):
        create_optimizer_v2(model.parameters(), opt=opt, lookahedk=3)


def test_a_bare_tensor_is_refused_in_torchs_words() -> None:
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        create_optimizer_v2(torch.ones(2, requires_grad=True), opt="sing_adamw")


# --- options


def test_lr_none_is_the_optimizers_default() -> None:
    assert create_optimizer_v2(mlp(), opt="sing_adamw").defaults["lr"] == 5e-3
    assert (
        create_optimizer_v2(mlp(), opt="sing_lars").defaults["lr"]
        == get_optimizer_class("lars")([torch.ones(1)]).defaults["lr"]
    )


def test_a_learning_rate_like_adamws_is_hinted_at(caplog: pytest.LogCaptureFixture) -> None:
    create_optimizer_v2(mlp(), opt="sing_adamw", lr=1e-3)
    create_optimizer_v2(mlp(), opt="sing_adamw", lr=1e-3)
    create_optimizer_v2(mlp().parameters(), opt="sing_adabelief", lr=5e-4)
    create_optimizer_v2(mlp(), opt="sing_sgd", lr=3e-4)
    create_optimizer_v2(mlp(), opt="sing_lamb", lr=3e-4)
    create_optimizer_v2(mlp(), opt="sing_adamw", lr=1e-2)
    assert [record.getMessage().split()[1] for record in caplog.records if "lr=" in record.getMessage()] == [
        "lr=0.001",
        "lr=0.0005",
    ]


def test_foreach_is_passed_on() -> None:
    assert create_optimizer_v2(mlp(), opt="sing_adamw", foreach=True).defaults["foreach"] is True
    assert create_optimizer_v2(mlp(), opt="sing_adamw").defaults["foreach"] is None
    assert create_optimizer_v2(mlp(), opt="sing_radam", foreach=False).defaults["foreach"] is False


@pytest.mark.parametrize(
    ("opt", "option"),
    [("sing_sgd", {"betas": (0.9, 0.98)}), ("sing_lion", {"eps": 1e-6}), ("sing_lars", {"betas": [0.9]})],
)
def test_an_option_that_the_host_lacks_is_not_dropped_silently(opt: str, option: dict[str, Any]) -> None:
    name = next(iter(option))
    with pytest.raises(ValueError, match=rf"Unknown option '{name}' of {opt}\..* Valid: .*lookahead_k"):
        create_optimizer_v2(mlp(), opt=opt, lr=0.1, **option)


def test_betas_reach_hosts_that_timm_declares_without_them() -> None:
    optimizer = create_optimizer_v2(mlp(), opt="sing_adopt", lr=0.1, betas=[0.8, 0.9])
    assert tuple(optimizer.defaults["betas"]) == (0.8, 0.9)
    optimizer = create_optimizer_v2(mlp(), opt="sing_adan", lr=0.1, betas=[0.8, 0.9, 0.95])  # three of them
    assert tuple(optimizer.defaults["betas"]) == (0.8, 0.9, 0.95)


def test_momentum_is_for_the_hosts_that_have_one(caplog: pytest.LogCaptureFixture) -> None:
    create_optimizer_v2(mlp(), opt="sing_adamw", lr=0.1, momentum=0.9)  # train.py always gives it
    assert "momentum" not in caplog.text
    create_optimizer_v2(mlp(), opt="sing_adamw", lr=0.1, momentum=0.8)
    assert "momentum=0.8 is not used by sing_adamw" in caplog.text
    for opt, momentum in {"sing_sgd": 0.8, "sing_adafactor": 0.0, "sing_lars": 0.8, "sing_rmsprop": 0.8}.items():
        assert create_optimizer_v2(mlp(), opt=opt, lr=0.1, momentum=0.8).defaults.get("momentum", 0.0) == momentum
    assert create_optimizer_v2(mlp(), opt="sing_sgd", lr=0.1).defaults["momentum"] == 0.9


def test_the_registrys_defaults_are_the_hosts_but_native_hosts_are_ours() -> None:
    assert create_optimizer_v2(mlp(), opt="sing_radamw", lr=0.1).defaults["decoupled_weight_decay"] is True
    assert create_optimizer_v2(mlp(), opt="sing_lambc", lr=0.1).defaults["trust_clip"] is True
    assert create_optimizer_v2(mlp(), opt="sing_lambc", lr=0.1, trust_clip="False").defaults["trust_clip"] is False
    assert create_optimizer_v2(mlp(), opt="sing_nesterov", lr=0.1).defaults["nesterov"] is True
    assert create_optimizer_v2(mlp(), opt="sing_sgd", lr=0.1).defaults["nesterov"] is False
    assert type(create_optimizer_v2(mlp(), opt="sing_adabelief", lr=0.1)) is SING


# --- timm's train.py


def train_py_arguments(*command_line: str) -> argparse.Namespace:
    """The options of timm's train.py that its optimizer is made of, with their defaults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--opt-eps", default=None, type=float)
    parser.add_argument("--opt-betas", default=None, type=float, nargs="+")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=2e-5)
    parser.add_argument("--layer-decay", type=float, default=None)
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--opt-foreach", type=bool, default=None)
    parser.add_argument("--lr", type=float, default=None)
    return parser.parse_args(command_line)


def create_as_train_py(model: nn.Module, *command_line: str) -> torch.optim.Optimizer:
    args = train_py_arguments(*command_line)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    copy.deepcopy(optimizer.defaults)  # for its log line
    return optimizer


def test_train_py_with_options() -> None:
    model = vit()
    optimizer = create_as_train_py(
        model,
        *("--opt", "sing_adamw", "--lr", "0.02", "--weight-decay", "0.005", "--layer-decay", "0.7"),
        *("--opt-betas", "0.9", "0.98", "--opt-eps", "1e-7"),
        *("--opt-kwargs", "lookahead_k=none", "freeze=none", "softplus_relative=4"),
        *("centralize=False", "normalize=true"),
    )
    assert type(optimizer) is SING
    expected = {"lookahead_k": None, "softplus_relative": 4.0, "centralize": False, "normalize": True, "eps": 1e-7}
    assert {key: optimizer.defaults[key] for key in expected} == expected
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["lr"] == 0.02
    assert set(named_rates(model, optimizer)) == {name for name, _ in model.named_parameters()}  # nothing frozen
    assert set(named_rates(model, optimizer).values()) == {0.0, 0.005}
    assert len(set(named_rates(model, optimizer, "lr_scale").values())) > 2


def test_train_py_with_a_name_only() -> None:
    model = vit()
    optimizer = create_as_train_py(model, "--opt", "sing_adamw")
    assert type(optimizer) is SING
    assert (optimizer.defaults["lr"], optimizer.defaults["lookahead_k"]) == (5e-3, 5)
    assert not all(param.requires_grad for param in model.parameters())
    assert type(create_as_train_py(vit(), "--opt", "sing_lamb")) is Wrapped


def test_train_py_refuses_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="Unknown option 'nesterof' of sing_sgd"):
        create_as_train_py(vit(), "--opt", "sing_sgd", "--opt-kwargs", "nesterof=True")
    with pytest.raises(ValueError, match="Unknown option 'betas' of sing_sgd"):
        create_as_train_py(vit(), "--opt", "sing_sgd", "--opt-betas", "0.9", "0.98")
    with pytest.raises(ValueError, match=r"Invalid centralize: 'maybe' for sing_adamw. Accepted: True or False"):
        create_as_train_py(vit(), "--opt", "sing_adamw", "--opt-kwargs", "centralize=maybe")


def test_timms_legacy_factory() -> None:
    args = argparse.Namespace(
        opt="sing_adamw", lr=0.02, weight_decay=0.005, momentum=0.9, opt_args={"lookahead_k": 3, "freeze": "none"}
    )
    optimizer = legacy_create_optimizer(args, vit())
    assert type(optimizer) is SING
    assert (optimizer.defaults["lookahead_k"], optimizer.defaults["lr"]) == (3, 0.02)
    assert not [group for group in optimizer.param_groups if group["weight_decay"] not in (0.0, 0.005)]


# --- training


@pytest.mark.parametrize("opt", ["sing_adamw", "sing_sgd", "sing_adabelief", "sing_adafactor", "sing_radam"])
def test_training_equals_the_cores_own_factory(opt: str) -> None:
    through_timm, through_core = vit(), vit()
    options = {"lr": 0.02, "weight_decay": 0.05}
    losses = train(through_timm, create_optimizer_v2(through_timm, opt=opt, **options), steps=12)
    exempt = through_core.no_weight_decay()  # type: ignore[operator]
    optimizer = sing_plugins.create_optimizer(through_core, opt, no_weight_decay=exempt, **options)
    assert train(through_core, optimizer, steps=12) == losses
    assert same_weights(through_timm, through_core)
    assert not same_weights(through_timm, vit())


@pytest.mark.parametrize("host", timm_hosts)
def test_each_of_timms_hosts_equals_the_same_host_wrapped_by_hand(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # Kron compiles its functions, slowly
    model, twin = mlp(), mlp()
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = create_optimizer_v2(model, opt=f"sing_{host}", freeze="none", **options)
    by_hand = create_optimizer_v2(twin, opt=host, **options)
    if type(optimizer) is SING:
        assert optimizer.host == host
        return
    assert type(optimizer.host) is type(by_hand)
    assert optimizer.host.defaults | {"weight_decay": 0.0} == by_hand.defaults | {"weight_decay": 0.0}
    for a, b in ((model, optimizer), (twin, wrap(by_hand))):
        train_tiny(a, b)
    assert same_weights(model, twin)
    assert not same_weights(model, mlp())


def test_a_host_of_the_users_own_in_a_registry() -> None:
    class Slow(torch.optim.SGD):
        pass

    registry = OptimizerRegistry()
    registry.register(OptimInfo("slow", Slow, has_eps=False, has_momentum=True, defaults={"nesterov": True}))
    optimizer = registry.create_optimizer(mlp(), opt="sing_slow", lr=0.1, momentum=0.7)
    assert type(optimizer.host) is Slow  # type: ignore[attr-defined]
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.7, True)
    with pytest.raises(ValueError, match="Unknown optimizer 'sing_slow'"):
        create_optimizer_v2(mlp(), opt="sing_slow")


def test_fallback_groups_reach_timms_hybrid_hosts() -> None:
    def flagged(module: nn.Module) -> list[dict[str, Any]]:
        first, *rest = module.parameters()
        return [{"params": [first], "use_fallback": True}, {"params": rest}]

    model = mlp()
    optimizer = create_optimizer_v2(model, opt="sing_lamb", lr=0.1, param_group_fn=flagged)
    assert [group["use_fallback"] for group in optimizer.param_groups if "use_fallback" in group] == [True]


@pytest.mark.parametrize("opt", ["sing_adamw", "sing_lamb"])
@pytest.mark.parametrize("steps_before", [3, 5, 6])
def test_resume_is_exact_inside_at_and_after_a_lookahead_sync(opt: str, steps_before: int, tmp_path: Path) -> None:
    options = {"opt": opt, "lr": 0.02, "weight_decay": 0.05, "layer_decay": 0.7}
    straight = vit()
    optimizer = create_optimizer_v2(straight, **options)
    train(straight, optimizer, steps_before)
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    train(straight, optimizer, steps=7)

    resumed = vit()
    optimizer = create_optimizer_v2(resumed, **options)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, steps=7)
    assert same_weights(straight, resumed)


def test_one_line_says_what_was_frozen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sing_plugins"):
        create_optimizer_v2(mlp(), opt="sing_adamw", lr=0.02, weight_decay=0.05)
    assert [record.getMessage() for record in caplog.records] == [
        "SING: freeze=layernorm: 2 tensors frozen (1.weight, 1.bias); "
        "trained: 2 tensors with weight_decay=0, 2 tensors with weight_decay=0.05."
    ]


@pytest.mark.parametrize("name", ["sing_adamw", "singadamw", "sing_lamb", "sing_rprop"])
def test_every_entry_of_the_registry_is_a_class_as_timms_are(name: str) -> None:
    kind = get_optimizer_class(name, bind_defaults=False)
    assert isinstance(kind, type)
    assert issubclass(kind, torch.optim.Optimizer)
    assert kind is get_optimizer_info(name).opt_class
    assert kind.__module__ == "sing_timm"
    assert isinstance(kind(mlp().parameters(), lr=0.1), torch.optim.Optimizer)


# --- other people's optimizers with "sing" in their names


@pytest.mark.parametrize("name", ["singularity", "my_sing", "sing_along", "housing", "sing_my_own"])
def test_an_optimizer_of_the_users_own_may_have_sing_in_its_name(name: str) -> None:
    class Mine(torch.optim.SGD):
        pass

    default_registry.register(OptimInfo(name, Mine, has_momentum=True))
    try:
        optimizer = create_optimizer_v2(mlp(), opt=name, lr=0.1, momentum=0.5, weight_decay=0.1)
    finally:
        del default_registry._optimizers[name]
    assert type(optimizer) is Mine
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert optimizer.param_groups[0]["momentum"] == 0.5


# --- how tools call timm


@pytest.mark.parametrize("opt", ["sing_adamw", "sing_adam", "sing_lamb"])
def test_none_stands_for_what_was_not_given(opt: str) -> None:
    """open_clip passes its own arguments on whether they were given or not."""
    optimizer = create_optimizer_v2(mlp(), opt=opt, lr=0.1, weight_decay=0.1, eps=None, betas=None)
    assert optimizer.param_groups[0]["eps"] == (1e-6 if opt == "sing_lamb" else 1e-8)
    assert tuple(optimizer.param_groups[0]["betas"]) == (0.9, 0.999)


def test_a_model_in_data_parallel_is_trained_with_nothing_frozen_and_a_word_about_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        optimizer = create_optimizer_v2(model, opt="sing_adamw", lr=0.1, weight_decay=0.1)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
        assert "2 not frozen, since the model is in DistributedDataParallel already" in caplog.text
        groups = [{"params": list(model.parameters())}]
        assert len(create_optimizer_v2(groups, opt="sing_adamw", lr=0.1).param_groups) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_what_an_earlier_optimizer_froze_is_in_the_groups_of_the_next_one() -> None:
    model = mlp()
    create_optimizer_v2(model, opt="sing_adamw", lr=0.1)
    optimizer = create_optimizer_v2(model, opt="sing_lamb", lr=0.1, weight_decay=0.1, freeze="none")
    assert named_rates(model, optimizer)["1.weight"] == 0.0
    assert len(named_rates(model, optimizer)) == 6
