"""What every adapter has, and how it replaces attributes of its framework so that they can be put back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol


class Adapter(Protocol):
    """The contract of a package in ``integrations`` whose framework knows optimizers by name."""

    def patch(self) -> None:
        """Register SING in those of the framework's modules that are loaded; doing so twice changes nothing."""

    def unpatch(self) -> None:
        """Undo :meth:`patch`: the framework is what it was."""

    def is_patched(self) -> bool:
        """Whether the framework knows SING's names."""


class Hooks:
    """The attributes that an adapter has replaced: each of them once, and with what was there kept for later."""

    def __init__(self) -> None:
        self._replaced: dict[tuple[Any, str], tuple[Any, Any]] = {}

    def hook(self, owner: Any, attribute: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace a function or method; one that is hooked already is left alone.

        Args:
            owner: a module or a class.
            attribute: the name of a function, a method or a static method of it.
            make: takes the function that is there and returns the one that takes its place.
        """
        if (owner, attribute) in self:
            return
        own = inspect.getattr_static(owner, attribute)
        is_static = isinstance(own, staticmethod)
        function = own.__func__ if is_static else own
        ours: Any = functools.wraps(function)(make(function))
        ours = staticmethod(ours) if is_static else ours
        self._replaced[owner, attribute] = ours, own
        setattr(owner, attribute, ours)

    def unhook(self) -> None:
        """Put everything back, but for what somebody else has hooked on top of ours: ``make`` must allow for that."""
        for (owner, attribute), (ours, own) in self._replaced.items():
            if inspect.getattr_static(owner, attribute) is ours:
                setattr(owner, attribute, own)
        self._replaced.clear()

    def __contains__(self, place: tuple[Any, str]) -> bool:
        return place in self._replaced
