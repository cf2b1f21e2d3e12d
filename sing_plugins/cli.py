"""The command ``sing-plugins``: is SING registered, what would it freeze and decay, and which names are there."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sing_plugins import autoload

if TYPE_CHECKING:
    from torch import nn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None for ``sys.argv``'s.

    Returns:
        The exit code, 0. A wrong argument exits with 2.
    """
    parser = argparse.ArgumentParser(prog="sing-plugins", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    status = commands.add_parser("status", help="tell in which frameworks SING is registered, and why not")
    status.add_argument("--import", dest="imports", action="store_true", help="import the frameworks and really look")
    status.set_defaults(run=_status)

    groups = commands.add_parser("groups", help="tell which parameters of a model are frozen, decayed, not decayed")
    model = groups.add_mutually_exclusive_group(required=True)
    model.add_argument("--timm", metavar="MODEL", help="a model name of timm's, such as resnet18")
    model.add_argument("--transformers", metavar="MODEL", help="a folder or file with a config, or a model type: bert")
    groups.add_argument("--freeze", default="layernorm", help="layernorm (default), norm or none")
    groups.add_argument("--weight-decay", type=float, default=0.05, help="default: %(default)s")
    groups.set_defaults(run=_groups)

    names = commands.add_parser("names", help="list the optimizer names that are valid in every framework")
    names.set_defaults(run=_names)

    chosen = parser.parse_args(arguments)
    try:
        for row in chosen.run(chosen):
            print(row)
    except (ImportError, OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    return 0


def _status(chosen: argparse.Namespace) -> list[str]:
    importlib.import_module("torch")  # as in any program, this is what starts autoload
    for framework in autoload.FRAMEWORKS.values():
        if chosen.imports and framework.installed() is not None:
            for trigger in framework.triggers:
                importlib.import_module(trigger)
    header = ("framework", "installed", "supported", "active", "why")
    rows = [(s.framework, s.version or "-", s.supported, "yes" if s.active else "no", s.why) for s in autoload.status()]
    return _table(header, *rows)


def _names(_: argparse.Namespace) -> list[str]:
    from sing_plugins.names import valid_names

    return [*valid_names(), "", "In timm and in Transformers also sing_<name> for each of their own that can be wrapped."]


def _groups(chosen: argparse.Namespace) -> list[str]:
    from sing_plugins.groups import exempt_from_decay, freeze_parameters

    model = _timm_model(chosen.timm) if chosen.timm else _transformers_model(chosen.transformers)
    skip: Any = getattr(model, "no_weight_decay", None)
    frozen = set(freeze_parameters(model, chosen.freeze))
    exempt = set(exempt_from_decay(model, skip() if callable(skip) else ()))
    rows, counts = [], dict.fromkeys(("frozen", "decayed", "not decayed"), (0, 0))
    for name, parameter in model.named_parameters():
        group = "frozen" if name in frozen else "not decayed" if name in exempt else "decayed"
        counts[group] = counts[group][0] + 1, counts[group][1] + parameter.numel()
        rate = {"decayed": f"{chosen.weight_decay:g}", "not decayed": "0"}.get(group, "-")
        rows.append((name, "×".join(map(str, parameter.shape)) or "scalar", group, rate))
    summary = [f"{group}: {tensors} tensors, {entries:,} parameters" for group, (tensors, entries) in counts.items()]
    return [*_table(("parameter", "shape", "group", "weight_decay"), *rows), "", *summary]


def _timm_model(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"Invalid --timm: {name!r}. It is no model name of timm {timm.__version__}.")
    model: nn.Module = timm.create_model(name)
    return model


def _transformers_model(where: str) -> nn.Module:
    """A model with random weights: nothing is downloaded."""
    import torch
    import transformers

    if Path(where).exists():
        config = transformers.AutoConfig.from_pretrained(where, local_files_only=True)
    elif where in transformers.CONFIG_MAPPING:
        config = transformers.CONFIG_MAPPING[where]()
    else:
        raise ValueError(f"Invalid --transformers: {where!r}. Expected a folder, a config file, or a type as in bert.")
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(config)
    return model


def _table(*rows: Sequence[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
