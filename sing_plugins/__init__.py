"""SING (Stabilized and Normalized Gradient) as a named optimizer for Transformers, timm, fairseq and Accelerate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sing_plugins.autoload import disable as disable
    from sing_plugins.autoload import enable as enable
    from sing_plugins.groups import unfreeze as unfreeze
    from sing_plugins.optimizer import SING as SING
    from sing_plugins.plan import create_optimizer as create_optimizer
    from sing_plugins.plan import param_groups as param_groups
    from sing_plugins.step import sync_lookahead as sync_lookahead
    from sing_plugins.wrapper import wrap as wrap

# The names are loaded when they are first used: `import torch` imports this package for its entry point.
_HOMES = {
    "SING": "sing_plugins.optimizer",
    "wrap": "sing_plugins.wrapper",
    "param_groups": "sing_plugins.plan",
    "create_optimizer": "sing_plugins.plan",
    "sync_lookahead": "sing_plugins.step",
    "unfreeze": "sing_plugins.groups",
    "enable": "sing_plugins.autoload",
    "disable": "sing_plugins.autoload",
}

__all__ = ["SING", "create_optimizer", "disable", "enable", "param_groups", "sync_lookahead", "unfreeze", "wrap"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
