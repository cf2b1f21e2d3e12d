"""fairseq: ``--optimizer sing`` in its Trainer, its checkpoints and its commands, on a tiny translation task."""

from __future__ import annotations

import inspect
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fairseq.trainer
import pytest
import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.data import iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY, OPTIMIZER_REGISTRY, build_optimizer
from fairseq.trainer import Trainer
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import nn

import sing_fairseq
import sing_plugins
from sing_fairseq.optimizer import NAMES

ROOT = Path(sing_plugins.__file__).parents[1]
USER_DIR = Path("integrations", "sing_fairseq")


def words(text: str) -> list[str]:
    return text.split()


# 64 sentences in batches of 8 are 8 updates an epoch.
TINY = words("""
    --arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16
    --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 --decoder-attention-heads 2
    --share-decoder-input-output-embed --dropout 0 --batch-size 8 --cpu --data-buffer-size 0 --num-workers 0
    --no-progress-bar --disable-validation --seed 1 --lr 0.02
""")

Build = Callable[..., Trainer]
Train = Callable[..., dict[str, Any]]
Run = Callable[..., "Future[str]"]


@pytest.fixture(scope="module", autouse=True)
def checkpoints_load() -> Iterator[None]:
    """fairseq's own checkpoints do not load where torch.load takes nothing but weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        yield


@contextmanager
def root_logger_restored() -> Iterator[None]:
    """fairseq's commands configure the root logger when they are imported, and when they run."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def corpus(folder: Path) -> str:
    """Write a binarized corpus: an English sentence is a German one backwards, in other letters."""
    rng = random.Random(0)
    for split, size in (("train", 64), ("valid", 8)):
        german = [[f"a{rng.randrange(12)}" for _ in range(rng.randint(3, 6))] for _ in range(size)]
        english = [[word.replace("a", "b") for word in reversed(sentence)] for sentence in german]
        for language, sentences in (("de", german), ("en", english)):
            (folder / f"{split}.{language}").write_text("".join(" ".join(words) + "\n" for words in sentences))
    prefixes = ["--trainpref", f"{folder}/train", "--validpref", f"{folder}/valid", "--testpref", f"{folder}/valid"]
    with root_logger_restored():
        from fairseq_cli import preprocess

        parser = options.get_preprocessing_parser()
        preprocess.main(parser.parse_args(["-s", "de", "-t", "en", *prefixes, "--destdir", f"{folder}/bin"]))
        prefixes = ["--trainpref", f"{folder}/train.de", "--validpref", f"{folder}/valid.de"]
        preprocess.main(parser.parse_args(["--only-source", *prefixes, "--destdir", f"{folder}/lm"]))
    return f"{folder}/bin"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def build(data: str) -> Build:
    """Makes a Trainer as fairseq-train does, from more arguments, or from changes to its config."""

    def make(*arguments: str, optimizer: str = "sing", **changes: Any) -> Trainer:
        given = [data, *TINY, "--optimizer", optimizer, *arguments]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), given))
        OmegaConf.set_struct(cfg, False)
        for path, value in changes.items():
            section, key = path.split("__")
            cfg[section][key] = value
        torch.manual_seed(1)
        task = tasks.setup_task(cfg.task)
        return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))

    return make


def batches_of(trainer: Trainer, frequency: int = 1) -> Iterator[list[Any]]:
    trainer.begin_epoch(1)
    yield from iterators.GroupedIterator(trainer.get_train_iterator(1).next_epoch_itr(shuffle=False), frequency)


def weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state without what fairseq 0.12.2 has in it but neither initializes nor uses."""
    unused = re.compile(r"_float_tensor|layers\.\d\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")
    return {name: tensor for name, tensor in state_dict.items() if not unused.search(name)}


def update(trainer: Trainer, count: int) -> None:
    for _, samples in zip(range(count), batches_of(trainer), strict=False):
        trainer.train_step(samples)


def group_of(trainer: Trainer, name: str) -> dict[str, Any] | None:
    """The param group of one of the model's parameters."""
    parameter = dict(trainer.get_model().named_parameters())[name]
    for group in trainer.optimizer.param_groups:
        if any(parameter is other for other in group["params"]):
            return group
    return None


def sizes(model: nn.Module) -> tuple[int, int]:
    """How many matrices and vectors a model has; it depends on the version of fairseq."""
    vectors = sum(parameter.dim() == 1 for parameter in model.parameters())
    return len(list(model.parameters())) - vectors, vectors


def trained(matrices: int, vectors: int) -> str:
    return f"trained: {matrices} tensors with weight_decay=0.1, {vectors} tensors with weight_decay=0."


LAYER_NORM = "encoder.layers.0.final_layer_norm.weight"
BIAS = "encoder.layers.0.fc1.bias"
WEIGHT = "encoder.layers.0.fc1.weight"


# ---------------------------------------------------------------------------------------------------- names and options


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sing_muon"])
def test_every_name_trains_with_its_host(build: Build, name: str) -> None:
    trainer = build(optimizer=name)
    before = {parameter: parameter.clone() for parameter in trainer.optimizer.params}
    update(trainer, 6)
    optimizer = trainer.optimizer.optimizer
    host = name.removeprefix("sing_")
    if isinstance(optimizer, sing_plugins.SING):
        assert optimizer.host == ("adamw" if name == "sing" else host)
    else:
        assert type(optimizer.host).__name__.lower() == host
        own = {"adam", "adamax", "nag"}
        assert type(optimizer.host).__module__.startswith("fairseq" if host in own else "torch")
    used = [parameter for parameter in before if parameter.grad is not None]
    assert len(used) == 34
    assert all(parameter.isfinite().all() and not torch.equal(parameter, before[parameter]) for parameter in used)


def test_a_host_that_takes_matrices_only_is_refused_before_training(build: Build) -> None:
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        _ = build(optimizer="sing_muon").optimizer


@pytest.mark.parametrize("host", ["adabelief", "RAdam", "adam", "rprop"])
def test_sing_host_is_another_way_to_say_the_name(build: Build, host: str) -> None:
    built = build("--sing-host", host).optimizer.optimizer
    named = build(optimizer=f"sing_{host.lower()}").optimizer.optimizer
    assert type(built) is type(named)
    assert type(getattr(built, "host", None)) is type(getattr(named, "host", None))
    assert built.defaults == named.defaults


def test_options_are_typed_strings(build: Build) -> None:
    given = words("--sing-centralize False --sing-softplus-beta none --sing-lookahead-k None --sing-eps 1e-6")
    group = build(*given, "--sing-betas", "(0.9, 0.98)", "--weight-decay", "5e-2").optimizer.param_groups[0]
    expected = {"centralize": False, "normalize": True, "softplus_beta": None, "lookahead_k": None, "eps": 1e-6}
    expected.update(betas=(0.9, 0.98), weight_decay=0.05, lr=0.02)
    assert {name: group[name] for name in expected} == expected


def test_softplus_can_go_by_the_size_of_a_tensor(build: Build) -> None:
    group = build("--sing-softplus-relative", "4").optimizer.param_groups[0]
    assert (group["softplus_relative"], group["softplus_beta"]) == (4.0, 50.0)


def test_options_of_a_wrapped_host(build: Build) -> None:
    given = words("--sing-host rmsprop --sing-alpha 0.9 --sing-centered yes --sing-lookahead-k 3")
    group = build(*given).optimizer.param_groups[0]
    assert (group["alpha"], group["centered"], group["sing_lookahead_k"]) == (0.9, True, 3)


def test_an_option_that_was_not_given_is_the_hosts_own_default(build: Build) -> None:
    assert build().optimizer.optimizer.defaults == sing_plugins.SING([torch.zeros(1)], lr=0.02).defaults


BAD = {
    "--sing-host lamb": "Invalid --sing-host: 'lamb'. Accepted: adamw, adabelief, adafactor, sgd, adadelta",
    "--sing-freeze batchnorm": "Invalid freeze: 'batchnorm' for sing. Accepted: layernorm, norm, none",
    "--sing-softplus-beta -1": "Invalid softplus_beta: -1.0 for sing. Accepted: a finite number > 0, or None",
    "--sing-centralize maybe": "Invalid centralize: 'maybe' for sing. Accepted: True or False.",
    "--sing-betas 0.9": "Invalid betas: '0.9' for sing. Accepted: two numbers in [0, 1).",
    "--sing-momentum 0.9": "Unknown option 'momentum' of sing. Valid: betas, capturable, centralize",
    "--sing-softplus-relative 0": "Invalid softplus_relative: 0.0 for sing. Accepted: a finite number > 0, or None",
    "--sing-host sgd --sing-softplus-beta 50": "Unknown option 'softplus_beta' of sing_sgd.",
    "--sing-host radam --sing-softplus-beta 50": "Unknown option 'softplus_beta' of sing_radam. sing_radam is",
    "--sing-host nag --sing-momentum much": "Invalid momentum: 'much' for sing_nag. Accepted: a number in [0, 1)",
    "--sing-host rprop --weight-decay 0.1": "Unknown option 'weight_decay' of sing_rprop.",
    "--weight-decay -1": "Invalid weight_decay: -1.0 for sing. Accepted: a finite number >= 0.",
    "--lr -1": "Invalid lr: -1.0 for sing. Accepted: a finite number >= 0",
}


@pytest.mark.parametrize(("arguments", "message"), BAD.items())
def test_what_is_not_accepted_is_refused_with_what_is(build: Build, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(*arguments.split())


def test_a_host_that_contradicts_the_name_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match=r"Invalid --sing-host: 'adamw'\. Accepted: radam, as sing_radam says"):
        build("--sing-host", "adamw", optimizer="sing_radam")


def test_an_option_that_no_host_has_is_refused_by_the_command_line(build: Build) -> None:
    with pytest.raises(SystemExit):
        build("--sing-looakhead-k", "5")


def test_a_refused_option_leaves_the_model_alone(build: Build) -> None:
    trainer = build(optimizer="adam")
    trainer.cfg.optimizer = OmegaConf.create({"_name": "sing", "lr": [0.02], "sing_lookahead_k": 0})
    with pytest.raises(ValueError, match="Invalid lookahead_k: 0"):
        Trainer(trainer.cfg, trainer.task, trainer.model, trainer.criterion)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


# ------------------------------------------------------------------------------------------------ freeze, groups, hints


@pytest.mark.parametrize(("freeze", "frozen"), [("layernorm", 10), ("norm", 10), ("none", 0)])
def test_frozen_layers_are_not_among_the_trainers_parameters(
    build: Build, caplog: pytest.LogCaptureFixture, freeze: str, frozen: int
) -> None:
    caplog.set_level(logging.INFO, "sing_plugins")
    trainer = build("--sing-freeze", freeze, "--weight-decay", "0.1")
    norms = {p for m in trainer.model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    assert len(norms) == 10
    assert {p.requires_grad for p in norms} == {frozen == 0}
    assert len(list(trainer.optimizer.params)) == sum(1 for _ in trainer.model.parameters()) - frozen
    line = f"SING: freeze={freeze}: {frozen} tensors frozen"
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("SING: freeze")]
    assert said.startswith(line)
    matrices, vectors = sizes(trainer.get_model())
    assert said.endswith(trained(matrices, vectors - frozen))


def test_layernorm_is_frozen_by_default(build: Build) -> None:
    trainer = build()
    assert group_of(trainer, LAYER_NORM) is None
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    update(trainer, 6)
    assert torch.equal(trainer.model.state_dict()[LAYER_NORM], before[LAYER_NORM])
    assert not torch.equal(trainer.model.state_dict()[WEIGHT], before[WEIGHT])


@pytest.mark.parametrize("host", ["adamw", "radam"])
def test_weight_decay_goes_by_the_type_of_the_layer(build: Build, host: str) -> None:
    trainer = build("--sing-host", host, "--weight-decay", "0.1", "--sing-freeze", "none")
    rates = {name: (group_of(trainer, name) or {})["weight_decay"] for name in (LAYER_NORM, BIAS, WEIGHT)}
    assert rates == {LAYER_NORM: 0.0, BIAS: 0.0, WEIGHT: 0.1}
    everything = build("--sing-host", host, "--weight-decay", "0.1", "--sing-decay-all", "True").optimizer
    assert {group["weight_decay"] for group in everything.param_groups} == {0.1}


@register_criterion("scaled_cross_entropy")
class ScaledCrossEntropy(CrossEntropyCriterion):
    """A criterion with parameters of its own: a layer, and a normalization layer."""

    def __init__(self, task: Any, sentence_avg: bool) -> None:
        super().__init__(task, sentence_avg)
        self.scale, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def compute_loss(self, model: Any, output: Any, sample: Any, reduce: bool = True) -> Any:
        loss, _ = super().compute_loss(model, output, sample, reduce)
        loss = loss + self.norm(self.scale(loss.expand(16))).mean()
        return loss, loss


def test_the_criterions_parameters_are_trained_by_the_same_rules(build: Build) -> None:
    trainer = build("--criterion", "scaled_cross_entropy", "--weight-decay", "0.1")
    assert not trainer.criterion.norm.weight.requires_grad
    decayed, exempt = trainer.optimizer.param_groups
    assert any(parameter is trainer.criterion.scale.weight for parameter in decayed["params"])
    assert any(parameter is trainer.criterion.scale.bias for parameter in exempt["params"])
    before = trainer.criterion.scale.weight.clone()
    update(trainer, 2)
    assert not torch.equal(trainer.criterion.scale.weight, before)


def test_hints_come_once_for_fairseqs_lr_and_for_clipping(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert build("--lr", "0.25", "--clip-norm", "0.1").optimizer
    assert caplog.text.count("lr=0.25 is the framework's default") == 1
    assert caplog.text.count("--clip-norm=0.1 clips gradients, which normalization undoes") == 1
    caplog.clear()
    assert build("--lr", "0.02", "--sing-normalize", "False", "--clip-norm", "0.2").optimizer
    assert "clips gradients" not in caplog.text
    assert "lr=" not in caplog.text


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("frequency", [1, 2])
def test_the_trainer_makes_the_steps_of_the_core(build: Build, frequency: int) -> None:
    trainer, twin = build("--weight-decay", "0.1"), build(optimizer="adam")
    model, criterion = twin.get_model(), twin.get_criterion()
    optimizer = sing_plugins.create_optimizer(model, "sing_adamw", lr=0.02, weight_decay=0.1)
    for _, samples in zip(range(4), batches_of(trainer, frequency), strict=False):
        trainer.train_step(samples)
        size = 0
        for sample in samples:
            loss, sample_size, _ = criterion(model, sample)
            loss.backward()
            size += sample_size
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 1 / size
        optimizer.step()
        optimizer.zero_grad()
        for name, tensor in weights(model.state_dict()).items():
            assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_a_schedule_sets_the_lr_of_all_groups(build: Build) -> None:
    schedule = words("--lr-scheduler cosine --warmup-updates 2 --max-update 4 --weight-decay 0.1")
    trainer = build(*schedule, "--lr", "0.02")
    rates = []
    for _, samples in zip(range(4), batches_of(trainer), strict=False):
        rates.append({group["lr"] for group in trainer.optimizer.param_groups})
        trainer.train_step(samples)
    assert [len(rate) for rate in rates] == [1, 1, 1, 1]
    assert [rate.pop() for rate in rates] == pytest.approx([0.0, 0.01, 0.02, 0.01])


def test_float16_needs_whole_tensors(build: Build) -> None:
    with pytest.raises(ValueError, match="Invalid --fp16: with sing it needs --fp16-no-flatten-grads too"):
        build("--fp16")
    assert not build("--fp16", "--fp16-no-flatten-grads").optimizer.supports_flat_params


def test_master_copies_in_float32_keep_their_groups(build: Build) -> None:
    trainer = build("--fp16", "--fp16-no-flatten-grads", "--weight-decay", "0.1", "--sing-host", "radam")
    master, model = trainer.optimizer.fp32_params, [p for p in trainer.model.parameters() if p.requires_grad]
    matrices = {id(copy) for copy, parameter in zip(master, model, strict=True) if parameter.dim() > 1}
    decayed, exempt = trainer.optimizer.param_groups
    assert {id(copy) for copy in decayed["params"]} == matrices
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert {id(copy) for copy in exempt["params"]} == {id(copy) for copy in master} - matrices
    before = trainer.model.state_dict()[WEIGHT].clone()
    update(trainer, 6)
    assert trainer.model.state_dict()[WEIGHT].dtype == torch.float16
    assert not torch.equal(trainer.model.state_dict()[WEIGHT], before)


PRECISIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "fp16": (["--fp16", "--fp16-no-flatten-grads"], {}),
    "memory-efficient-fp16": (["--memory-efficient-fp16"], {}),
    "bf16": ([], {"common__bf16": True}),  # the flag is for TPUs only; hydra's common.bf16=true is not
    "memory-efficient-bf16": ([], {"common__bf16": True, "common__memory_efficient_bf16": True}),
    "amp": (["--amp"], {}),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_has_state_in_float32_and_resumes(build: Build, precision: str) -> None:
    arguments, changes = PRECISIONS[precision]
    trainer = build(*arguments, "--weight-decay", "0.1", **changes)
    update(trainer, 7)
    state = trainer.optimizer.state_dict()
    tensors = [value for values in state["state"].values() for value in values.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors)

    again = build(*arguments, "--weight-decay", "0.1", **changes)
    again.optimizer.load_state_dict(state, {"weight_decay": 0.3, "lookahead_k": None})
    loaded = again.optimizer.state_dict()
    assert [group["lookahead_step"] for group in loaded["param_groups"]] == [2, 2]
    assert [group["weight_decay"] for group in loaded["param_groups"]] == [0.3, 0.0]
    assert [group["lookahead_k"] for group in loaded["param_groups"]] == [None, None]
    for key, values in state["state"].items():
        for name, value in values.items():
            assert loaded["state"][key][name].dtype == value.dtype
            assert torch.equal(loaded["state"][key][name], value)
    again.optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"The checkpoint's optimizer has .*'adamw'.* but this run's has .*'sgd'"):
        build(*arguments, "--sing-host", "sgd", **changes).optimizer.load_state_dict(state)


REFUSED = {
    "--memory-efficient-fp16 --sing-host radam": "Invalid --memory-efficient-fp16 or -bf16: True with sing_radam",
    "--ddp-backend fully_sharded": "Invalid --ddp-backend: 'fully_sharded', which flattens tensors",
    "--zero-sharding os --sing-host radam": "Invalid --zero-sharding: 'os' with sing_radam",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items())
def test_a_trainer_that_cannot_work_is_refused(build: Build, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(*arguments.split())


def test_sing_cannot_be_built_without_the_trainers_model(build: Build) -> None:
    cfg = build().cfg.optimizer
    message = "sing goes by the layers of the model"
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, [nn.Parameter(torch.zeros(2, 2))])
    groups = {"default": {"optimizer": cfg, "lr_scheduler": {"_name": "pass_through"}, "lr": [0.1], "lr_float": None}}
    composite = build(optimizer="composite", optimizer__groups=groups)
    with pytest.raises(ValueError, match=message):
        _ = composite.optimizer


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def train(data: str, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """fairseq-train in this process; its last checkpoint, with its folder as ``folder``."""

    def run(*arguments: str) -> dict[str, Any]:
        with root_logger_restored(), pytest.MonkeyPatch.context() as patch:
            from fairseq_cli.train import cli_main

            folder = tmp_path_factory.mktemp("run")
            steps = words("--max-update 12 --save-interval-updates 1 --update-epoch-batch-itr True")
            command = ["fairseq-train", data, *TINY, *steps, "--save-dir", f"{folder}", *arguments]
            patch.setattr(sys, "argv", command)
            patch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)  # kept on the function
            cli_main()
        return {**read(folder / "checkpoint_last.pt"), "folder": folder}

    return run


def read(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=False)
    return checkpoint


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["optimizer_history"][-1] == other["optimizer_history"][-1]
    for name, tensor in weights(one["model"]).items():
        assert torch.equal(tensor, other["model"][name]), name
    a, b = one["last_optimizer_state"], other["last_optimizer_state"]
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, values in a["state"].items():
        assert values.keys() == b["state"][key].keys()
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["state"][key][name])), (key, name)


SCHEDULE = words("--lr-scheduler cosine --warmup-updates 3 --weight-decay 0.1 --update-freq 1")


@pytest.fixture(scope="module")
def straight(train: Train) -> dict[str, Any]:
    return train("--optimizer", "sing", *SCHEDULE)


def test_a_checkpoint_names_its_optimizer(straight: dict[str, Any]) -> None:
    assert straight["optimizer_history"][-1]["optimizer_name"] == "FairseqSING"
    assert straight["optimizer_history"][-1]["num_updates"] == 12
    state = straight["last_optimizer_state"]
    assert (state["sing_host"], state["sing_freeze"]) == ("adamw", "layernorm")
    assert [group["lookahead_step"] for group in state["param_groups"]] == [2, 2]


# Lookahead merges after 5 and 10 updates; the second epoch begins after 8.
@pytest.mark.parametrize("where", ["1_4", "1_5", "1_6", "2_9", "2_10", "2_11"])
def test_resume_is_exact_in_every_phase_of_lookahead(train: Train, straight: dict[str, Any], where: str) -> None:
    checkpoint = straight["folder"] / f"checkpoint_{where}.pt"
    resumed = train("--optimizer", "sing", *SCHEDULE, "--restore-file", f"{checkpoint}")
    assert_same_run(resumed, straight)


def test_resume_is_exact_with_a_wrapped_host(train: Train) -> None:
    arguments = ["--optimizer", "sing_nag", "--lr", "0.01", "--lr-scheduler", "cosine"]
    whole = train(*arguments)
    resumed = train(*arguments, "--restore-file", f"{whole['folder']}/checkpoint_1_6.pt")
    assert_same_run(resumed, whole)
    assert whole["last_optimizer_state"]["sing_host"] == "nag"


def test_overrides_change_hyperparameters_where_they_belong(train: Train, straight: dict[str, Any]) -> None:
    checkpoint = str(straight["folder"] / "checkpoint_1_6.pt")
    overrides = "{'weight_decay': '0.3', 'sing_lookahead_k': 'none', 'betas': (0.8, 0.9)}"
    resumed = train("--optimizer", "sing", *SCHEDULE, "--restore-file", checkpoint, "--optimizer-overrides", overrides)
    decayed, exempt = resumed["last_optimizer_state"]["param_groups"]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    for group in (decayed, exempt):
        assert (group["lookahead_k"], group["lookahead_step"], group["betas"]) == (None, 0, (0.8, 0.9))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"momentum": 0.9}, "Unknown option 'momentum' of sing"),
        ({"lookahead_k": 0}, "Invalid lookahead_k: 0"),
        ({"freeze": "none"}, "Pass --reset-optimizer --sing-freeze"),
        ({"decay_all": True}, "Pass --reset-optimizer --sing-decay_all"),
    ],
)
def test_an_override_that_is_not_accepted_changes_nothing(build: Build, overrides: Any, message: str) -> None:
    trainer = build("--weight-decay", "0.1")
    update(trainer, 2)
    state = trainer.optimizer.state_dict()
    fresh = build("--weight-decay", "0.2")
    with pytest.raises(ValueError, match=message):
        fresh.optimizer.load_state_dict(state, overrides)
    assert not fresh.optimizer.optimizer.state
    assert fresh.optimizer.param_groups[0]["weight_decay"] == 0.2


def test_an_override_that_does_not_go_with_what_was_saved_changes_nothing(build: Build) -> None:
    trainer = build("--sing-softplus-beta", "none")
    update(trainer, 2)
    fresh = build()
    with pytest.raises(ValueError, match="Invalid softplus_beta: None with softplus_relative=4"):
        fresh.optimizer.load_state_dict(trainer.optimizer.state_dict(), {"softplus_relative": 4})
    assert not fresh.optimizer.optimizer.state
    assert fresh.optimizer.param_groups[0]["softplus_beta"] == 50


def test_overrides_reach_lookahead_around_a_wrapped_host(build: Build) -> None:
    trainer = build("--sing-host", "radam")
    update(trainer, 2)
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict(), {"lookahead_k": 2, "weight_decay": 0.1})
    assert [group["sing_lookahead_k"] for group in trainer.optimizer.param_groups] == [2, 2]
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("change", [["--sing-freeze", "none"], ["--sing-host", "sgd"], ["--sing-host", "radam"]])
def test_resume_with_another_optimizer_is_refused(train: Train, straight: dict[str, Any], change: list[str]) -> None:
    checkpoint = f"{straight['folder']}/checkpoint_1_6.pt"
    with pytest.raises(ValueError, match=r"The checkpoint's optimizer has .* or --reset-optimizer to start"):
        train("--optimizer", "sing", *SCHEDULE, *change, "--restore-file", checkpoint)


def test_resume_from_fairseqs_own_optimizer_is_refused(train: Train) -> None:
    adam = train("--optimizer", "adam", "--max-update", "2")
    checkpoint = f"{adam['folder']}/checkpoint_last.pt"
    with pytest.raises(AssertionError, match="Optimizer does not match; please reset the optimizer"):
        train("--optimizer", "sing", "--restore-file", checkpoint)
    mixed = ["--fp16", "--fp16-no-flatten-grads", "--max-update", "2"]  # fairseq checks the name of its wrapper only
    adam = train("--optimizer", "adam", *mixed)
    with pytest.raises(ValueError, match=re.escape("has {'sing_host': None, 'sing_freeze': None}, but this run's")):
        train("--optimizer", "sing", *mixed, "--restore-file", f"{adam['folder']}/checkpoint_last.pt")


def test_reset_optimizer_starts_a_new_one(train: Train, straight: dict[str, Any]) -> None:
    reset = ["--reset-optimizer", "--reset-lr-scheduler", "--reset-dataloader", "--reset-meters", "--max-update", "3"]
    checkpoint = f"{straight['folder']}/checkpoint_last.pt"
    last = train("--optimizer", "sing_adabelief", *reset, "--restore-file", checkpoint)["last_optimizer_state"]
    assert last["sing_host"] == "adabelief"
    assert {float(values["step"]) for values in last["state"].values()} == {3.0}


# ---------------------------------------------------------------------------------------------------------- registering


def test_unpatch_leaves_no_trace_and_patching_twice_changes_nothing() -> None:
    def everything() -> list[Any]:
        store = ConfigStore.instance().repo["optimizer"]
        trainer = [fairseq.trainer.Trainer.__init__, fairseq.trainer.Trainer._build_optimizer]
        tables = [list(OPTIMIZER_REGISTRY.items()), list(OPTIMIZER_DATACLASS_REGISTRY.items()), sorted(store)]
        return [*tables, *trainer, utils.import_user_module]

    patched = everything()
    assert sing_fairseq.is_patched()
    sing_fairseq.patch()
    assert everything() == patched
    try:
        sing_plugins.disable("fairseq")
        assert not sing_fairseq.is_patched()
        assert not any("sing" in name for name in (*OPTIMIZER_REGISTRY, *ConfigStore.instance().repo["optimizer"]))
        assert not any("sing_fairseq" in inspect.getsourcefile(f) for f in everything()[3:])
        bare = everything()
        sing_fairseq.unpatch()
        assert everything() == bare
    finally:
        sing_plugins.enable("fairseq")
    assert sing_fairseq.is_patched()
    assert everything()[:3] == patched[:3]


def test_a_name_that_somebody_else_has_registered_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZER_REGISTRY, "sing", object)
    with pytest.raises(ValueError, match="Cannot register duplicate optimizer"):
        sing_fairseq.patch()


def test_a_trainer_with_the_old_kind_of_config_is_taught_too(data: str) -> None:
    arguments = [data, *TINY, "--optimizer", "sing", "--source-lang", "de", "--target-lang", "en"]
    args = options.parse_args_and_arch(options.get_training_parser(), arguments)
    task = tasks.setup_task(args)
    trainer = Trainer(args, task, task.build_model(args), task.build_criterion(args))
    assert group_of(trainer, LAYER_NORM) is None
    assert group_of(trainer, WEIGHT) is not None


def test_other_optimizers_are_untouched(build: Build) -> None:
    trainer = build(optimizer="adam")
    assert type(trainer.optimizer).__name__ == "FairseqAdam"
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert type(build(optimizer="adagrad").optimizer).__name__ == "Adagrad"  # without a dataclass


# ------------------------------------------------------------------------------------------------- commands, as a user


@pytest.fixture(scope="module", autouse=True)
def processes_run_beside_the_other_tests(request: pytest.FixtureRequest) -> None:
    if any("processes" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("processes")


@pytest.fixture(scope="module")
def processes(data: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """What the tests below look at: commands in fresh interpreters, two at a time."""
    folder = tmp_path_factory.mktemp("commands")
    copy = shutil.copytree(ROOT / USER_DIR, folder / "copy" / "sing_fairseq")
    (folder / "config").mkdir()
    (folder / "config" / "lm.yaml").write_text(YAML)
    bare = {"SING_PLUGINS_AUTOLOAD": "0", "PYTHONPATH": f"{ROOT}"}
    train = ["fairseq-train", data, *TINY, "--max-update", "3", "--no-save"]
    sing = [*train, "--optimizer", "sing"]

    def run(command: list[str], cwd: Path = folder, **environment: str) -> str:
        program = [sys.executable, "-c"] if command[0] == "-c" else [Path(sys.executable).with_name(command[0])]
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SING_", "PYTHON"))}
        done = subprocess.run(
            [*program, *command[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**ours, "OMP_NUM_THREADS": "1", **environment},
            timeout=600,
        )
        return f"{done.stdout}\nexit {done.returncode}"

    def hydra(name: str, *overrides: str, **environment: str) -> str:
        places = [f"task.data={Path(data).with_name('lm')}", f"hydra.run.dir={folder}/{name}"]
        return run(["fairseq-hydra-train", *overrides, *places, f"checkpoint.save_dir={folder}/{name}"], **environment)

    def trained_then_generated() -> str:
        saved = [argument for argument in sing if argument not in ("--no-save", "--disable-validation")]
        first = run([*saved, "--save-dir", f"{folder}/plain", "--clip-norm", "1", "--weight-decay", "0.1"])
        checkpoint = f"{folder}/plain/checkpoint_last.pt"
        # fairseq 0.12.2 cannot generate from padded batches with a new torch; later ones drop a last partial batch.
        sentences = words("--batch-size 1 --required-batch-size-multiple 1 --beam 2 --max-len-a 0 --max-len-b 9")
        return first + run(["fairseq-generate", data, "--path", checkpoint, "--cpu", *sentences], **bare)

    def two_ranks() -> str:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"tcp://localhost:{free.getsockname()[1]}"
        options = ["--distributed-world-size", "2", "--distributed-no-spawn", "--distributed-init-method", address]
        options += ["--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--save-dir", f"{folder}/two"]
        saved = [argument for argument in sing if argument != "--no-save"]
        with ThreadPoolExecutor(2) as ranks:
            return "".join(ranks.map(lambda rank: run([*saved, *options, "--distributed-rank", rank]), "01"))

    with ThreadPoolExecutor(2) as pool:
        yield {
            "folder": folder,
            "fairseq-train": pool.submit(trained_then_generated),
            "two ranks": pool.submit(two_ranks),
            "user-dir only": pool.submit(run, [*sing, "--user-dir", str(USER_DIR)], ROOT, **bare),
            "user-dir too": pool.submit(run, [*sing, "--user-dir", str(USER_DIR)], ROOT),
            "user-dir elsewhere": pool.submit(run, [*train, "--optimizer", "sing_sgd", "--user-dir", str(copy)]),
            "hydra": pool.submit(hydra, "h", *HYDRA, "optimizer=sing", "optimizer.sing_lookahead_k=null"),
            "hydra with user-dir only": pool.submit(
                hydra, "y", f"--config-dir={folder}/config", "--config-name=lm", f"common.user_dir={copy}", **bare
            ),
            "adapter first": pool.submit(run, ["-c", IMPORTS]),
            "adapter only": pool.submit(run, ["-c", IMPORTS], **bare),
        }
        pool.shutdown(cancel_futures=True)


HYDRA = words("""
    task=language_modeling task.tokens_per_sample=8 model=transformer_lm model.decoder_layers=1
    model.decoder_embed_dim=16 model.decoder_input_dim=16 model.decoder_output_dim=16 model.decoder_ffn_embed_dim=16
    model.decoder_attention_heads=2 dataset.batch_size=8 dataset.data_buffer_size=0 dataset.num_workers=0
    dataset.disable_validation=true common.cpu=true optimization.max_update=3 optimization.lr=[0.02]
    optimizer.weight_decay=0.1 optimizer.sing_betas=[0.9,0.98]
""")

YAML = """
task: {_name: language_modeling, data: "???", tokens_per_sample: 8}
criterion: {_name: cross_entropy}
model: {_name: transformer_lm, decoder_layers: 1, decoder_embed_dim: 16, decoder_input_dim: 16, decoder_output_dim: 16,
  decoder_ffn_embed_dim: 16, decoder_attention_heads: 2}
dataset: {batch_size: 8, data_buffer_size: 0, num_workers: 0, disable_validation: true}
common: {cpu: true}
optimization: {max_update: 3, lr: [0.02]}
optimizer: {_name: sing, weight_decay: 0.1, sing_betas: "(0.9, 0.98)", sing_lookahead_k: null}
lr_scheduler: {_name: fixed}
"""

IMPORTS = """
import warnings
warnings.filterwarnings("error", message="SING is not registered")
import sing_fairseq
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.trainer import Trainer
from sing_plugins import autoload
assert sing_fairseq.is_patched() and "sing_radam" in OPTIMIZER_REGISTRY
assert "sing_fairseq" in Trainer.__init__.__code__.co_filename
assert {s.framework: (s.active, s.why) for s in autoload.status()}["fairseq"] == (True, "registered")
"""


def frozen_lines(output: str) -> list[str]:
    return re.findall(r"SING: freeze=layernorm: \d+ tensors frozen .*", output)


def test_fairseq_train_needs_no_import_and_no_user_dir(processes: dict[str, Any], build: Build) -> None:
    output = processes["fairseq-train"].result()
    assert output.count("exit 0") == 2, output
    (line,) = frozen_lines(output)
    matrices, vectors = sizes(build(optimizer="adam").get_model())
    assert line.endswith(trained(matrices, vectors - 10))
    assert output.count("SING: --clip-norm=1 clips") == 1
    assert "valid on 'valid' subset" in output
    state = read(processes["folder"] / "plain" / "checkpoint_last.pt")["last_optimizer_state"]
    assert [group["host"] for group in state["param_groups"]] == ["adamw", "adamw"]


def test_fairseq_generate_reads_a_checkpoint_without_the_plugin(processes: dict[str, Any]) -> None:
    output = processes["fairseq-train"].result()
    assert len(re.findall(r"^H-\d+", output, re.MULTILINE)) == 8, output


@pytest.mark.parametrize("how", ["user-dir only", "user-dir too"])
def test_user_dir_registers_and_registers_once(processes: dict[str, Any], how: str) -> None:
    output = processes[how].result()
    assert output.endswith("exit 0"), output
    assert len(frozen_lines(output)) == 1


def test_a_copy_as_user_dir_does_not_collide_with_what_is_installed(processes: dict[str, Any]) -> None:
    output = processes["user-dir elsewhere"].result()
    assert output.endswith("exit 0"), output
    assert "already registered from" in output
    assert len(frozen_lines(output)) == 1


@pytest.mark.parametrize(("how", "folder"), [("hydra", "h"), ("hydra with user-dir only", "y")])
def test_fairseq_hydra_train(processes: dict[str, Any], how: str, folder: str) -> None:
    output = processes[how].result()
    assert output.endswith("exit 0"), output
    assert len(frozen_lines(output)) == 1
    decayed, exempt = read(processes["folder"] / folder / "checkpoint_last.pt")["last_optimizer_state"]["param_groups"]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    for group in (decayed, exempt):
        assert (group["host"], group["lookahead_k"], group["betas"]) == ("adamw", None, (0.9, 0.98))
        assert (group["softplus_beta"], group["lr"]) == (50.0, 0.02)


def test_two_processes_equal_one_with_twice_the_batches(processes: dict[str, Any], train: Train) -> None:
    one = train("--optimizer", "sing", "--update-freq", "2", "--max-update", "3")["model"]
    output = processes["two ranks"].result()
    assert output.count("exit 0") == 2, output
    assert len(frozen_lines(output)) == 1  # from the first rank only
    two = read(processes["folder"] / "two" / "checkpoint_last.pt")["model"]
    for name, tensor in weights(one).items():
        if not name.endswith("k_proj.bias"):  # softmax takes no notice of it, so that its gradient is rounding noise
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["adapter first", "adapter only"])
def test_importing_the_adapter_registers_it(processes: dict[str, Any], how: str) -> None:
    output = processes[how].result()
    assert output.endswith("exit 0"), output
