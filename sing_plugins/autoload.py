"""Registers SING in a framework when that framework is imported, with no import in the user's script.

``import torch`` calls :func:`install` through the entry point group ``torch.backends``, whatever the program is. So
this module imports the standard library only, its entry point never raises, and it does no more than wait for the
modules named in :data:`FRAMEWORKS`; an adapter is imported when, and only when, its framework is.

A program can import a framework past our finder (typeguard's import hook does), reload it or put it into
``sys.modules`` by hand; and timm builds AdamW for ``sing_adamw`` if nobody has told it about SING. So there are three
lines of defence:

1. the finder of :mod:`sing_plugins.watch`, which is enough in an ordinary program;
2. each definition of an optimizer class, of which the frameworks are full: SING is registered in what is there, and the
   finder goes to the front, where it sees the modules that are still to come;
3. once timm is there, each construction of an optimizer: that timm is building it for a name of ours is an error. Torch
   offers nothing public for that: its global hooks are called when training has begun.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from contextlib import suppress
from functools import partial
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakSet

from sing_plugins import optimizer_events
from sing_plugins.frameworks import FRAMEWORKS, LIBRARIES, Framework, Library
from sing_plugins.watch import call_when_loaded, is_loading, is_watched, loaded, put_first, unwatch, watch

if TYPE_CHECKING:
    from sing_plugins.adapter import Adapter

__all__ = ["FRAMEWORKS", "LIBRARIES", "Status", "disable", "enable", "install", "loaded", "status"]

SWITCH = "SING_PLUGINS_AUTOLOAD"  # "0" switches autoload off
TORCH_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # "0" switches all such entry points off
DEPTH = 16  # from the constructor of torch's Optimizer to a framework's function; there are about 3
OPTIMIZER = "torch.optim.optimizer"

_on: set[str] = set()  # the frameworks that are waited for
_disabled: set[str] = set()
_problems: dict[str, str] = {}  # framework -> why it was not patched
_registered: WeakSet[ModuleType] = WeakSet()  # those of the frameworks' modules that were loaded when it was patched
_patching = RLock()  # two modules of a framework may be imported by two threads


class Status(NamedTuple):
    """What :func:`status` tells about one framework."""

    framework: str
    version: str | None
    supported: str
    active: bool
    why: str


def install() -> None:
    """The entry point: wait for the frameworks. Never raises; does nothing where ``SING_PLUGINS_AUTOLOAD=0``."""
    try:
        if os.environ.get(SWITCH) != "0":
            _on.update(FRAMEWORKS.keys() - _disabled)
            for name in list(_on):
                if _wait_for(FRAMEWORKS[name]):
                    _patch(name)
            _look_at_torch()
    except Exception as error:  # an exception here would abort `import torch`
        _warn(f"SING could not watch for frameworks: {error!r}")


def enable(framework: str) -> None:
    """Register SING in a framework by hand: now if it has been imported, else as soon as it is.

    Enabling twice changes nothing.

    Args:
        framework: ``"transformers"``, ``"timm"``, ``"fairseq"`` or ``"accelerate"``, where there is nothing to do.

    Raises:
        ValueError: not a framework that SING knows.
        ModuleNotFoundError: the framework is not installed.
        RuntimeError: its version is not supported.
    """
    chosen = _library(framework)
    chosen.check_version()
    if isinstance(chosen, Framework):
        _disabled.discard(framework)
        _problems.pop(framework, None)
        _on.add(framework)
        _look_at_torch()
        if _wait_for(chosen):
            _register(chosen)


def disable(framework: str) -> None:
    """Undo :func:`enable` and autoload for a framework: its names are as if SING were not installed.

    Args:
        framework: as in :func:`enable`.

    Raises:
        ValueError: not a framework that SING knows.
    """
    chosen = _library(framework)
    if not isinstance(chosen, Framework):
        return
    _disabled.add(framework)
    _on.discard(framework)
    for trigger in chosen.triggers:
        unwatch(trigger)
    if not any(FRAMEWORKS[name].misreads for name in _on):
        optimizer_events.off(optimizer_events.OBJECT)
    if not _on:
        optimizer_events.off(optimizer_events.CLASS)
        unwatch(OPTIMIZER)
    if chosen.adapter in sys.modules:
        with _patching:
            _adapter(chosen).unpatch()
            _registered.difference_update(_loaded(chosen))


def status() -> list[Status]:
    """For each framework: installed version, supported range, whether SING is registered, and why (not)."""
    return [_status(library) for library in (*FRAMEWORKS.values(), *LIBRARIES.values())]


def _status(library: Library) -> Status:
    version = library.installed()
    if version is None:
        active, why = False, f"not installed: pip install 'sing-plugins[{library.name}]'"
    elif not library.is_supported(version):
        active, why = False, "the installed version is not supported"
    elif isinstance(library, Framework):
        active, why = _state(library)
    else:
        active, why = True, f"no names to register: import {library.adapter}"
    return Status(library.name, version, library.range, active, why)


def _state(framework: Framework) -> tuple[bool, str]:
    """Whether SING is registered, or certain to be, in a framework of a supported version; and why (not)."""
    name = framework.name
    by_hand = f'sing_plugins.enable("{name}") registers it'
    off = f"autoload is off ({SWITCH}=0, {TORCH_SWITCH}=0, or sing-plugins is not installed)"
    is_seen = optimizer_events.is_on(optimizer_events.CLASS) or all(map(is_watched, framework.triggers))
    if name in _disabled:
        return False, "disabled by sing_plugins.disable()"
    if name in _problems:
        return False, _problems[name]
    if _loaded(framework):
        if _is_registered(framework):
            return True, "registered"
        return False, f"imported, but past SING's import hook: {by_hand}" if name in _on else f"{off}: {by_hand}"
    if name not in _on:
        return False, off
    if not is_seen:
        return False, f"SING's import hook has been taken out of sys.meta_path: {by_hand}"
    return True, f"will be registered when {name} is imported"


def _is_registered(framework: Framework) -> bool:
    """Whether SING is registered in all of a framework's modules that are loaded."""
    is_patched = framework.adapter in sys.modules and _adapter(framework).is_patched()
    return is_patched and all(module in _registered for module in _loaded(framework))


def _adapter(framework: Framework) -> Adapter:
    return cast("Adapter", importlib.import_module(framework.adapter))


def _loaded(framework: Framework) -> list[ModuleType]:
    return [module for trigger in framework.triggers if (module := loaded(trigger)) is not None]


def _library(name: str) -> Library:
    known: dict[str, Library] = {**FRAMEWORKS, **LIBRARIES}
    if name not in known:
        raise ValueError(f"Invalid framework: {name!r}. Accepted: {', '.join(known)}.")
    return known[name]


def _look() -> None:
    """Register SING in what was imported unseen, and see what comes. Called when an optimizer class is defined."""
    put_first()
    for name in list(_on):
        framework = FRAMEWORKS[name]
        there = [sys.modules[trigger] for trigger in framework.triggers if trigger in sys.modules]
        if any(module not in _registered for module in there) and _wait_for(framework):
            _patch(name)
    _look_at_torch()


def _look_at_torch() -> None:
    """Wait for what happens in torch, which may not have been imported yet."""
    if _on and watch(OPTIMIZER, _look):
        optimizer_events.on_class(_look)
        if any(FRAMEWORKS[name].misreads and name in sys.modules for name in _on):
            optimizer_events.on_object(_verify)


def _wait_for(framework: Framework) -> bool:
    """Wait for the framework's triggers; whether there are some already that SING is not registered in."""
    for trigger in framework.triggers:
        watch(trigger, partial(_patch, framework.name))
    return any(module not in _registered for module in _loaded(framework))


def _patch(name: str) -> None:
    """Called after a trigger was imported. Whatever goes wrong is a warning: the import must succeed."""
    if name not in _on or name in _problems:
        return
    try:
        _register(FRAMEWORKS[name])
    except Exception as error:
        _problems[name] = f"{type(error).__name__}: {error}"
        _warn(
            f"SING is not registered in {name}, whose optimizer names are untouched, so that a sing_… name is not "
            f"SING: {_problems[name]}. `sing-plugins status` tells more; {SWITCH}=0 silences this."
        )


def _register(framework: Framework) -> None:
    """Patch the framework's modules that are loaded; a patch that fails halfway is undone."""
    framework.check_version()
    adapter = _adapter(framework)
    if is_loading(sys.modules[framework.adapter]):  # it imports its framework, and will be asked again
        call_when_loaded(sys.modules[framework.adapter], partial(_patch, framework.name))
        return
    with _patching:
        try:
            adapter.patch()
        except Exception:
            with suppress(Exception):
                adapter.unpatch()
            raise
        _registered.update(_loaded(framework))


def _verify() -> None:
    """Called before an optimizer is built: it must not be what a framework makes of one of our names.

    Raises:
        RuntimeError: it is.
    """
    for name in list(_on):
        framework = FRAMEWORKS[name]
        asked = _asked(*framework.misreads) if framework.misreads else None
        if asked is not None:
            if _is_registered(framework):
                _problems.setdefault(name, f"another {name} than the one in which SING is registered is in use")
            elif _loaded(framework):
                _patch(name)  # too late for this one
            raise RuntimeError(_explain(framework, asked))


def _asked(package: str, variable: str) -> str | None:
    """The name of ours for which a package's function is building an optimizer that is not ours, or None."""
    frame: Any = sys._getframe(3)  # whoever builds it
    for _ in range(DEPTH):
        if frame is None:
            return None
        module = frame.f_globals.get("__name__", "")
        if module.startswith("sing_"):
            return None
        if module.startswith(package):
            name = frame.f_locals.get(variable)
            if isinstance(name, str) and "sing" in name.lower().split("_"):
                return name
        frame = frame.f_back
    return None


def _explain(framework: Framework, asked: str) -> str:
    version = framework.installed() or ""
    if not framework.is_supported(version):
        why = f"SING supports {framework.name} {framework.range}, and this is {version}."
    elif framework.name in _problems:
        why = f"SING could not be registered: {_problems[framework.name]}."
    else:
        why = (
            f"it was imported past SING's import hook, or reloaded. SING is registered now, so that the next call is "
            f'right; sing_plugins.enable("{framework.name}") after the import makes the first one right.'
        )
    return f"{framework.name} is about to build another optimizer for the name {asked!r}: {why}"


def _warn(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Warning:  # python -W error
        print(message, file=sys.stderr)
