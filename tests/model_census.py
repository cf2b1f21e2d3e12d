"""Every model of timm and every model type of transformers, and how many of its tensors are frozen and decayed.

``python tests/model_census.py`` writes model_census.tsv, so that a change of the rules of sing_plugins/layers.py, or of
a framework, shows as a diff. Nothing is downloaded. Models are built with small tensors on the CPU, so that initial
gains are real, and with large ones on the meta device, so that no model is too large.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import timm
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

from sing_plugins import layers

TABLE = Path(__file__).with_name("model_census.tsv")
COLUMNS = (
    "library",
    "model",
    "tensors",  # trainable ones, tied ones once
    "frozen_layernorm",  # under freeze=layernorm
    "frozen_norm",  # under freeze=norm
    "closed_layernorm",  # would be frozen under freeze=layernorm, were their gain not near zero
    "closed_norm",  # the same under freeze=norm
    "decayed",  # under freeze=layernorm, as the next
    "exempt",
    "note",  # meta: the gains could not be seen
)
KINDS = {"layernorm": {"layernorm", "layerscale"}, "norm": {"layernorm", "layerscale", "norm"}}
SMALL = 65_536  # entries
# What initialization does to large tensors, where it has no effect and takes most of the time.
INITIALIZE = {
    *(
        getattr(torch.Tensor, f"{name}_")
        for name in ("add", "clamp", "erfinv", "fill", "mul", "normal", "uniform", "zero")
    ),
    *(getattr(nn.init, f"{name}_") for name in ("constant", "kaiming_normal", "kaiming_uniform", "normal", "uniform")),
}
SECONDS = 60  # a model
AUTO_MODELS = [getattr(transformers, name) for name in sorted(dir(transformers)) if name.startswith("AutoModelFor")]
# What a config needs and its defaults lack.
NEEDED: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "diffusion_gemma_text": {"num_experts": 8, "moe_intermediate_size": 64, "top_k_experts": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 4, "<image>": 5}},
    "esm": {"vocab_size": 33},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": {"prediction_length": 8},
    "lfm2_moe": {"layer_types": ["full_attention"] * 32},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 48},
    "time_series_transformer": {"prediction_length": 8},
}


class SmallOnCpu(TorchFunctionMode):
    """Tensors that a model makes without naming a device: small ones on the CPU, all others on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in INITIALIZE and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        if (
            func not in _device_constructors()
            or func is torch.tensor
            or any(kwargs.get(n) is not None for n in ("device", "out"))
        ):
            try:
                return func(*args, **kwargs)
            except (NotImplementedError, RuntimeError):  # tensors of both devices: only shapes can be had
                args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
                return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "meta"})
        if made.numel() > SMALL:
            return made
        made = func(*args, **kwargs)
        # What nobody initializes must not be near zero on one day and not on the other.
        return made.fill_(math.nan) if func is torch.empty and made.is_floating_point() else made


def count(model: nn.Module) -> dict[str, int]:
    """The columns of the table that are counts."""
    counts = dict.fromkeys(COLUMNS[2:-1], 0)
    seen: set[nn.Parameter] = set()
    for owner in model.modules():
        is_closed = layers.is_closed(owner)
        for leaf, parameter in owner.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            kind = layers.kind(owner, leaf)
            counts["tensors"] += 1
            for freeze, kinds in KINDS.items():
                if kind in kinds:
                    counts[f"{'closed' if is_closed else 'frozen'}_{freeze}"] += 1
            if kind not in KINDS["layernorm"] or is_closed:
                counts["exempt" if layers.is_exempt(owner, leaf, parameter) else "decayed"] += 1
    return counts


def build_timm(name: str) -> nn.Module:
    """A model of timm's."""
    return timm.create_model(name)


def build_transformers(model_type: str) -> nn.Module:
    """A model type's model on its default config: AutoModel's, another Auto class's, or the first that takes it."""
    config = transformers.CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
    for auto in (transformers.AutoModel, *AUTO_MODELS):
        if type(config) in auto._model_mapping:
            found: Any = auto._model_mapping[type(config)]
            return cast(nn.Module, (found[0] if isinstance(found, tuple) else found)._from_config(config))
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    for name, cls in vars(module).items():  # parts of larger models have no Auto class
        if getattr(cls, "config_class", None) is type(config) and not name.endswith("PreTrainedModel"):
            return cast(nn.Module, cls._from_config(config))
    raise LookupError("no model class for its config")


LIBRARIES: dict[str, tuple[Any, Callable[[str], nn.Module]]] = {
    "timm": (timm, build_timm),
    "transformers": (transformers, build_transformers),
}


def names(library: str) -> list[str]:
    """All models of timm, all model types of transformers."""
    return sorted(timm.list_models() if library == "timm" else transformers.CONFIG_MAPPING)


def version(library: str) -> str:
    """A library's version, as in the table's first line."""
    return f"{library} {LIBRARIES[library][0].__version__}"


def row(library: str, name: str) -> tuple[str, ...]:
    """One row of the table."""
    build = LIBRARIES[library][1]
    reason = ""
    for note, device in (("", SmallOnCpu()), ("meta", torch.device("meta"))):
        try:
            with _time_limit(SECONDS), device, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)  # some gains are random
                model = build(name)
            return library, name, *map(str, count(model).values()), note
        except Exception as error:
            reason = f"not built: {type(error).__name__}: {' '.join(str(error).split())[:60]}"
            if isinstance(error, TimeoutError):
                break
    return library, name, *[""] * (len(COLUMNS) - 3), reason


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="print the rows of the models with TEXT in their name")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    rows = []
    for library in LIBRARIES:
        for name in names(library):
            if only is None or only in name:
                rows.append("\t".join(row(library, name)))
                print(rows[-1], file=sys.stdout if only else sys.stderr, flush=True)
    if only is None:
        versions = ", ".join([*map(version, LIBRARIES), f"torch {torch.__version__.partition('+')[0]}"])
        TABLE.write_text("\n".join([f"# {versions}", "\t".join(COLUMNS), *rows]) + "\n")


if __name__ == "__main__":
    main()
