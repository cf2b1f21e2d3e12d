"""Every door of SING with wrong and strange values: what was found there, and a few of the random configurations.

tests/hard/test_doors.py has a thousand of them, and says what has to hold.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doors import DOORS, FAIRSEQ_MODEL, HUGE, Mine, go_through, net, picture
from problems import MatricesOnly
from torch import nn

import sing_plugins
from sing_plugins import SING, create_optimizer, wrap

CONFIGURATIONS = {
    "create_optimizer": 30,
    "SING": 30,
    "wrap": 20,
    "timm": 20,
    "transformers": 15,
    "fairseq": 2,
    "accelerate": 10,
}


@pytest.mark.parametrize("door", DOORS)
def test_what_a_door_is_given_is_what_comes_out_or_an_error(door: str, tmp_path: Path) -> None:
    go_through(door, tmp_path, CONFIGURATIONS[door])


def test_the_same_configurations_every_time(tmp_path: Path) -> None:
    runs: list[list[str]] = [[], []]
    for run in runs:
        go_through("SING", tmp_path, 20, lambda attempt, run=run: run.append(str(sorted(attempt.given))))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 10


TWO = torch.tensor([0.1, 0.2])

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hosts": TWO}, r"Invalid hosts: 'a tensor of shape \(2,\)'\. Accepted: a dict of names"),
    ({"hosts": "radam"}, "Invalid hosts: 'radam'"),
    ({"hosts": {3: Mine}}, "Invalid hosts: {3: "),
    ({"hosts": {"mine": "SGD"}}, "Invalid hosts: {'mine': 'SGD'}"),
    ({"name": None}, r"Unknown optimizer None\. Valid: sing, "),
    ({"name": TWO}, "Unknown optimizer 'a tensor of shape"),
    ({"name": "x" * 1000}, "Unknown optimizer 'x{199}…"),
    ({"name": "sing_picky", "hosts": {"picky": MatricesOnly}}, "Invalid optimizer: 'sing_picky' .* matrices only"),
    ({"no_weight_decay": "0.weight"}, r"Invalid no_weight_decay: '0\.weight'\. Accepted: a list of names"),
    ({"no_weight_decay": 3}, "Invalid no_weight_decay: 3"),
    ({"no_weight_decay": [None]}, r"Invalid no_weight_decay: \[None\]"),
    ({"groups": 3}, "Invalid groups: 3"),
    ({"lr": HUGE}, "Invalid lr: 1000"),
    ({"lr": torch.ones((), device="meta")}, "Invalid lr: tensor"),
    ({"eps": TWO}, "Invalid eps: 'a tensor of shape"),
    ({"eps": torch.ones((), device="meta")}, "Invalid eps: tensor"),
    ({"eps": [0.1] * 1000}, "Invalid eps: .{200}… for sing_adamw"),
    ({"betas": (0.9, TWO)}, "Invalid betas: "),
    ({"name": "sing_rprop", "weight_decay": TWO}, "Invalid weight_decay: 'a tensor of shape"),
    ({"name": "sing_adam", "foreach": "maybe"}, "Invalid foreach: 'maybe' for sing_adam"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=range(len(REFUSED)))
def test_an_error_names_the_argument_and_its_value(given: dict[str, Any], message: str) -> None:
    model = net()
    before = picture(model)
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        create_optimizer(model, **given)
    assert picture(model) == before
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("model", [None, "net", list(net().parameters())], ids=["None", "str", "list"])
@pytest.mark.parametrize("function", [create_optimizer, sing_plugins.param_groups])
def test_what_is_no_model_is_refused(model: Any, function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"Invalid model: {type(model).__name__}\. Accepted: a torch\.nn\.Module"):
        function(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"betas": np.array([0.9, 0.9])}, r"Invalid betas: 'an array of shape \(2,\)'"),
        ({"host": "sgd", "momentum": TWO}, "Invalid momentum: 'a tensor of shape"),
        ({"host": "adafactor", "momentum": np.array([0.9, 0.9])}, "Invalid momentum: 'an array of shape"),
        ({"host": "sgd", "betas": TWO}, "Invalid betas: 'a tensor of shape .* has no betas"),
        ({"host": TWO}, "Invalid host: 'a tensor of shape"),
        ({"eps": HUGE}, "Invalid eps: 1000"),
        ({"nonfinite": np.array(["skip", "skip"])}, "Invalid nonfinite: 'an array of shape"),
    ],
    ids=str,
)
def test_the_class_names_the_argument_and_its_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SING(net().parameters(), **given)


def test_wrap_names_the_argument_and_its_value() -> None:
    with pytest.raises(TypeError, match=r"Invalid optimizer: 'adamw'\. Accepted: a torch\.optim\.Optimizer instance"):
        wrap("adamw")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Invalid optimizer: LBFGS cannot be wrapped: its step calls the closure"):
        wrap(torch.optim.LBFGS(net().parameters()))
    with pytest.raises(ValueError, match="Invalid norm_eps: 1000"):
        wrap(torch.optim.SGD(net().parameters()), norm_eps=HUGE)


def test_a_fraction_is_kept_as_a_number(tmp_path: Path) -> None:
    optimizer = SING(net().parameters(), weight_decay=Fraction(1, 2))  # type: ignore[arg-type]
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]["weight_decay"] == 0.5


def test_the_name_of_a_host_has_any_case() -> None:
    assert isinstance(create_optimizer(net(), "sing_MINE", hosts={"Mine": Mine}).host, Mine)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["siing_adabelief", "sng_adamw", "isng_sgd", "lookahead_sign_adamw", "xing_radam"])
def test_timm_has_no_other_optimizer_for_a_slip_in_the_first_part_of_a_name(name: str) -> None:
    from timm.optim import create_optimizer_v2

    sing_plugins.enable("timm")
    with pytest.raises(ValueError, match=f"Unknown optimizer '{name}'. Valid: sing, "):
        create_optimizer_v2(net(), opt=name)


def test_what_timm_makes_of_other_names_is_timms() -> None:
    from timm.optim import create_optimizer_v2

    sing_plugins.enable("timm")
    for name in ("adamw", "my_adamw", "lookahead_adamw"):
        assert not hasattr(create_optimizer_v2(net(), opt=name), "standardizes_gradients")
    with pytest.raises(AttributeError, match="lower"):
        create_optimizer_v2(net(), opt=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [np.float32(0.5), "0.5", Fraction(1, 2)], ids=repr)
def test_a_weight_decay_that_timm_puts_into_groups_is_a_number(decay: Any) -> None:
    from timm.optim import create_optimizer_v2

    sing_plugins.enable("timm")
    for name in ("sing", "sing_adagrad"):
        rates = [
            group["weight_decay"] for group in create_optimizer_v2(net(), opt=name, weight_decay=decay).param_groups
        ]
        assert sorted(rates) == [0.0, 0.5]
        assert {type(rate) for rate in rates} == {float}


def test_timms_momentum_may_be_a_tensor_where_it_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    from timm.optim import create_optimizer_v2

    sing_plugins.enable("timm")
    create_optimizer_v2(net(), opt="sing_adamw", momentum=TWO)  # type: ignore[arg-type]
    assert "momentum='a tensor of shape (2,)' is not used by sing_adamw" in caplog.text


class NotHere(nn.Module):
    """A criterion with which no Trainer can be built."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such place")


@pytest.mark.parametrize(
    ("name", "wrong_criterion", "message"),
    [("sing_radam", False, "Invalid optimizer: 'sing_radam'.*matrices only"), ("sing", True, "no such place")],
)
def test_fairseqs_trainer_leaves_the_model_as_it_was(
    name: str, wrong_criterion: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fairseq.benchmark
    import fairseq.trainer
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import sing_fairseq.optimizer

    # Not torch's Muon, which old torches do not have.
    monkeypatch.setitem(sing_fairseq.optimizer.HOSTS, "radam", MatricesOnly)
    line = [*FAIRSEQ_MODEL, "--optimizer", name, "--lr", "0.01"]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), line))
    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    before = picture(model)
    criterion = NotHere(criterion) if wrong_criterion else criterion
    with pytest.raises((ValueError, RuntimeError), match=message):
        fairseq.trainer.Trainer(cfg, task, model, criterion).optimizer  # noqa: B018
    assert picture(model) == before
