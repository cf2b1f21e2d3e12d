"""SING by name in Hugging Face Trainer: names, options, groups, training, resume, checkpoints without the plugin."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names
from transformers.training_args import OptimizerNames

import sing_transformers
from sing_plugins import SING
from sing_plugins.names import NATIVE, torch_hosts
from sing_plugins.wrapper import Wrapped

Rows = list[dict[str, Tensor]]


def bert(dropout: float = 0.0) -> BertForSequenceClassification:
    """Small, in float64, with a normalization layer that Trainer's decay rules do not know."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        initializer_range=0.2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = BertForSequenceClassification(config)
    model.classifier = nn.Sequential(nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, 2))
    return model.double()


def rows(count: int = 96) -> Rows:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": torch.tensor(row % 2)}
        for row in range(count)
    ]


def arguments(folder: Path, optim: str = "sing_adamw", **options: Any) -> TrainingArguments:
    given = {
        "learning_rate": 5e-3,
        "max_steps": 7,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), optim=optim, **given)


def trainer(folder: Path, optim: str = "sing_adamw", model: nn.Module | None = None, **options: Any) -> Trainer:
    return Trainer(model=model or bert(), args=arguments(folder, optim, **options), train_dataset=rows())


def create(folder: Path, optim: str = "sing_adamw", model: nn.Module | None = None, **options: Any) -> Any:
    return trainer(folder, optim, model, **options).create_optimizer()


def trained(trainer: Trainer) -> dict[str, Tensor]:
    """The weights after training; the optimizer is left in trainer.optimizer."""
    trainer.train()
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def log(trainer: Trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def run(code: str, **environment: str) -> None:
    """Run code in a fresh interpreter outside of the checkout; it must succeed."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SING_", "PYTHON", "TORCH_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env={**ours, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr


def group_of(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any]:
    (found,) = [group for group in optimizer.param_groups if any(param is p for p in group["params"])]
    return found


# ------------------------------------------------------------------------------------------------------------- names

CHOICES = [member.value for member in OptimizerNames]
OURS = [name for name in CHOICES if name.startswith("sing")]
STOCK = [name for name in CHOICES if not name.startswith("sing")]


def through_parser(folder: Path) -> TrainingArguments:
    line = ["--output_dir", str(folder), "--optim", "sing_adamw", "--optim_args", "lookahead_k=none", "--use_cpu"]
    return HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)[0]


def through_json(folder: Path) -> TrainingArguments:
    settings = {"output_dir": str(folder), "optim": "sing_adamw", "optim_args": "lookahead_k=none", "use_cpu": True}
    (folder / "settings.json").write_text(json.dumps(settings))
    return HfArgumentParser(TrainingArguments).parse_json_file(str(folder / "settings.json"))[0]


def through_set_optimizer(folder: Path) -> TrainingArguments:
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True)
    return arguments.set_optimizer(name="sing_adamw", args="lookahead_k=none")


@pytest.mark.parametrize("given", [through_parser, through_json, through_set_optimizer])
def test_a_name_is_taken_by_every_door(given: Any, tmp_path: Path) -> None:
    optimizer = Trainer(model=bert(), args=given(tmp_path), train_dataset=rows()).create_optimizer()
    assert type(optimizer) is SING
    assert optimizer.defaults["lookahead_k"] is None


def test_native_hosts_torchs_classes_and_trainers_own_optimizers_are_offered() -> None:
    own = {"adamw_torch", "adamw_torch_fused", "rmsprop", "adagrad", "lion_32bit", "stable_adamw", "grokadamw"}
    assert {*NATIVE, *("sing_" + host for host in {*torch_hosts(), *own})} <= set(OURS)


def test_help_lists_the_names() -> None:
    text = HfArgumentParser(TrainingArguments).format_help()
    assert all(name in text for name in OURS)


@pytest.mark.parametrize(
    "name",
    [
        "sing_nothing",
        "sing_lbfgs",
        "sing_sparseadam",
        "sing_lomo",
        "sing_adalomo",
        "sing_schedule_free_adamw",
        "sing_galore_adamw",
        "sing_apollo_adamw_layerwise",
        "adamw_sing",
    ],
)
def test_a_name_that_is_not_offered_is_refused_with_the_list_of_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} is not a valid OptimizerNames.*'adamw_torch'.*'sing_adamw'"):
        arguments(tmp_path, name)


def test_a_member_is_as_good_as_its_plain_string(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    member = args.optim
    assert isinstance(member, OptimizerNames)
    assert member == "sing_adamw" == member.value == member.name
    assert {member: 1}["sing_adamw"] == {"sing_adamw": 1}[member] == 1
    assert member is OptimizerNames("sing_adamw") is OptimizerNames["sing_adamw"] is OptimizerNames(member)
    assert member in list(OptimizerNames)
    assert len(CHOICES) == len(OptimizerNames) == len(set(CHOICES))
    assert args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"] == "sing_adamw"
    assert type(args.to_dict()["optim"]) is str
    assert all(type(pickle.loads(pickle.dumps(member, protocol))) is str for protocol in range(6))
    for copied in (copy.copy(member), copy.deepcopy(member), copy.deepcopy(args).optim, copy.copy(args).optim):
        assert copied == "sing_adamw"


def test_patching_touches_no_stock_name_and_can_be_undone() -> None:
    """A process that has never been patched is the measure."""
    run(
        """
import torch, transformers
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
import sing_plugins

model = torch.nn.Linear(2, 2)
handlers = getattr(transformers.trainer, "_OPTIMIZER_HANDLERS", {})

def state():
    tables = [dict(OptimizerNames._member_map_), dict(OptimizerNames._value2member_map_), dict(handlers)]
    ids = [{key: id(value) for key, value in table.items()} for table in tables]
    return list(OptimizerNames), list(OptimizerNames._member_names_), ids, vars(Trainer)["get_optimizer_cls_and_kwargs"]

def resolved():
    found = {}
    for name in stock:
        args = TrainingArguments(output_dir="/nowhere", use_cpu=True, report_to="none", optim=name)
        try:
            found[name] = Trainer.get_optimizer_cls_and_kwargs(args, model)
        except Exception as error:
            found[name] = type(error), str(error)
    return found

stock = [member.value for member in OptimizerNames]
before, choices = state(), resolved()
assert "sing_adamw" not in stock and choices["adamw_torch"][0] is torch.optim.AdamW
sing_plugins.enable("transformers")
sing_plugins.enable("transformers")
assert [member.value for member in OptimizerNames][:len(stock)] == stock and "sing_adamw" in OptimizerNames._member_map_
assert resolved() == choices
assert state()[2][2] == before[2][2]
sing_plugins.disable("transformers")
assert state() == before
assert resolved() == choices
try:
    TrainingArguments(output_dir="/nowhere", use_cpu=True, optim="sing_adamw")
except ValueError as error:
    assert "sing" not in str(error).split("select one of")[1]
else:
    raise AssertionError
sing_plugins.enable("transformers")
TrainingArguments(output_dir="/nowhere", use_cpu=True, optim="sing_adamw")
""",
        SING_PLUGINS_AUTOLOAD="0",
    )


def test_a_hook_of_somebody_else_on_top_of_ours_survives_unpatching(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Trainer.get_optimizer_cls_and_kwargs
    theirs = staticmethod(lambda args, model=None: ours(args, model))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", theirs)
    try:
        sing_transformers.unpatch()
        assert not sing_transformers.is_patched()
        assert vars(Trainer)["get_optimizer_cls_and_kwargs"] is theirs
    finally:
        monkeypatch.undo()
        sing_transformers.patch()
    assert sing_transformers.is_patched()


CREATED = """
from transformers import Trainer, TrainingArguments
import torch
args = TrainingArguments(output_dir="/nowhere", use_cpu=True, report_to="none", optim="sing_adamw")
optimizer = Trainer(model=torch.nn.Linear(2, 2), args=args).create_optimizer()
assert type(optimizer).__name__ == "SING", optimizer
"""
FRESH = {
    # Each begins to import torch, and with it the watcher, while another module of Transformers is half imported.
    "from transformers import TrainingArguments": CREATED,
    "from transformers import HfArgumentParser, TrainingArguments": CREATED,
    "from transformers import Trainer": CREATED,
    "from transformers.training_args import OptimizerNames": CREATED,
    "import torch": CREATED,
    "import torch, transformers": "import sys; assert 'sing_transformers' not in sys.modules",
}


@pytest.fixture(scope="module")
def fresh() -> dict[str, Future[None]]:
    """Fresh interpreters, two at a time: they take seconds to import what they import."""
    with ThreadPoolExecutor(2) as pool:
        return {statement: pool.submit(run, f"{statement}\n{then}") for statement, then in FRESH.items()}


@pytest.mark.parametrize("statement", [statement for statement, then in FRESH.items() if then == CREATED])
def test_no_import_of_ours_is_needed_whatever_is_imported_first(statement: str, fresh: dict[str, Future[None]]) -> None:
    fresh[statement].result()


def test_transformers_alone_does_not_import_the_adapter(fresh: dict[str, Future[None]]) -> None:
    fresh["import torch, transformers"].result()


# ----------------------------------------------------------------------------------------------------- host, options

NATIVE_HOSTS = ["adamw", "adabelief", "adafactor", "sgd"]


@pytest.mark.parametrize("host", NATIVE_HOSTS)
def test_trainers_arguments_reach_a_native_host(host: str, tmp_path: Path) -> None:
    optimizer = create(
        tmp_path,
        f"sing_{host}",
        learning_rate=0.02,
        weight_decay=0.003,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
    )
    assert type(optimizer) is SING
    assert optimizer.host == host
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.02, 0.003, 1e-5)
    assert group.get("betas") == ((0.8, 0.95) if host in ("adamw", "adabelief") else None)


WRAPPED_HOSTS = [
    ("adam", "Adam", {"betas": (0.8, 0.95), "eps": 1e-5}),
    ("radam", "RAdam", {"betas": (0.8, 0.95), "eps": 1e-5}),
    ("adamw_torch", "AdamW", {"betas": (0.8, 0.95), "eps": 1e-5, "fused": None}),
    ("adamw_torch_fused", "AdamW", {"betas": (0.8, 0.95), "eps": 1e-5, "fused": True}),
    ("rmsprop", "RMSprop", {"alpha": 0.99, "eps": 1e-8}),
    ("adagrad", "Adagrad", {"lr_decay": 0, "eps": 1e-10}),
    ("adadelta", "Adadelta", {"rho": 0.9, "eps": 1e-6}),
]


@pytest.mark.parametrize(("host", "kind", "expected"), WRAPPED_HOSTS, ids=[host for host, *_ in WRAPPED_HOSTS])
def test_trainers_arguments_reach_a_wrapped_host_like_trainers_own(
    host: str, kind: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    optimizer = create(
        tmp_path,
        f"sing_{host}",
        learning_rate=0.02,
        weight_decay=0.003,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
    )
    assert type(optimizer) is Wrapped
    assert type(optimizer.host) is getattr(torch.optim, kind)
    group = optimizer.param_groups[0]
    assert {"lr": 0.02, "weight_decay": 0.003, **expected}.items() <= group.items()


@pytest.mark.parametrize(
    "name", ["sing", *(f"sing_{host}" for host in sorted({*NATIVE_HOSTS, *torch_hosts()} - {"muon"}))]
)
def test_every_name_trains(name: str, tmp_path: Path) -> None:
    """Rprop has no weight decay at all, so none is asked for here."""
    training = trainer(tmp_path, name, learning_rate=1e-3, max_steps=2)
    start = {name: param.detach().clone() for name, param in training.model.named_parameters()}
    end = trained(training)
    assert all(param.isfinite().all() for param in end.values())
    assert any(not torch.equal(start[name], end[name]) for name in end)


def test_a_host_that_takes_matrices_only_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        create(tmp_path, "sing_muon")


def test_a_host_whose_package_is_missing_says_so_as_trainers_own_name_does(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="failed to import syncfree AdamW from torch_xla"):
        create(tmp_path, "sing_adamw_torch_xla")


OPTIM_ARGS = [
    ("sing_adamw", "softplus_beta=none,lookahead_k=3", {"softplus_beta": None, "lookahead_k": 3}),
    ("sing_adamw", "softplus_relative=4", {"softplus_relative": 4.0}),
    ("sing_adamw", "centralize=False, normalize=false", {"centralize": False, "normalize": False}),
    ("sing_adamw", "betas=0.9:0.98", {"betas": (0.9, 0.98)}),
    ("sing_adamw", "betas=(0.9, 0.98),eps=1e-5", {"betas": (0.9, 0.98), "eps": 1e-5}),
    ("sing_sgd", "momentum=0.8,nesterov=True", {"momentum": 0.8, "nesterov": True}),
    ("sing_adafactor", "clip_threshold=2", {"clip_threshold": 2.0}),
    (
        "sing_rmsprop",
        "alpha=0.9,centered=False,lookahead_k=none",
        {"alpha": 0.9, "centered": False, "sing_lookahead_k": None},
    ),
    ("sing_adamw_torch", "amsgrad=true,normalize=False", {"amsgrad": True, "sing_normalize": False}),
    ("sing_adam", "foreach=false,decoupled_weight_decay=False", {"foreach": False, "decoupled_weight_decay": False}),
]


@pytest.mark.parametrize(("name", "text", "expected"), OPTIM_ARGS)
def test_optim_args_are_typed(name: str, text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    group = create(tmp_path, name, optim_args=text).param_groups[0]
    assert {key: group[key] for key in expected} == expected
    assert [type(group[key]) for key in expected] == [type(value) for value in expected.values()]


BAD_OPTIM_ARGS = [
    ("sing_adamw", "soft_plus_beta=50", "Unknown option 'soft_plus_beta' of sing_adamw.*Valid:.*softplus_beta"),
    ("sing_sgd", "betas=0.9:0.98", "Unknown option 'betas' of sing_sgd.*Valid:.*momentum"),
    ("sing_sgd", "softplus_beta=50", "Unknown option 'softplus_beta' of sing_sgd"),
    ("sing_rmsprop", "softplus_beta=50", "sing_rmsprop is rmsprop behind standardization and Lookahead"),
    ("sing_rmsprop", "alhpa=0.9", "Unknown option 'alhpa' of sing_rmsprop.*Valid: alpha"),
    ("sing_adamw", "lookahead_k=2.5", "Invalid lookahead_k: '2.5'.*Accepted: a whole number"),
    ("sing_adamw", "lookahead_k=0", "Invalid lookahead_k: 0.*Accepted: a whole number"),
    ("sing_adamw", "freeze=all", "Invalid freeze: 'all'.*Accepted: layernorm, norm, none"),
    ("sing_adamw", "centralize=maybe", "Invalid centralize: 'maybe'.*Accepted: True or False"),
    ("sing_adamw", "betas=0.9", "Invalid betas: '0.9'.*Accepted: two numbers"),
    ("sing_adamw", "lookahead_k", "Invalid option string.*Expected key=value"),
    ("sing_adamw", "lookahead_k=5,lookahead_k=6", "gives 'lookahead_k' twice"),
    ("sing_sgd", "nesterov=True,momentum=0", "Invalid nesterov: True with momentum 0"),
    ("sing_adamw", "lr=0.1", "Invalid optim_args: lr=0.1.*learning_rate"),
    ("sing_adamw", "weight_decay=0.1", "Invalid optim_args: weight_decay=0.1.*weight_decay"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_OPTIM_ARGS, ids=[f"{n}:{t}" for n, t, _ in BAD_OPTIM_ARGS])
def test_a_mistake_in_optim_args_is_refused_before_the_model_is_touched(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    model = bert()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, name, model, optim_args=text).train()
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta1": 1.0}, "Invalid betas"),
        ({"adam_epsilon": 0.0}, "Invalid eps"),
        ({"weight_decay": -0.1}, "Invalid weight_decay"),
        ({"learning_rate": -1.0}, "Invalid lr"),
    ],
)
def test_a_bad_argument_of_trainers_is_refused(options: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        create(tmp_path, **options)


def test_weight_decay_for_a_host_without_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown option 'weight_decay' of sing_rprop"):
        create(tmp_path, "sing_rprop", weight_decay=0.1)


# ------------------------------------------------------------------------------------------------- freezing and groups


def test_layer_norms_are_frozen_by_default_and_left_out_of_the_groups(tmp_path: Path) -> None:
    model = bert()
    optimizer = create(tmp_path, model=model)
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "LayerNorm" in name}
    held = {param for group in optimizer.param_groups for param in group["params"]}
    assert held == {param for param in model.parameters() if param.requires_grad}


@pytest.mark.parametrize(("freeze", "count"), [("none", 0), ("layernorm", 10), ("norm", 12)])
def test_freeze_is_an_option(freeze: str, count: int, tmp_path: Path) -> None:
    model = bert()
    create(tmp_path, model=model, optim_args=f"freeze={freeze}")
    assert sum(not param.requires_grad for param in model.parameters()) == count


def test_frozen_layers_do_not_move_and_the_rest_does(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    start = {name: param.detach().clone() for name, param in training.model.named_parameters()}
    moved = {name for name, param in trained(training).items() if not torch.equal(param, start[name])}
    assert moved == {name for name in start if "LayerNorm" not in name}


class DecaysNoEmbeddings(Trainer):
    """Decay names of its own, as Trainer invites."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in get_parameter_names(model, [nn.LayerNorm], ["bias"]) if "embeddings" not in name]


def test_trainers_decay_names_and_ours_both_exempt(tmp_path: Path) -> None:
    model = bert()
    args = arguments(tmp_path, weight_decay=0.1, optim_args="freeze=none")
    training = DecaysNoEmbeddings(model=model, args=args, train_dataset=rows())
    assert "classifier.0.weight" in training.get_decay_parameter_names(model)  # a BatchNorm, which ours exempt
    optimizer = training.create_optimizer()
    decayed = {name for name, param in model.named_parameters() if group_of(optimizer, param)["weight_decay"] == 0.1}
    matrices = {name for name, param in model.named_parameters() if param.dim() > 1}
    assert decayed == {name for name in matrices if "embeddings" not in name}


def test_decay_all_reaches_everything_that_is_trained(tmp_path: Path) -> None:
    optimizer = create(tmp_path, weight_decay=0.1, optim_args="decay_all=True")
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert all(group["decay_all"] for group in optimizer.param_groups)


def test_a_model_of_which_nothing_would_be_left_to_train_is_refused(tmp_path: Path) -> None:
    model = bert()
    for name, param in model.named_parameters():
        param.requires_grad_("LayerNorm" in name)
    with pytest.raises(ValueError, match=r"'layernorm' would freeze all .* Pass freeze='none'"):
        trainer(tmp_path, model=model, optim_args="freeze=layernorm").train()


def test_layer_norms_left_trainable_while_the_rest_is_frozen_are_trained_by_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = bert()
    for name, param in model.named_parameters():
        param.requires_grad_("LayerNorm" in name)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    trainer(tmp_path, model=model).train()
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {name for name in before if "LayerNorm" in name}
    assert "left to train (freeze=none), since most of what is around them is frozen" in caplog.text


class OwnGroups(Trainer):
    """Overrides both methods, as tutorials do."""

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        kind, options = super().get_optimizer_cls_and_kwargs(args, model)
        return kind, {**options, "lookahead_k": 3}

    def create_optimizer(self) -> Any:
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        head = [param for name, param in self.model.named_parameters() if "classifier" in name]
        body = [param for name, param in self.model.named_parameters() if "classifier" not in name]
        groups = [{"params": head, "lr": 0.1, "weight_decay": 0.0}, {"params": body, "weight_decay": 0.2}]
        self.optimizer = kind(groups, **options)
        return self.optimizer


def test_the_groups_and_options_of_a_subclass_are_kept(tmp_path: Path) -> None:
    model = bert()
    training = OwnGroups(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=rows())
    training.train()
    optimizer = training.create_optimizer()
    assert type(optimizer) is SING
    head = group_of(optimizer, model.classifier[1].weight)
    body = group_of(optimizer, model.bert.pooler.dense.weight)
    assert (head["lr"], head["weight_decay"]) == (0.1, 0.0)
    assert (body["lr"], body["weight_decay"], body["lookahead_k"]) == (5e-3, 0.2, 3)
    # Groups of a subclass's own stay what they are, so that its schedules fit and its biases decay as it says.
    assert group_of(optimizer, model.bert.pooler.dense.bias)["weight_decay"] == 0.2
    assert len(optimizer.param_groups) == 2


def test_a_plain_list_of_parameters_gets_trainers_weight_decay(tmp_path: Path) -> None:
    model = bert()
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, weight_decay=0.1), model)
    optimizer = kind(model.parameters(), **options)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
    assert group_of(optimizer, model.bert.pooler.dense.weight)["weight_decay"] == 0.1


@pytest.mark.parametrize("name", ["sing_adamw", "sing_adafactor", "sing_radam"])
def test_without_the_model_nothing_is_frozen_and_one_line_says_so(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools call the method so, and it answers so for Trainer's own names."""
    model = bert()
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim=name, weight_decay=0.1))
    assert issubclass(kind, torch.optim.Optimizer)
    groups = [{"params": [model.classifier[1].weight]}, {"params": [model.classifier[1].bias], "weight_decay": 0.0}]
    optimizer = kind(groups, **options)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(param.requires_grad for param in model.parameters())
    assert "got parameters and not a model, so no normalization layer is frozen" in caplog.text


def test_without_the_model_an_explicit_freeze_is_refused(tmp_path: Path) -> None:
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args="freeze=layernorm"))
    with pytest.raises(ValueError, match=r"Invalid freeze: 'layernorm' for parameters .* Pass the model"):
        kind(bert().parameters(), **options)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args="freeze=none"))
    assert kind(bert().parameters(), **options)


# ------------------------------------------------------------------------------------------------------------ messages


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sing_plugins"]


def test_trainers_untouched_defaults_are_hinted_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        create(tmp_path, learning_rate=5e-5)
    lines = said(caplog)
    assert [line for line in lines if "lr=" in line and "framework's default" in line] == [
        line for line in lines if "lr=5e-05" in line
    ]
    assert sum("lr=5e-05" in line for line in lines) == 1
    assert not [line for line in lines if "max_grad_norm" in line]  # nobody has asked for Trainer's 1


def test_clipping_that_was_asked_for_is_explained_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        create(tmp_path, max_grad_norm=0.5)
    (line,) = [line for line in said(caplog) if "max_grad_norm" in line]
    assert line.startswith("SING: max_grad_norm=0.5 clips gradients, which normalization undoes (paper D.1): only tens")


def test_settings_of_sings_own_are_not_hinted_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sing_plugins")
    create(tmp_path, max_grad_norm=0.0, weight_decay=0.01)
    (line,) = said(caplog)
    assert line.startswith("SING: freeze=layernorm: 10 tensors frozen")
    assert "tensors with weight_decay=0.01" in line


def test_clipping_is_not_called_harmless_where_gradients_are_not_normalized(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create(tmp_path, optim_args="normalize=False", max_grad_norm=0.5)
    assert not [line for line in said(caplog) if "max_grad_norm" in line]


# ------------------------------------------------------------------------------------------------------------ training


def by_hand(steps: int, **options: Any) -> dict[str, Tensor]:
    """Full-batch training with a constant lr in a loop of our own."""
    model, batch = bert(), {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    names = dict(model.named_parameters())
    for name, param in names.items():
        param.requires_grad_("LayerNorm" not in name)
    matrices = [param for param in names.values() if param.dim() > 1]
    vectors = [param for name, param in names.items() if param.dim() < 2 and "LayerNorm" not in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = SING(groups, lr=5e-3, eps=1e-13, **options)
    for _ in range(steps):
        model.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return {name: param.detach() for name, param in names.items()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 1e-11) -> None:
    """Equal but for rounding. A key's bias has no gradient but rounding, since softmax does not see it."""
    assert ours.keys() == theirs.keys()
    apart = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours if not name.endswith("key.bias")}
    assert max(apart.values()) <= within, apart


# Trainer may scale the loss with the number of steps and processes, and clipping scales gradients. SING cancels that
# as far as the norms are far above eps.
TINY_EPS = {"adam_epsilon": 1e-13}
FULL_BATCH = {"per_device_train_batch_size": 96, "lr_scheduler_type": "constant", "weight_decay": 0.1, **TINY_EPS}


@pytest.mark.parametrize("clipping", [0.0, 0.1])
def test_training_equals_a_loop_by_hand_whether_gradients_are_clipped_or_not(clipping: float, tmp_path: Path) -> None:
    assert_close(trained(trainer(tmp_path, max_grad_norm=clipping, **FULL_BATCH)), by_hand(7))


def test_the_ablations_of_the_paper_are_configurations(tmp_path: Path) -> None:
    text = "centralize=False,lookahead_k=none,softplus_beta=none"
    off = {"centralize": False, "lookahead_k": None, "softplus_beta": None}
    ours = trained(trainer(tmp_path, optim_args=text, max_grad_norm=0.0, **FULL_BATCH))
    assert_close(ours, by_hand(7, **off))


def test_the_logged_gradient_norm_is_the_gradients(tmp_path: Path) -> None:
    options = {"optim_args": "freeze=none", "max_steps": 2}
    ours, theirs = trainer(tmp_path, **options), trainer(tmp_path, "adamw_torch", max_steps=2)
    trained(ours)
    trained(theirs)
    assert log(ours, "grad_norm")[0] == log(theirs, "grad_norm")[0] > 0
    assert len(log(ours, "grad_norm")) == 2


def test_gradient_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    """BatchNorm looks at the micro-batch, so the model goes without."""

    def training(size: int, steps: int) -> Trainer:
        model = bert()
        model.classifier = model.classifier[1]
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        return trainer(tmp_path, model=model, **options, **TINY_EPS)

    assert_close(trained(training(4, 3)), trained(training(12, 1)))


# ------------------------------------------------------------------------------------------------- checkpoints, resume


@pytest.fixture(scope="module", params=["sing_adamw", "sing_sgd", "sing_radam", "sing_adamw_torch"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A run with dropout of 12 steps, in which Lookahead merges after steps 5 and 10, saved at each step."""
    torch.set_num_threads(1)  # as in the tests that resume it
    folder = tmp_path_factory.mktemp(request.param)
    training = trainer(folder, request.param, bert(0.1), max_steps=12, save_strategy="steps", save_steps=1)
    training.train()
    return training, folder


@pytest.mark.parametrize("step", [3, 5, 6])
def test_resume_is_exact_inside_at_and_after_a_merge(
    step: int, uninterrupted: tuple[Trainer, Path], tmp_path: Path
) -> None:
    whole, folder = uninterrupted
    torch.manual_seed(99)
    resumed = trainer(tmp_path, whole.args.optim, bert(0.1), max_steps=12)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.state.global_step == 12
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    assert log(resumed, "loss")[-(12 - step) :] == log(whole, "loss")[-(12 - step) :]


def test_arguments_in_a_checkpoint_load_where_the_plugin_is_not(tmp_path: Path) -> None:
    trained(trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1))
    saved = tmp_path / "checkpoint-1" / "training_args.bin"
    here = torch.load(saved, weights_only=False)
    assert type(here.optim) is str  # … and goes on where the plugin is
    assert type(Trainer(model=bert(), args=here, train_dataset=rows()).create_optimizer()) is SING
    run(
        f"""
import sys, torch
from transformers import Trainer
args = torch.load({str(saved)!r}, weights_only=False)
assert args.optim == "sing_adamw" and args.to_dict()["optim"] == "sing_adamw", args.optim
assert not [name for name in sys.modules if name == "sing_transformers" or name == "sing_plugins.names"]
try:
    Trainer(model=torch.nn.Linear(2, 2), args=args).create_optimizer()
except ValueError as error:
    assert "unsupported optimizer: sing_adamw" in str(error)
else:
    raise AssertionError("trained with another optimizer")
""",
        SING_PLUGINS_AUTOLOAD="0",
    )


# ------------------------------------------------------------------------------------------------------- two processes

WORKER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from torch.distributed.fsdp import FullyShardedDataParallel
from test_with_transformers import TINY_EPS, bert, rows, trained, trainer

folder, rank = Path(sys.argv[2]), os.environ["RANK"]
model = bert()
model.classifier = model.classifier[1]
training = trainer(folder, model=model, per_device_train_batch_size=4, **TINY_EPS)
weights = trained(training)
wrapper = type(training.model_wrapped).__name__
refusals = []
for use_orig_params in (False, True):
    # What Trainer does under FSDP1, which Accelerate does not let it do on the CPU: wrap, then create the optimizer.
    sharded = trainer(folder, per_device_train_batch_size=4)
    sharded.model = FullyShardedDataParallel(bert(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = sharded.create_optimizer()
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in ("input_ids", "labels")}
    sharded.model(**batch).loss.backward()
    before = [param.detach().clone() for param in sharded.model.parameters()]
    try:
        optimizer.step()
        refusals.append("nothing was raised")
    except RuntimeError as error:
        refusals.append(str(error))
    assert all(map(torch.equal, before, sharded.model.parameters()))
torch.save((wrapper, weights, refusals), folder / f"rank{rank}.pt")
"""


def two_processes(folder: Path, code: str, *arguments: str) -> None:
    """Run code with torchrun; its arguments are this folder, the one for its results, and the others."""
    script = folder / "worker.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(folder), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, Tensor], list[str]]]:
    folder = tmp_path_factory.mktemp("two_processes")
    two_processes(folder, WORKER)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_processes_equal_one_with_the_same_global_batch(outcomes: list[Any], tmp_path: Path) -> None:
    model = bert()
    model.classifier = model.classifier[1]
    alone = trained(trainer(tmp_path, model=model, per_device_train_batch_size=8, **TINY_EPS))
    for wrapper, weights, _ in outcomes:
        assert wrapper == "DistributedDataParallel"
        assert_close(weights, alone)


def test_tensors_flattened_by_fsdp1_are_refused(outcomes: list[Any]) -> None:
    for _, _, refusals in outcomes:
        assert len(refusals) == 2
        assert all("SING needs whole tensors" in refusal and "FSDP1" in refusal for refusal in refusals)


# Accelerate passes over the plugin of FSDP on the CPU, silently. Everything else is Trainer's and Accelerate's own.
SHARDED_WORKER = """
import math, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer
from test_with_accelerate import use_plugin
from test_with_transformers import SHARDED, arguments, bert, rows

folder, kind, steps, names = Path(sys.argv[2]), sys.argv[3], sys.argv[4].split(","), sys.argv[5:]

class Sharding(Trainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        assert not self.is_fsdp_enabled
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        use_plugin(self.accelerator, DistributedType.FSDP, plugin)
        self.is_fsdp_enabled = True

def trained(name, resume=None, **options):
    model = bert()
    model.classifier = model.classifier[1]
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": kind}
    options = {**SHARDED, **options, "fsdp": True, "fsdp_config": config}
    args = arguments(folder / name, name, per_device_train_batch_size=4, **options)
    training = Sharding(model=model, args=args, train_dataset=rows())
    training.train(resume_from_checkpoint=resume and str(folder / name / f"checkpoint-{resume}"))
    held = {type(param) for group in training.optimizer.param_groups for param in group["params"]}
    assert held == {DTensor}, held
    whole = lambda value: value.full_tensor() if isinstance(value, DTensor) else value
    return {name: whole(param).detach().clone() for name, param in training.model.named_parameters()}

results = {}
for name in names:
    often = math.gcd(*map(int, steps))
    whole = trained(name, save_strategy="steps", save_steps=often)
    results[name] = [whole, *(trained(name, step) for step in steps)]
torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
"""
SHARDED = {"max_steps": 12, "weight_decay": 0.1, **TINY_EPS}  # Lookahead merges after 5 and 10


def assert_sharded_as_alone(folder: Path, kind: str, steps: str, names: list[str], within: float) -> None:
    """FSDP2 in two processes, and resumed after these steps, against one process with the same global batch."""
    two_processes(folder, SHARDED_WORKER, kind, steps, *names)
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    for name in names:
        model = bert()
        model.classifier = model.classifier[1]
        alone = trained(trainer(folder / "alone", name, model, per_device_train_batch_size=8, **SHARDED))
        for result in results:
            whole, *resumed = result[name]
            assert_close(whole, alone, within)
            assert len(resumed) == len(steps.split(","))
            for weights in resumed:
                assert all(torch.equal(weights[key], whole[key]) for key in whole)


def test_fsdp2_in_two_processes_equals_one_and_resumes(tmp_path: Path) -> None:
    assert_sharded_as_alone(tmp_path, "FULL_STATE_DICT", "6", ["sing_adamw"], within=1e-12)


def test_what_an_earlier_run_froze_is_in_the_groups_of_the_next_one(tmp_path: Path) -> None:
    model = bert()
    trainer(tmp_path, model=model).create_optimizer()
    optimizer = trainer(tmp_path, model=model, optim_args="freeze=none", weight_decay=0.1).create_optimizer()
    grouped = {param for group in optimizer.param_groups for param in group["params"]}
    assert grouped == set(model.parameters())
    assert group_of(optimizer, model.bert.embeddings.LayerNorm.weight)["weight_decay"] == 0.0


def test_a_second_training_after_the_best_model_was_loaded_goes_on_from_it(tmp_path: Path) -> None:
    """With lr 0 the weights stay those of the checkpoint, not Lookahead's slow ones from the end of the first run."""
    model = bert()
    args = arguments(tmp_path, max_steps=4, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1)
    args.load_best_model_at_end, args.metric_for_best_model = True, "eval_loss"
    args.learning_rate = 0.5  # so that the first checkpoint is the best
    training = Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows())
    training.train()
    best = {name: param.detach().clone() for name, param in model.named_parameters()}
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    for _ in range(6):
        training.optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, best[name]), name
