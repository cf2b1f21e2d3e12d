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
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType

SWITCH = "SING_PLUGINS_AUTOLOAD"  # "0" switches autoload off


@dataclass(frozen=True)
class Framework:
    """How a framework is found and patched.

    Attributes:
        name: as the user knows it.
        adapter: our package, with ``patch()``, ``unpatch()`` and ``is_patched()``; patch() is called after each of
            the ``triggers`` was imported and patches those that are in ``sys.modules``.
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
        """The installed version, or None."""
        for distribution in self.distributions:
            try:
                return metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return None

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
            ("transformers.training_args", "transformers.trainer_optimizer", "transformers.trainer"),
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
        Framework("accelerate", "sing_accelerate", ("accelerate",), (), ("1.0", "2")),
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
                _watch(framework)
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
    version = chosen.installed()
    if version is None:
        raise ModuleNotFoundError(f"{framework} is not installed: pip install 'sing-plugins[{framework}]'")
    if not chosen.is_supported(version):
        raise RuntimeError(f"SING supports {framework} {chosen.range}, but {version} is installed.")
    _disabled.discard(framework)
    _watch(chosen)


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
    if adapter is not None:
        adapter.unpatch()


def status() -> list[Status]:
    """For each framework: installed version, supported range, whether SING is registered, and why (not)."""
    return [_status(framework) for framework in FRAMEWORKS.values()]


def _status(framework: Framework) -> Status:
    version = framework.installed()
    if version is None:
        active, why = False, f"not installed: pip install 'sing-plugins[{framework.name}]'"
    elif not framework.is_supported(version):
        active, why = False, "installed version is not supported"
    elif framework.name in _disabled:
        active, why = False, "disabled by sing_plugins.disable()"
    elif framework.name in _problems:
        active, why = False, _problems[framework.name]
    elif not framework.triggers:
        active, why = True, f"no names to register: import {framework.adapter}"
    elif _is_patched(framework):
        active, why = True, "registered"
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        active, why = False, f"autoload is off ({SWITCH}=0, or the distribution is not installed)"
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


def _patch(framework: Framework) -> None:
    """Called after a trigger was imported. Whatever goes wrong is a warning: the import must succeed."""
    if framework.name in _disabled or framework.name in _problems:
        return
    try:
        version = framework.installed()
        if version is not None and not framework.is_supported(version):
            raise RuntimeError(f"version {version} is outside the supported range {framework.range}")
        importlib.import_module(framework.adapter).patch()
    except Exception as error:
        _problems[framework.name] = f"{type(error).__name__}: {error}"
        _warn(
            f"SING is not registered in {framework.name}, whose optimizer names are untouched, so that a sing_… name "
            f"is not SING: {error}. `sing-plugins status` tells more; {SWITCH}=0 silences this."
        )


def _warn(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Warning:  # python -W error
        print(message, file=sys.stderr)


def _watch(framework: Framework) -> None:
    def patch() -> None:
        _patch(framework)

    for trigger in framework.triggers:
        module = sys.modules.get(trigger)
        if module is None:
            _watcher().pending.setdefault(trigger, patch)
        elif module.__spec__ is not None and getattr(module.__spec__, "_initializing", False):
            _call_when_loaded(module.__spec__, patch)  # it is importing torch at this very moment
        else:
            patch()


def _watcher() -> _Watcher:
    for finder in sys.meta_path:
        if isinstance(finder, _Watcher):
            return finder
    watcher = _Watcher()
    sys.meta_path.insert(0, watcher)
    return watcher


class _Watcher:
    """A finder that finds nothing by itself: it marks the specs of the modules that are waited for."""

    def __init__(self) -> None:
        self.pending: dict[str, Callable[[], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.pending:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    _call_when_loaded(spec, self.pending[fullname])
                    return spec
        return None


class _WatchedSpec(ModuleSpec):
    """A spec that tells when its module has been loaded.

    The import system sets ``_initializing`` to True before and to False after a module is executed, by whichever
    loader. That is also the only sign that a module gives whose execution had begun before it was watched.
    """

    on_loaded: Callable[[], None]

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing", False))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        was_loading = self._initializing
        self.__dict__["_initializing"] = value
        if was_loading and not value and self.name in sys.modules:  # a module that failed to load is gone by now
            self.on_loaded()


def _call_when_loaded(spec: ModuleSpec, on_loaded: Callable[[], None]) -> None:
    spec.__class__ = _WatchedSpec
    spec.on_loaded = on_loaded  # type: ignore[attr-defined]


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version's release segment: "1.0.12.post1" → (1, 0, 12)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release.group().split(".")) if release else ()
