"""The command ``sing-plugins``: is SING registered, what would it freeze and decay, and which names are there."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
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
    model.add_argument("--transformers", metavar="MODEL", help="a folder or a file with a config, or a type: bert")
    groups.add_argument("--freeze", default="default", help="default, layernorm, norm or none")
    groups.add_argument("--weight-decay", type=float, default=0.05, help="default: %(default)s")
    groups.set_defaults(run=_groups)

    names = commands.add_parser("names", help="list the optimizer names that are valid in every framework")
    names.set_defaults(run=_names)

    chosen = parser.parse_args(arguments)
    try:
        rows = chosen.run(chosen)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(rows))
    return 0


def _status(chosen: argparse.Namespace) -> list[str]:
    importlib.import_module("torch")  # as in any program, this is what starts autoload
    failed = {}
    for library in (*autoload.FRAMEWORKS.values(), *autoload.LIBRARIES.values()):
        if chosen.imports and library.installed() is not None:
            try:
                for module in library.modules:
                    importlib.import_module(module)
            except Exception as error:
                failed[library.name] = f"{module} cannot be imported: {type(error).__name__}: {error}"
    header = ("framework", "installed", "supported", "active", "why")
    rows = []
    for state in autoload.status():
        why = failed.get(state.framework, state.why)
        active = state.active and state.framework not in failed
        one_line = " ".join(why.split())
        rows.append((state.framework, state.version or "-", state.supported, "yes" if active else "no", one_line))
    return [*_table(header, *rows), "", f"compiled kernel: {_kernel()}"]


def _kernel() -> str:
    from sing_plugins.kernels import cpu

    instructions = ("the compiler's baseline", "AVX2", "AVX-512")
    return f"no, {cpu.missing()}" if cpu.missing() else f"yes, with {instructions[cpu.instruction_set()]}"


def _names(_: argparse.Namespace) -> list[str]:
    from sing_plugins.names import valid_names

    return [*valid_names(), "", "In each framework also sing_<name> for its own optimizers that can be wrapped."]


def _groups(chosen: argparse.Namespace) -> list[str]:
    from sing_plugins.groups import choose, exempt_from_decay

    model, skipped = _from_timm(chosen.timm) if chosen.timm else _from_transformers(chosen.transformers)
    frozen = {owned.parameter for owned in choose(model, chosen.freeze).frozen}
    exempt = exempt_from_decay(model, skipped)
    rows, counts = [], dict.fromkeys(("frozen", "decayed", "not decayed"), (0, 0))
    for name, parameter in model.named_parameters():
        group = "frozen" if parameter in frozen else "not decayed" if parameter in exempt else "decayed"
        counts[group] = counts[group][0] + 1, counts[group][1] + parameter.numel()
        rate = {"decayed": f"{chosen.weight_decay:g}", "not decayed": "0"}.get(group, "-")
        rows.append((name, "×".join(map(str, parameter.shape)) or "scalar", group, rate))
    summary = [f"{group}: {tensors} tensors, {entries:,} parameters" for group, (tensors, entries) in counts.items()]
    return [*_table(("parameter", "shape", "group", "weight_decay"), *rows), "", *summary]


def _from_timm(name: str) -> tuple[nn.Module, set[str]]:
    """A model with random weights, and the names of the parameters that timm exempts from weight decay."""
    import timm
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

    if not timm.is_model(name):
        raise ValueError(f"Invalid --timm: {name!r}. It is no model name of timm {timm.__version__}.")
    model: Any = timm.create_model(name)
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=skip)
    skipped = {parameter for group in groups if group["weight_decay"] == 0.0 for parameter in group["params"]}
    return model, {name for name, parameter in model.named_parameters() if parameter in skipped}


def _from_transformers(where: str) -> tuple[nn.Module, set[str]]:
    """As above for Transformers; of the class that the config names. Nothing is downloaded."""
    import torch
    import transformers

    if where in transformers.CONFIG_MAPPING:
        config = transformers.CONFIG_MAPPING[where]()
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(where, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Invalid --transformers: {where!r}. Expected a folder with a config.json, a config file, a model that "
                "the hub's cache holds, or a model type such as bert."
            ) from error
    build: Any = getattr(transformers, (config.architectures or ("",))[0], transformers.AutoModel.from_config)
    with torch.device("meta"):
        model: nn.Module = build(config)
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    return model, {name for name, _ in model.named_parameters()} - set(decayed)


def _table(*rows: Sequence[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
