"""What ``import torch`` calls: starts autoload, and cannot fail.

It is a package of its own because of its name. A ``sing_plugins.py`` of the user's, in the working directory or beside
the script, is found in place of our ``sing_plugins``; were that the entry point, torch could not be imported there.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

SWITCH = "SING_PLUGINS_AUTOLOAD"


def install() -> None:
    """Start :mod:`sing_plugins.autoload`, or warn that it cannot be. Never raises, and runs no foreign code."""
    if os.environ.get(SWITCH) == "0":
        return
    try:
        foreign = _foreign()
        if foreign is None:
            from sing_plugins.autoload import install as start

            start()
    except Exception as error:  # an exception here would abort `import torch`
        _warn(f"its autoload cannot be started: {type(error).__name__}: {error}.")
    else:
        if foreign is not None:
            _warn(f"`import sing_plugins` finds {foreign}, which is something else. Rename it, or run elsewhere.")


def _foreign() -> str | None:
    """The file or folder that hides our package, or None. Nothing is executed to find out."""
    package = find_spec("sing_plugins")
    if package is None:
        return None  # the import will say so
    folders = package.submodule_search_locations
    finders = [finder for finder in sys.meta_path if folders is not None and hasattr(finder, "find_spec")]
    found = (finder.find_spec("sing_plugins.autoload", folders) for finder in finders)
    autoload = next((spec for spec in found if spec is not None), None)
    # The finder of an editable installation finds it whatever the package is.
    if autoload is not None and (package.origin is None or _folder(package) == _folder(autoload)):
        return None
    return package.origin or ", ".join(folders or ["something without a file"])


def _folder(spec: ModuleSpec) -> str:
    return os.path.dirname(spec.origin or "")


def _warn(why: str) -> None:
    message = (
        f"SING is not registered in any framework, so that a sing_… name is not SING: {why} {SWITCH}=0 silences this."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Warning:  # python -W error
        print(message, file=sys.stderr)
