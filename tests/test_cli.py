"""The command line says what is so: what a fresh program gets, and what training by name does to a model."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sing_plugins.cli import main
from sing_plugins.names import valid_names

COMMAND = str(Path(sys.executable).with_name("sing-plugins"))


def run(*command: str, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(*command: str, **environment: str) -> dict[str, list[str]]:
    """framework → the other columns of the table."""
    table, _, below = run(*command, **environment).partition("\n\n")
    header, *lines = table.splitlines()
    assert header.split() == ["framework", "installed", "supported", "active", "why"]
    assert below.startswith("compiled kernel: ")
    return {cells[0]: cells[1:] for cells in (line.split(maxsplit=4) for line in lines)}


def groups(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, list[str]], str]:
    """(parameter → shape, group and decay; the lines below the table)."""
    assert main(["groups", *arguments]) == 0
    table, _, below = capsys.readouterr().out.partition("\n\n")
    header, *lines = table.splitlines()
    assert header.split() == ["parameter", "shape", "group", "weight_decay"]
    rows = [line.replace("not decayed", "not-decayed").split() for line in lines]
    return {name: cells for name, *cells in rows}, below


def groups_of(model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """parameter → its group as the optimizer has it."""
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = model.named_parameters()
    return {name: ("decayed" if decays[p] else "not-decayed") if p in decays else "frozen" for name, p in named}


def test_status_tells_what_a_fresh_program_gets() -> None:
    table = status(COMMAND, "status")
    assert list(table) == ["transformers", "timm", "fairseq", "accelerate"]
    distributions = {name: name for name in table} | {"fairseq": "fairseq-fixed"}
    for name, (version, supported, active, why) in table.items():
        if name != "fairseq" or sys.version_info >= (3, 11):
            assert version == metadata.version(distributions[name])
        assert supported.startswith(">=")
        assert active == "yes"
        assert (f"when {name} is imported" in why) == (name != "accelerate")


@pytest.mark.parametrize("switch", ["SING_PLUGINS_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_status_says_that_autoload_is_off(switch: str) -> None:
    table = status(sys.executable, "-m", "sing_plugins", "status", **{switch: "0"})
    for name in ("transformers", "timm", "fairseq"):
        _, _, active, why = table[name]
        assert active == "no"
        assert f"{switch}=0" in why


def test_status_can_import_the_frameworks_and_tell_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "sing_timm.py").write_text("raise ImportError('half an installation')\n")
    (tmp_path / "hydra.py").write_text("raise ImportError('two\\nlines')\n")
    (tmp_path / "sing_accelerate.py").write_text("raise ImportError('no adapter')\n")
    table = status(COMMAND, "status", "--import", PYTHONPATH=str(tmp_path))
    assert table["transformers"][2:] == ["yes", "registered"]
    assert table["fairseq"][2:] == ["no", "fairseq.optim cannot be imported: ImportError: two lines"]
    assert table["timm"][2:] == ["no", "ImportError: half an installation"]
    assert table["accelerate"][2:] == ["no", "sing_accelerate cannot be imported: ImportError: no adapter"]


# Before the command looks, a finder like that of typeguard's import hook comes in front of ours, which stays away from
# one framework; the other is registered before and reloaded, which nothing tells of.
PAST = """
import importlib, sys, torch
from importlib.machinery import PathFinder
from sing_plugins.cli import main
class Past:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.partition(".")[0] in ("timm", "transformers") else None
sys.meta_path.insert(0, Past)
import timm.optim._optim_factory as factory
sys.meta_path.insert(0, sys.meta_path.pop(sys.meta_path.index(Past)))
importlib.reload(factory)
main(sys.argv[1:])
"""


@pytest.mark.parametrize("arguments", [["status"], ["status", "--import"]], ids=" ".join)
def test_status_tells_what_another_import_hook_has_hidden(arguments: list[str]) -> None:
    table = status(sys.executable, "-c", PAST, *arguments)
    _, _, active, why = table["timm"]
    assert active == "no"
    assert "imported, but past SING's import hook" in why
    assert 'sing_plugins.enable("timm")' in why
    told = "registered" if "--import" in arguments else "will be registered when transformers is imported"
    assert table["transformers"][2:] == ["yes", told]
    assert table["accelerate"][2:] == ["yes", "no names to register: import sing_accelerate"]


def test_names_lists_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["names"]) == 0
    names, _, _ = capsys.readouterr().out.partition("\n\n")
    assert names.splitlines() == valid_names()


@pytest.mark.parametrize("freeze", ["layernorm", "norm", "none"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_groups_tells_what_timm_does_by_name(name: str, freeze: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, below = groups(capsys, "--timm", name, "--freeze", freeze, "--weight-decay", "0.01")
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, opt="sing_adamw", lr=0.01, weight_decay=0.01, freeze=freeze)
    assert {name: cells[1] for name, cells in table.items()} == groups_of(model, optimizer)
    rates = {"decayed": "0.01", "not-decayed": "0", "frozen": "-"}
    for parameter_name, parameter in model.named_parameters():
        shape, group, decay = table[parameter_name]
        assert shape == "×".join(map(str, parameter.shape))
        assert decay == rates[group]
    for group in rates:
        chosen = [p for name, p in model.named_parameters() if table[name][1] == group]
        line = f"{group.replace('-', ' ')}: {len(chosen)} tensors, {sum(p.numel() for p in chosen):,} parameters"
        assert line in below.splitlines()


@pytest.mark.parametrize("freeze", ["layernorm", "none"])
def test_groups_tells_what_trainer_does_by_name(
    freeze: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    table, _ = groups(capsys, "--transformers", str(tmp_path), "--freeze", freeze)
    assert table["classifier.weight"][0] == "3×16"

    model = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        str(tmp_path), optim="sing_adamw", optim_args=f"freeze={freeze}", weight_decay=0.05, learning_rate=0.01
    )
    optimizer = Trainer(model, arguments).create_optimizer()
    assert {name: cells[1] for name, cells in table.items()} == groups_of(model, optimizer)


def test_groups_knows_a_transformers_model_type(capsys: pytest.CaptureFixture[str]) -> None:
    table, _ = groups(capsys, "--transformers", "bert")
    assert table["embeddings.word_embeddings.weight"] == ["30522×768", "decayed", "0.05"]
    assert table["encoder.layer.0.output.LayerNorm.weight"] == ["768", "frozen", "-"]


WRONG = {
    "no command": ([], "COMMAND"),
    "no model": (["groups"], "--timm --transformers"),
    "two models": (["groups", "--timm", "resnet18", "--transformers", "bert"], "not allowed with"),
    "an unknown timm model": (["groups", "--timm", "resnet1800"], "'resnet1800'"),
    "an unknown transformers model": (["groups", "--transformers", "no/such"], "'no/such'. Expected a folder"),
    "a folder without a model": (["groups", "--transformers", "/"], "'/'. Expected a folder with a config.json"),
    "an unknown freeze": (
        ["groups", "--timm", "test_vit", "--freeze", "all"],
        "'all'. Accepted: layernorm, norm, none",
    ),
    "a decay that is no number": (["groups", "--timm", "test_vit", "--weight-decay", "x"], "'x'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out
