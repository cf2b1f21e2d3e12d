"""Registers SING in a framework when that framework is imported, with no import in the user's script.

``import torch`` calls :func:`install` through the entry point group ``torch.backends``, whatever the program is. So
this module imports the standard library only, its entry point never raises, and it does no more than watch for the
modules named in :data:`FRAMEWORKS`; an adapter is imported when, and only when, its framework is.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.machinery import ModuleSpec
from threading import get_ident
from types import ModuleType

SWITCH = "SING_PLUGINS_AUTOLOAD"  # "0" switches autoload off
TORCH_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # "0" switches all such entry points off


@dataclass(frozen=True)
class Framework:
    """How a framework is found and patched.

    Attributes:
        name: as the user knows it.
        adapter: our package, with ``patch()``, ``unpatch()`` and ``is_patched()``; patch() is called after each of
            the ``triggers`` was imported or reloaded and patches those that :func:`loaded` gives.
        distributions: the distributions that provide it.
        triggers: the modules that are patched; empty where the framework has nothing to register in.
        supported: first supported version, and first unsupported one.
    """

    name: str
    adapter: str
    distributions: tuple[str, ...]
    triggers: tuple[str, ...]
    supported: tuple[str, str]

    @property
    def range(self) -> str:
        """The supported versions, as pip writes them."""
        return f">={self.supported[0]},<{self.supported[1]}"

    def installed(self) -> str | None:
        """The version at hand: what the imported package says of itself, else the installed distribution's, or None."""
        version = getattr(sys.modules.get(self.name), "__version__", None)  # a checkout may hide the distribution
        for distribution in self.distributions:
            if not isinstance(version, str):
                with suppress(Exception):  # not installed, or with broken metadata
                    version = metadata.version(distribution)
        return version if isinstance(version, str) else None

    def is_supported(self, version: str) -> bool:
        """Whether a version lies in the supported range."""
        return _release(self.supported[0]) <= _release(version) < _release(self.supported[1])


FRAMEWORKS: dict[str, Framework] = {
    framework.name: framework
    for framework in (
        Framework(
            "transformers",
            "sing_transformers",
            ("transformers",),
            ("transformers.training_args", "transformers.trainer"),
            ("4.57", "6"),
        ),
        Framework("timm", "sing_timm", ("timm",), ("timm.optim._optim_factory",), ("1.0.12", "2")),
        Framework(
            "fairseq",
            "sing_fairseq",
            ("fairseq-fixed", "fairseq"),
            ("fairseq.optim", "fairseq.trainer"),
            ("0.12.2", "0.13"),
        ),
        Framework("accelerate", "sing_accelerate", ("accelerate",), (), ("1.6", "2")),
    )
}

_disabled: set[str] = set()
_problems: dict[str, str] = {}  # framework -> why it was not patched


@dataclass(frozen=True)
class Status:
    """What :func:`status` tells about one framework."""

    framework: str
    version: str | None
    supported: str
    active: bool
    why: str


def install() -> None:
    """The entry point: watch for the frameworks. Never raises; does nothing where ``SING_PLUGINS_AUTOLOAD=0``."""
    try:
        if os.environ.get(SWITCH) != "0":
            for framework in FRAMEWORKS.values():
                if _watch(framework):
                    _patch(framework.name)
    except Exception as error:  # an exception here would abort `import torch`
        _warn(f"SING could not watch for frameworks: {error!r}")


def enable(framework: str) -> None:
    """Register SING in a framework by hand: now if it has been imported, else as soon as it is.

    Enabling twice changes nothing.

    Args:
        framework: ``"transformers"``, ``"timm"``, ``"fairseq"`` or ``"accelerate"``.

    Raises:
        ValueError: not a framework that SING knows.
        ModuleNotFoundError: the framework is not installed.
        RuntimeError: its version is not supported.
    """
    chosen = _framework(framework)
    _check_version(chosen)
    _disabled.discard(framework)
    _problems.pop(framework, None)
    if _watch(chosen):
        _register(chosen)


def disable(framework: str) -> None:
    """Undo :func:`enable` and autoload for a framework: its names are as if SING were not installed.

    Args:
        framework: as in :func:`enable`.

    Raises:
        ValueError: not a framework that SING knows.
    """
    chosen = _framework(framework)
    _disabled.add(framework)
    adapter = sys.modules.get(chosen.adapter)
    if adapter is not None and chosen.triggers:
        adapter.unpatch()


def loaded(name: str) -> ModuleType | None:
    """The module of this name if it has been executed to its end, which being in ``sys.modules`` does not say.

    Args:
        name: the full name, such as ``"transformers.trainer"``.
    """
    module = sys.modules.get(name)
    return None if module is None or _is_loading(module) else module


def status() -> list[Status]:
    """For each framework: installed version, supported range, whether SING is registered, and why (not)."""
    return [_status(framework) for framework in FRAMEWORKS.values()]


def _status(framework: Framework) -> Status:
    version = framework.installed()
    if version is None:
        active, why = False, f"not installed: pip install 'sing-plugins[{framework.name}]'"
    elif not framework.is_supported(version):
        active, why = False, "the installed version is not supported"
    elif framework.name in _disabled:
        active, why = False, "disabled by sing_plugins.disable()"
    elif framework.name in _problems:
        active, why = False, _problems[framework.name]
    elif not framework.triggers:
        active, why = True, f"no names to register: import {framework.adapter}"
    elif _is_patched(framework):
        active, why = True, "registered"
    elif not set(framework.triggers) <= _pending().keys():
        active, why = False, f"autoload is off ({SWITCH}=0, {TORCH_SWITCH}=0, or sing-plugins is not installed)"
    else:
        active, why = True, f"will be registered when {framework.name} is imported"
    return Status(framework.name, version, framework.range, active, why)


def _is_patched(framework: Framework) -> bool:
    adapter = sys.modules.get(framework.adapter)
    return adapter is not None and bool(adapter.is_patched())


def _framework(name: str) -> Framework:
    if name not in FRAMEWORKS:
        raise ValueError(f"Invalid framework: {name!r}. Accepted: {', '.join(FRAMEWORKS)}.")
    return FRAMEWORKS[name]


def _check_version(framework: Framework) -> None:
    version = framework.installed()
    if version is None:
        raise ModuleNotFoundError(f"{framework.name} is not installed: pip install 'sing-plugins[{framework.name}]'")
    if not framework.is_supported(version):
        raise RuntimeError(f"SING supports {framework.name} {framework.range}, but {version} is installed")


def _register(framework: Framework) -> None:
    """Patch the framework's modules that are loaded; a patch that fails halfway is undone."""
    _check_version(framework)
    adapter = importlib.import_module(framework.adapter)
    if _is_loading(adapter):  # it imports its framework, and will be asked again
        _call_when_loaded(adapter.__spec__, partial(_patch, framework.name))
        return
    try:
        adapter.patch()
    except Exception:
        with suppress(Exception):
            adapter.unpatch()
        raise


def _patch(name: str) -> None:
    """Called after a trigger was imported. Whatever goes wrong is a warning: the import must succeed."""
    if name in _disabled or name in _problems:
        return
    try:
        _register(FRAMEWORKS[name])
    except Exception as error:
        _give_up(name, error)


def _give_up(name: str, error: Exception) -> None:
    _problems[name] = f"{type(error).__name__}: {error}"
    _warn(
        f"SING is not registered in {name}, whose optimizer names are untouched, so that a sing_… name is not SING: "
        f"{type(error).__name__}: {error}. `sing-plugins status` tells more; {SWITCH}=0 silences this."
    )


def _warn(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Warning:  # python -W error
        print(message, file=sys.stderr)


def _watch(framework: Framework) -> bool:
    """Wait for the framework's triggers; whether one of them has been loaded already."""
    for trigger in framework.triggers:
        _watcher().pending[trigger] = framework.name
        module = sys.modules.get(trigger)
        if module is not None and _is_loading(module):  # it is importing torch at this very moment
            _call_when_loaded(module.__spec__, partial(_patch, framework.name))
    return any(loaded(trigger) for trigger in framework.triggers)


def _watcher() -> _Watcher:
    for finder in sys.meta_path:
        if isinstance(finder, _Watcher):
            return finder
    watcher = _Watcher()
    sys.meta_path.insert(0, watcher)
    return watcher


def _pending() -> dict[str, str]:
    return next((finder.pending for finder in sys.meta_path if isinstance(finder, _Watcher)), {})


class _Watcher:
    """A finder that finds nothing by itself: it marks the specs of the modules that are waited for.

    Attributes:
        pending: trigger → the framework's name. A trigger stays in it, since a module can be imported again.
    """

    def __init__(self) -> None:
        self.pending: dict[str, str] = {}
        self._searches: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        search = (get_ident(), fullname)
        if fullname not in self.pending or search in self._searches:  # other finders delegate like this one
            return None
        self._searches.add(search)
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            found = (finder.find_spec(fullname, path, target) for finder in finders)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._searches.discard(search)
        if spec is not None:
            name = self.pending[fullname]
            try:
                (_call_when_loaded if target is None else _call_when_reloaded)(spec, partial(_patch, name))
            except Exception as error:  # a spec of somebody else's making
                _give_up(name, error)
        return spec


class _WatchedSpec(ModuleSpec):
    """A spec that tells when its module has been loaded.

    The import system sets ``_initializing`` to True before and to False after a module is executed, by whichever
    loader. That is also the only sign that a module gives whose execution had begun before it was watched.
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
            if self.name in sys.modules:  # a module that failed to load is gone by now
                on_loaded()  # before the flag falls: other threads wait for it
        self.__dict__["_initializing"] = value


def _is_loading(module: ModuleType) -> bool:
    spec = getattr(module, "__spec__", None)
    if isinstance(spec, _WatchedSpec) and spec.on_loaded is None:
        return False
    return bool(getattr(spec, "_initializing", False))


def _call_when_loaded(spec: ModuleSpec | None, on_loaded: Callable[[], None]) -> None:
    if spec is not None:
        spec.__class__ = _WatchedSpec
        spec.on_loaded = on_loaded  # type: ignore[attr-defined]


def _call_when_reloaded(spec: ModuleSpec, on_loaded: Callable[[], None]) -> None:
    """As above for importlib.reload, which executes the module anew and leaves ``_initializing`` alone."""
    loader = spec.loader
    execute = loader.exec_module  # type: ignore[union-attr]

    def execute_and_call(module: ModuleType) -> None:
        del loader.exec_module  # type: ignore[union-attr]
        execute(module)
        on_loaded()

    loader.exec_module = execute_and_call  # type: ignore[union-attr, method-assign]


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version's release segment: "1.0.12.post1" → (1, 0, 12)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release.group().split(".")) if release else ()
