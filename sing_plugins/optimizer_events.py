"""Two events of ``torch.optim.Optimizer`` that no way of importing can hide: a class is defined, an object is built.

timm, fairseq and Accelerate (which Transformers' Trainer needs) define optimizer classes while they are imported,
whichever finder and loader does it; and whoever trains builds an optimizer. Nothing here imports torch, but
``torch.optim.optimizer`` must have been imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

CLASS, OBJECT = "__init_subclass__", "__init__"  # what is hooked in Optimizer

_hooked: dict[str, tuple[Any, Any]] = {}  # attribute -> (ours, its own, or None where it had none)


def on_class(callback: Callable[[], None]) -> None:
    """Call back when a subclass has been defined; what the callback raises is dropped. Doing so twice changes nothing.

    Args:
        callback: called in the thread of the class statement.
    """
    if is_on(CLASS):
        return
    optimizer = _optimizer()
    own = vars(optimizer).get(CLASS)  # torch has none yet

    def __init_subclass__(cls: type, /, **options: Any) -> None:  # noqa: N807
        forward = super(optimizer, cls).__init_subclass__ if own is None else own.__get__(None, cls)
        forward(**options)
        with suppress(Exception):  # the class is somebody else's
            callback()

    _hook(CLASS, classmethod(__init_subclass__), own)


def on_object(callback: Callable[[], None]) -> None:
    """Call back before an optimizer is built; what the callback raises is raised. Doing so twice changes nothing."""
    if is_on(OBJECT):
        return
    own = vars(_optimizer())[OBJECT]
    torch: Any = sys.modules["torch"]

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if not torch.compiler.is_compiling():  # which cannot trace the callback
            callback()
        own(self, *args, **kwargs)

    _hook(OBJECT, __init__, own)


def is_on(event: str) -> bool:
    """Whether an event, ``CLASS`` or ``OBJECT``, is told."""
    return event in _hooked


def off(event: str) -> None:
    """Put back what was there, unless somebody has put something on top of ours, which then does nothing."""
    ours, own = _hooked.pop(event, (None, None))
    if ours is None or vars(_optimizer())[event] is not ours:
        return
    if own is None:
        delattr(_optimizer(), event)
    else:
        setattr(_optimizer(), event, own)


def _hook(event: str, ours: Any, own: Any) -> None:
    _hooked[event] = ours, own
    setattr(_optimizer(), event, ours)


def _optimizer() -> Any:
    return sys.modules["torch.optim.optimizer"].Optimizer
