"""Tells when a module has been imported or reloaded.

A finder in front of all others lets them find the module, and puts its own loader in front of the module's: one that
executes the module by the loader it has and then calls back. That holds for every loader that follows the import
protocol, for ``importlib.reload`` and ``LazyLoader``, and other threads wait for it as for the module itself. What was
found past this finder is not told; :func:`watch` can be called again at any time, and says so.

Standard library only, since ``import torch`` reads this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from threading import get_ident
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

_told: WeakKeyDictionary[ModuleType, bool] = WeakKeyDictionary()  # False while a watched module is executed, then True


def watch(name: str, callback: Callable[[], None]) -> bool:
    """Call back each time that a module has been executed; watching it again changes nothing.

    Args:
        name: the module's full name.
        callback: called before the import is over, also for other threads. It must not raise.

    Returns:
        Whether the module has been loaded already, as :func:`loaded` sees it.
    """
    _watcher.callbacks[name] = callback
    put_first()
    module = sys.modules.get(name)
    if module is not None and is_loading(module):  # since before it was watched
        call_when_loaded(module, callback)
    return loaded(name) is not None


def put_first() -> None:
    """Put our finder in front of those that have come since, which might not leave it to us to see an import."""
    if _watcher.callbacks and sys.meta_path[:1] != [_watcher]:
        # In one step, since other threads may be walking along this list.
        sys.meta_path[:] = [_watcher, *(finder for finder in sys.meta_path if finder is not _watcher)]


def unwatch(name: str) -> None:
    """Undo :func:`watch`."""
    _watcher.callbacks.pop(name, None)
    if not _watcher.callbacks:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _watcher]


def is_watched(name: str) -> bool:
    """Whether the import of a module will be seen, as long as no finder in front of ours finds it."""
    return name in _watcher.callbacks and _watcher in sys.meta_path


def loaded(name: str) -> ModuleType | None:
    """The module of this name if it has been executed to its end, which being in ``sys.modules`` does not say.

    Args:
        name: the full name, such as ``"transformers.trainer"``.
    """
    module = sys.modules.get(name)
    return None if module is None or _is_lazy(module) or is_loading(module) else module


def is_loading(module: ModuleType) -> bool:
    """Whether a module is being executed."""
    if module in _told:
        return not _told[module]
    return not _is_lazy(module) and bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def call_when_loaded(module: ModuleType, callback: Callable[[], None]) -> None:
    """Call back when a module has been executed whose execution has begun.

    That is what is left for a framework that imports torch, and so starts autoload, on its first lines.
    """
    if module not in _told:
        with suppress(TypeError):  # a spec of somebody else's making
            spec: Any = module.__spec__
            spec.__class__ = _WatchedSpec
            spec.on_loaded = callback
            _told[module] = False


def _is_lazy(module: ModuleType) -> bool:
    """Whether any look at an attribute would execute the module, as with importlib.util.LazyLoader."""
    return module not in _told and type(module).__getattribute__ is not ModuleType.__getattribute__


class _Watcher:
    """A finder that finds nothing by itself.

    Attributes:
        callbacks: by the names of the modules that are waited for; they stay, since a module can be imported again.
    """

    def __init__(self) -> None:
        self.callbacks: dict[str, Callable[[], None]] = {}
        self._searches: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        search = (get_ident(), fullname)
        if fullname not in self.callbacks or search in self._searches:  # other finders delegate like this one
            return None
        self._searches.add(search)
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            found = (finder.find_spec(fullname, path, target) for finder in finders)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._searches.discard(search)
        if hasattr(getattr(spec, "loader", None), "exec_module"):
            with suppress(Exception):  # a spec of somebody else's making
                spec.loader = _Loader(fullname, spec.loader)  # type: ignore[union-attr]
        return spec


_watcher = _Watcher()


class _Loader:
    """Stands in for a module's own loader until the module is executed, and leaves nothing of itself behind."""

    def __init__(self, name: str, own: Any) -> None:
        self._name = name
        self._own = own

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.__dict__["_own"], attribute)

    def exec_module(self, module: ModuleType) -> None:
        for owner, attribute in ((module, "__loader__"), (module.__spec__, "loader")):
            if getattr(owner, attribute, None) is self:
                setattr(owner, attribute, self._own)
        _told[module] = False
        try:
            self._own.exec_module(module)
        except BaseException:
            _told.pop(module, None)  # one that could not be reloaded stays what it was
            raise
        _told[module] = True
        if self._name in sys.modules:  # else somebody executes a copy by hand
            _watcher.callbacks.get(self._name, _nothing)()


def _nothing() -> None:
    pass


class _WatchedSpec(ModuleSpec):
    """A spec that tells when its module has been loaded.

    ``_initializing`` is private to Python. The import system sets it to True before and to False after a module is
    executed, by whichever loader, and it is the only sign of a module whose execution had begun before.
    """

    on_loaded: Callable[[], None] | None = None

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing", False))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        on_loaded = self.on_loaded
        if self._initializing and not value and on_loaded is not None:
            self.on_loaded = None
            module = sys.modules.get(self.name)
            if module is not None:  # one that failed to load is gone by now
                _told[module] = True
                on_loaded()  # before the flag falls: other threads wait for it
        self.__dict__["_initializing"] = value
