"""Autoload: SING is registered when a framework is imported, at next to no cost, and never in anybody's way.

The machinery needs the standard library only. It is tested with a tiny framework of our own making on disk, in every
supported Python that is found on this machine; what depends on torch and on the real frameworks follows below.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sing_plugins

ROOT = Path(sing_plugins.__file__).parents[1]


def run(
    code: str, *flags: str, python: str = sys.executable, cwd: str | Path = "/", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter outside of the checkout; it must succeed."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SING_", "PYTHON", "TORCH_"))}
    done = subprocess.run(
        [python, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, env={**ours, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


# ------------------------------------------------------------------------------ the machinery, with no torch in sight

FILES = {
    "frame-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: frame\nVersion: 1.5\n",
    "frame/__init__.py": "__version__ = '1.5'\n",
    # What a framework offers, and a trigger. Its names are read long after its first line.
    "frame/names.py": "import time\ntime.sleep(0.05)\nNAMES = ['adamw']\n",
    # A trigger that imports something like torch, which calls the entry point, before it has any names.
    "frame/early.py": "from sing_plugins import autoload\nautoload.install()\nNAMES = ['adamw']\n",
    # A trigger whose first import fails.
    "frame/fails.py": "import builtins\nbuiltins.tries = getattr(builtins, 'tries', 0) + 1\n"
    "if builtins.tries == 1:\n    raise OSError('not today')\nNAMES = ['adamw']\n",
    "adapter.py": """
import time
from sing_plugins.autoload import loaded

time.sleep(0.05)  # as long as it takes to import torch's optimizers

def patch():
    for module in _modules():
        if "sing" not in module.NAMES:
            module.NAMES.append("sing")

def unpatch():
    for module in _modules():
        if "sing" in module.NAMES:
            module.NAMES.remove("sing")

def is_patched():
    return any("sing" in module.NAMES for module in _modules())

def _modules():
    return [module for name in ("names", "early", "fails") if (module := loaded("frame." + name)) is not None]
""",
    # An adapter that minds being used by two threads at once.
    "alone.py": """
import time
from adapter import *
import adapter
busy = []
def patch():
    assert not busy, "another thread is at it"
    busy.append(1)
    time.sleep(0.05)
    adapter.patch()
    busy.clear()
""",
    # An adapter that imports its framework at once.
    "eager.py": "import frame.names\nfrom adapter import patch, unpatch, is_patched\n",
    "broken.py": "import a_module_that_is_not_there\n",
    "halfway.py": "from adapter import *\nimport adapter\n"
    "def patch():\n    adapter.patch()\n    raise KeyError('the framework has changed')\n",
}

PREAMBLE = """
import importlib, importlib.util, sys, warnings
sys.path[:0] = [{root!r}, {folder!r}]
from sing_plugins import autoload
from sing_plugins.frameworks import Framework
triggers = ("frame.names", "frame.early", "frame.fails")
def known_as(adapter="adapter", supported=("1", "2")):
    autoload.FRAMEWORKS.clear()
    autoload.FRAMEWORKS["frame"] = Framework("frame", adapter, ("frame",), supported, triggers)
def state():
    return autoload.status()[0]
known_as()
"""

MACHINERY = {
    "the adapter is imported when the framework is, and not before": """
autoload.install()
assert "adapter" not in sys.modules and state().active and "will be" in state().why, state()
import frame
assert "adapter" not in sys.modules
import frame.names
assert frame.names.NAMES == ["adamw", "sing"] and state().why == "registered", state()
""",
    "installing and enabling again changes nothing": """
for _ in range(2): autoload.install()
import frame.names
for _ in range(2): autoload.install(); autoload.enable("frame")
assert frame.names.NAMES == ["adamw", "sing"], frame.names.NAMES
assert sum(type(finder).__name__ == "_Watcher" for finder in sys.meta_path) == 1
""",
    "a framework that was imported before is registered at once": """
import frame.names
autoload.install()
assert frame.names.NAMES == ["adamw", "sing"]
""",
    "a module that is half imported is registered when it is whole": """
import frame.early
assert frame.early.NAMES == ["adamw", "sing"]
""",
    "a half imported module does not keep the others from being registered": """
import frame.names, frame.early
assert frame.names.NAMES == frame.early.NAMES == ["adamw", "sing"]
""",
    "an import that fails leaves no trace and a second one is registered": """
autoload.install()
try:
    import frame.fails
except OSError:
    pass
else:
    raise SystemExit("the module's own error is lost")
assert "frame.fails" not in sys.modules and "adapter" not in sys.modules and not autoload._problems
import frame.fails
assert frame.fails.NAMES == ["adamw", "sing"]
""",
    "looking for a module without importing it registers nothing": """
autoload.install()
spec = importlib.util.find_spec("frame.names")
assert spec.origin.endswith("names.py") and "frame.names" not in sys.modules and "adapter" not in sys.modules
assert importlib.util.find_spec("frame.nothing") is None
module = importlib.util.module_from_spec(importlib.util.find_spec("frame.names"))
module.__spec__.loader.exec_module(module)
assert module.NAMES == ["adamw"]
import frame.names
assert frame.names.NAMES == ["adamw", "sing"]
""",
    "a reloaded module is registered again": """
autoload.install()
import frame.names
for _ in range(2):
    frame.names.NAMES = None
    assert importlib.reload(frame.names) is frame.names
    assert frame.names.NAMES == ["adamw", "sing"]
autoload.disable("frame")
importlib.reload(frame.names)
assert frame.names.NAMES == ["adamw"]
""",
    "a module that was dropped and imported anew is registered": """
autoload.install()
import frame.names
old = sys.modules.pop("frame.names")
new = importlib.import_module("frame.names")
assert new is not old and new.NAMES == ["adamw", "sing"]
""",
    "no thread sees the module without SING": """
import threading, time
autoload.install()
seen = []
def use():
    seen.append(list(importlib.import_module("frame.names").NAMES))
def use_while_it_is_patched():
    while not hasattr(sys.modules.get("frame.names"), "NAMES"):
        time.sleep(0.001)
    use()
threads = [threading.Thread(target=target) for target in [use_while_it_is_patched, use] * 4]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert seen == [["adamw", "sing"]] * 8, seen
""",
    "an adapter that imports its framework may be imported first": """
known_as("eager")
autoload.install()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import eager
assert sys.modules["frame.names"].NAMES == ["adamw", "sing"] and not autoload._problems, autoload._problems
""",
    "disable takes SING out and enable puts it back": """
autoload.install()
import frame.names
for _ in range(2):
    autoload.disable("frame")
    assert frame.names.NAMES == ["adamw"] and not state().active and "disable" in state().why, state()
autoload.enable("frame")
assert frame.names.NAMES == ["adamw", "sing"] and state().active
""",
    "a framework that was disabled before its import stays as it is": """
autoload.install()
autoload.disable("frame")
import frame.names
assert frame.names.NAMES == ["adamw"] and "adapter" not in sys.modules
autoload.enable("frame")
assert frame.names.NAMES == ["adamw", "sing"]
""",
    "autoload can be switched off and a framework enabled by hand": """
import os
os.environ["SING_PLUGINS_AUTOLOAD"] = "0"
autoload.install()
assert not state().active and "SING_PLUGINS_AUTOLOAD=0" in state().why, state()
autoload.enable("frame")
assert state().active
import frame.names
assert frame.names.NAMES == ["adamw", "sing"]
""",
    "an unsupported version gives one warning and no patch": """
known_as(supported=("1.6", "2"))
autoload.install()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import frame.names, frame.early
assert len(caught) == 1 and caught[0].category is RuntimeWarning, caught
message = str(caught[0].message)
assert all(part in message for part in ("frame", "1.5", ">=1.6,<2", "SING_PLUGINS_AUTOLOAD=0")), message
assert frame.names.NAMES == ["adamw"] and "adapter" not in sys.modules
assert not state().active and "not supported" in state().why, state()
try:
    autoload.enable("frame")
except RuntimeError as error:
    assert "1.5" in str(error) and ">=1.6,<2" in str(error)
else:
    raise SystemExit("enabled")
""",
    "an adapter that cannot be imported gives one warning and the import succeeds": """
known_as("broken")
autoload.install()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import frame.names, frame.early
(warning,) = caught
assert "a_module_that_is_not_there" in str(warning.message), warning
assert frame.names.NAMES == ["adamw"] and not state().active and "a_module_that" in state().why, state()
try:
    autoload.enable("frame")
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("enabled")
known_as()
autoload.enable("frame")
assert frame.names.NAMES == ["adamw", "sing"] and state().active, state()
""",
    "with warnings as errors the import succeeds all the same": """
known_as("broken")
autoload.install()
warnings.simplefilter("error")
import frame.names
assert frame.names.NAMES == ["adamw"]
""",
    "a patch that fails halfway is undone": """
known_as("halfway")
autoload.install()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import frame.names
assert len(caught) == 1 and frame.names.NAMES == ["adamw"] and "framework has changed" in state().why, state()
""",
    "the imported package's own version counts": """
from importlib import metadata
def version(name): raise OSError("broken metadata")
metadata.version = version
autoload.install()
assert state().version is None and not state().active and "not installed" in state().why, state()
import frame.names
assert state().version == "1.5" and frame.names.NAMES == ["adamw", "sing"], state()
""",
    "metadata without a version are no version": """
from importlib import metadata
metadata.version = lambda name: None
assert autoload.FRAMEWORKS["frame"].installed() is None
""",
    "another finder may delegate to all the others as this one does": """
class Delegating:
    def find_spec(self, name, path=None, target=None):
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        return next(filter(None, found), None)
autoload.install()
for place in (0, 1):
    sys.meta_path.insert(place, Delegating())
    assert importlib.import_module("frame.names").NAMES == ["adamw", "sing"]
    del sys.meta_path[place], sys.modules["frame.names"]
""",
    "a spec of somebody else's making is watched as well": """
from importlib.machinery import ModuleSpec, PathFinder
class Slotted(ModuleSpec):
    __slots__ = ("extra",)
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        found = PathFinder.find_spec(name, path, target)
        if name != "frame.names" or found is None:
            return found
        return Slotted(name, found.loader, origin=found.origin)
sys.meta_path.insert(0, Finder)
autoload.install()
import frame.names
assert frame.names.NAMES == ["adamw", "sing"] and state().why == "registered", state()
""",
    "a spec that cannot be watched is left alone and status says so": """
from importlib.machinery import ModuleSpec, PathFinder
class Fixed(ModuleSpec):
    def __setattr__(self, name, value):
        if name == "loader" and name in vars(self):
            raise AttributeError(name)
        super().__setattr__(name, value)
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        found = PathFinder.find_spec(name, path, target)
        return Fixed(name, found.loader, origin=found.origin) if name == "frame.names" else found
sys.meta_path.insert(0, Finder)
autoload.install()
import frame.names
assert frame.names.NAMES == ["adamw"] and not state().active and "imported, but past" in state().why, state()
autoload.enable("frame")
assert frame.names.NAMES == ["adamw", "sing"] and state().why == "registered", state()
""",
    "the module has its own loader and no other": """
autoload.install()
import frame.names
for _ in range(2):
    spec = frame.names.__spec__
    assert type(spec.loader).__name__ == "SourceFileLoader" and frame.names.__loader__ is spec.loader, spec
    assert "NAMES" in spec.loader.get_source("frame.names") and type(spec).__name__ == "ModuleSpec"
    importlib.reload(frame.names)
spec = importlib.util.find_spec("frame.early")
assert "NAMES" in spec.loader.get_source("frame.early")
""",
    "modules of an archive share a loader": """
import os, zipfile
archive = os.path.join(sys.path[1], "archive.zip")
with zipfile.ZipFile(archive, "w") as file:
    for name in ("__init__", "names", "fails"):
        file.write(os.path.join(sys.path[1], "frame", name + ".py"), "frame/" + name + ".py")
sys.path.insert(1, archive)
autoload.install()
import frame.names
assert archive in frame.names.__file__ and frame.names.NAMES == ["adamw", "sing"]
importlib.reload(frame.names)
assert frame.names.NAMES == ["adamw", "sing"]
try:
    import frame.fails
except OSError:
    import frame.fails
assert frame.fails.NAMES == ["adamw", "sing"]
""",
    "a lazy module is registered when it is really loaded": """
autoload.install()
spec = importlib.util.find_spec("frame.names")
spec.loader = importlib.util.LazyLoader(spec.loader)
module = sys.modules["frame.names"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
autoload.install()
assert state().why.startswith("will be") and "adapter" not in sys.modules, state()
assert object.__getattribute__(module, "__class__") is not type(sys), "it has been loaded"
assert module.NAMES == ["adamw", "sing"] and state().why == "registered", state()
""",
    "a reload that fails leaves the module loaded": """
autoload.install()
import frame.names
class Breaking:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_loader(name, Breaking) if name == "frame.names" else None
    @staticmethod
    def create_module(spec): return None
    @staticmethod
    def exec_module(module): raise OSError("not today")
sys.meta_path.insert(1, Breaking)
try:
    importlib.reload(frame.names)
except OSError:
    pass
else:
    raise SystemExit("the module's own error is lost")
assert autoload.loaded("frame.names") is frame.names and state().why == "registered", state()
""",
    "two threads that import two modules patch one after the other": """
import threading
known_as("alone")
autoload.install()
import alone, frame
threads = [threading.Thread(target=importlib.import_module, args=("frame." + name,)) for name in ("names", "early")]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert frame.names.NAMES == frame.early.NAMES == ["adamw", "sing"] and not autoload._problems, autoload._problems
""",
    "what was found past the finder is told and can be enabled": """
from importlib.machinery import PathFinder
autoload.install()
sys.meta_path.insert(0, PathFinder)
import frame.names
assert frame.names.NAMES == ["adamw"] and not state().active and "imported, but past" in state().why, state()
autoload.enable("frame")
assert frame.names.NAMES == ["adamw", "sing"] and state().why == "registered", state()
del sys.modules["frame.names"]
import frame.names
assert frame.names.NAMES == ["adamw", "sing"], "enable has put the finder in front"
sys.meta_path.insert(0, PathFinder)
importlib.reload(frame.names)
assert frame.names.NAMES == ["adamw"] and not state().active and "imported, but past" in state().why, state()
import frame.early
assert frame.early.NAMES == ["adamw", "sing"]
""",
    "a module that was put there by hand is told and can be enabled": """
autoload.install()
import frame.names
sys.modules["frame.fails"] = module = type(sys)("frame.fails")
module.NAMES = ["adamw"]
assert not state().active and "imported, but past" in state().why, state()
autoload.enable("frame")
assert module.NAMES == ["adamw", "sing"] and state().why == "registered", state()
""",
    "a finder that was taken out is told": """
autoload.install()
sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != "_Watcher"]
assert not state().active and "taken out of sys.meta_path" in state().why, state()
import frame.names
assert frame.names.NAMES == ["adamw"] and not state().active
autoload.enable("frame")
assert frame.names.NAMES == ["adamw", "sing"] and state().active
""",
    "where all is disabled there is no finder": """
before = list(sys.meta_path)
autoload.install()
autoload.disable("frame")
assert sys.meta_path == before, sys.meta_path
autoload.enable("frame")
assert len(sys.meta_path) == len(before) + 1 and state().why.startswith("will be"), state()
""",
    "an entry point that fails says so and raises nothing": """
del autoload._wait_for
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    autoload.install()
assert len(caught) == 1 and "_wait_for" in str(caught[0].message)
warnings.simplefilter("error")
autoload.install()
""",
    "a framework nobody knows": """
for function in (autoload.enable, autoload.disable):
    try:
        function("keras")
    except ValueError as error:
        assert "'keras'" in str(error) and "frame" in str(error)
    else:
        raise SystemExit("accepted")
""",
}


def pythons() -> list[str]:
    """This interpreter, and another one for each other supported version of Python that is at hand."""
    found = {sys.version_info[:2]: sys.executable}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for minor in range(10, 15):
        places = [*pyenv.glob(f"versions/3.{minor}.*/bin/python3"), *filter(None, [shutil.which(f"python3.{minor}")])]
        for python in places:
            if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
                found.setdefault((3, minor), str(python))
    return list(found.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frame")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("python", pythons())
@pytest.mark.parametrize("code", MACHINERY.values(), ids=MACHINERY)
def test_machinery(code: str, python: str, folder: Path) -> None:
    run(PREAMBLE.format(root=str(ROOT), folder=str(folder)) + code, "-S", python=python)


# ----------------------------------------------------------------------------------------- torch and real frameworks


def test_importing_torch_costs_little_and_loads_no_adapter() -> None:
    """The promise is 5 ms. The number is printed; a busy machine is given five times as much."""
    code = """
import importlib.metadata, sys, time, torch
(entry,) = importlib.metadata.entry_points(group="torch.backends", name="sing_plugins")
assert not any(name.startswith("sing_") for name in sys.modules), "the switch does not work"
start = time.perf_counter()
entry.load()()
milliseconds = 1e3 * (time.perf_counter() - start)
ours = sorted(name for name in sys.modules if name.startswith("sing_"))
core = ("autoload", "frameworks", "optimizer_events", "watch")
assert ours == ["sing_plugins", *(f"sing_plugins.{name}" for name in core), "sing_torch_entry_point"], ours
print(milliseconds)
"""
    cost = min(float(run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout) for _ in range(3))
    print(f"the entry point takes {cost:.2f} ms of `import torch`")
    assert cost < 25


def test_importing_torch_imports_no_framework_and_no_adapter() -> None:
    run("""
import sys, torch
assert any(type(finder).__module__ == "sing_plugins.watch" for finder in sys.meta_path)
for name in ("transformers", "timm", "fairseq", "accelerate", "sing_plugins.names", "sing_plugins.optimizer"):
    assert name not in sys.modules and f"sing_{name}" not in sys.modules, name
""")


# framework -> what a user imports in a fresh process, and an expression for the names that the framework knows then
BY_NAME = {
    "transformers": (
        "from transformers import TrainingArguments",
        "[name.value for name in importlib.import_module('transformers.training_args').OptimizerNames]",
    ),
    "timm": (
        "from timm.optim import create_optimizer_v2",
        "importlib.import_module('timm.optim').list_optimizers('sing*')",
    ),
    "fairseq": ("from fairseq import options", "list(importlib.import_module('fairseq.optim').OPTIMIZER_REGISTRY)"),
}


@pytest.mark.parametrize("framework", BY_NAME)
def test_a_framework_knows_sing_when_it_is_the_first_import(framework: str) -> None:
    """Its own modules are then half imported when torch calls the entry point."""
    imports, names = BY_NAME[framework]
    run(f"import importlib\n{imports}\nassert any(name.startswith('sing') for name in {names}), {names}")


@pytest.mark.parametrize("switch", ["SING_PLUGINS_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_a_switch_turns_autoload_off_and_enable_still_works(switch: str) -> None:
    imports, names = BY_NAME["timm"]
    code = f"""
import importlib, sys
{imports}
assert not {"sing_timm", "sing_plugins.names"} & sys.modules.keys()
assert not any(name.startswith("sing") for name in {names}), {names}
import sing_plugins
from sing_plugins.autoload import status
assert not any(state.active for state in status() if state.framework != "accelerate"), status()
sing_plugins.enable("timm")
assert "sing_adamw" in {names}, {names}
assert [state.framework for state in status() if state.active] == ["timm", "accelerate"], status()
"""
    run(code, **{switch: "0"})


# All of a framework's own that can be reached from its triggers: what patching may change, and must restore.
SNAPSHOT = """
import importlib, types
def snapshot(triggers):
    found, seen = {}, set()
    def visit(place, value, depth):
        found[place] = id(value)
        alive.append(value)
        if depth == 0 or id(value) in seen:
            return
        seen.add(id(value))
        items = {}
        if isinstance(value, dict):
            items = value
        elif isinstance(value, (list, tuple, set)):
            items = {str(item): item for item in value}
        elif hasattr(value, "__dict__"):
            owner = str(getattr(value, "__module__", type(value).__module__))
            items = vars(value) if owner.split(".")[0] == package else {}
        found[place, "keys"] = [str(key) for key in items]
        for key, item in list(items.items()):
            if not isinstance(item, types.ModuleType):
                visit(f"{place}.{key}", item, depth - 1)
    for trigger in triggers:
        package = trigger.split(".")[0]
        for name, value in list(vars(importlib.import_module(trigger)).items()):
            if not isinstance(value, types.ModuleType) and not name.startswith("__"):
                visit(f"{trigger}.{name}", value, 5)
    return found
alive = []  # what is alive keeps its id
"""


@pytest.mark.parametrize("framework", BY_NAME)
def test_disable_restores_the_framework_exactly_and_enable_repeats(framework: str) -> None:
    _, names = BY_NAME[framework]
    code = f"""
{SNAPSHOT}
import sing_plugins
from sing_plugins.autoload import FRAMEWORKS
triggers = FRAMEWORKS[{framework!r}].triggers
snapshot(triggers)  # lazy attributes are there from the second time on
stock = snapshot(triggers)
assert stock == snapshot(triggers), "the snapshot itself is not stable"
for _ in range(2):
    sing_plugins.enable({framework!r})
    once = snapshot(triggers)
    assert once != stock and any(name.startswith("sing") for name in {names}), {names}
    sing_plugins.enable({framework!r})
    assert snapshot(triggers) == once
    for _ in range(2):
        sing_plugins.disable({framework!r})
        now = snapshot(triggers)
        differing = [place for place in now.keys() | stock.keys() if now.get(place) != stock.get(place)]
        assert not differing, differing[:20]
"""
    run(code, SING_PLUGINS_AUTOLOAD="0")


def test_a_reloaded_framework_module_knows_sing_again() -> None:
    run("""
import importlib, warnings
warnings.simplefilter("error", RuntimeWarning)
import timm.optim._optim_factory as factory
for _ in range(2):
    importlib.reload(factory)
    assert "sing_adamw" in factory.list_optimizers("sing*")
""")


# What timm makes of a name, as in a training script.
BUILD = """
def build(name, **options):
    from timm.optim import create_optimizer_v2
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), opt=name, lr=0.1, **options)
    return type(optimizer).__module__ + "." + type(optimizer).__name__
def refusal(name):
    try:
        return "trains with " + build(name)
    except RuntimeError as error:
        return str(error)
"""


def test_an_unsupported_version_gives_one_warning_and_no_patch() -> None:
    code = """
import torch
from sing_plugins import autoload
autoload.FRAMEWORKS["timm"].supported = ("0.1", "0.2")
import timm, timm.optim
assert not any("sing" in name for name in timm.optim.list_optimizers("sing*"))
assert build("adamw") == "torch.optim.adamw.AdamW"
assert "SING supports timm >=0.1,<0.2, and this is 1." in refusal("sing_adamw"), refusal("sing_adamw")
"""
    done = run(BUILD + code)
    (line,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert "timm" in line
    assert ">=0.1,<0.2" in line


@pytest.mark.parametrize("flags", [(), ("-W", "error::RuntimeWarning")], ids=["warnings", "warnings as errors"])
def test_a_broken_adapter_leaves_torch_and_its_framework_alone(flags: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "sing_timm.py").write_text("raise SyntaxError('this installation is broken')\n")
    code = """
import torch, timm.optim
assert build("adamw") == "torch.optim.adamw.AdamW"
for _ in range(2):
    assert "this installation is broken" in refusal("sing_adamw"), refusal("sing_adamw")
"""
    done = run(BUILD + code, *flags, PYTHONPATH=str(tmp_path))
    assert done.stderr.count("SING is not registered in timm") == 1
    assert "this installation is broken" in done.stderr


# What a script says before it imports a framework, each of it a way past a finder that was first when torch was
# imported. `Past` is like the finder of typeguard's install_import_hook.
PAST = """
import importlib, importlib.util, sys, torch
from importlib.machinery import PathFinder
class Past:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("timm", "transformers", "fairseq"):
            return PathFinder.find_spec(name, path, target)
"""
WAYS_PAST = {
    "a finder in front": "sys.meta_path.insert(0, Past)",
    "finders taken out": "sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith('sing_')]",
    "another list of finders": "sys.meta_path = [f for f in sys.meta_path if not f.__module__.startswith('sing_')]",
    "a finder in front and the others by then imported": "import accelerate, torchvision, omegaconf\n"
    "sys.meta_path.insert(0, Past)",
}


# Each way with a framework or two, since a way says the same for all of them.
PASSED = list(zip(("timm", "transformers", "timm", "transformers"), WAYS_PAST, strict=True))
PASSED += list(zip(("fairseq", "timm"), WAYS_PAST, strict=False))


@pytest.mark.parametrize(("framework", "way"), PASSED)
def test_a_framework_that_is_imported_past_the_finder_knows_sing(framework: str, way: str) -> None:
    imports, names = BY_NAME[framework]
    done = run(f"""
{PAST}
from sing_plugins.autoload import status
def state(): return {{each.framework: each for each in status()}}[{framework!r}]
{WAYS_PAST[way]}
assert state().active and "will be registered" in state().why, state()
{imports}
assert any(name.startswith("sing") for name in {names}), {names}
assert state().why == "registered", state()
""")
    assert "SING is not registered" not in done.stderr


def test_timm_imported_past_the_finder_builds_sing() -> None:
    run(f"{PAST}{BUILD}sys.meta_path.insert(0, Past)\nassert build('sing_adamw') == 'sing_plugins.optimizer.SING'")


def test_timm_in_an_archive_builds_sing(tmp_path: Path) -> None:
    """As in many frozen programs: one loader for all modules."""
    (origin,) = importlib.util.find_spec("timm").submodule_search_locations  # type: ignore[union-attr, misc]
    with zipfile.ZipFile(tmp_path / "timm.zip", "w") as archive:
        for file in Path(origin).rglob("*.py"):
            archive.write(file, Path("timm", file.relative_to(origin)))
    run(
        f"""
import importlib, timm, torch
{BUILD}
import timm.optim._optim_factory as factory
assert "timm.zip" in timm.__file__
assert build("sing_adamw") == "sing_plugins.optimizer.SING"
importlib.reload(factory)
assert build("sing_adamw") == "sing_plugins.optimizer.SING"
""",
        PYTHONPATH=str(tmp_path / "timm.zip"),
    )


@pytest.mark.parametrize(
    ("module", "use"),
    {
        "timm.optim": "assert 'sing_adamw' in module.list_optimizers('sing*')",
        "transformers.training_args": "assert 'sing_adamw' in [name.value for name in module.OptimizerNames]",
    }.items(),
)
def test_a_lazy_module_knows_sing(module: str, use: str) -> None:
    run(f"""
import importlib.util, sys, torch
spec = importlib.util.find_spec({module!r})
spec.loader = importlib.util.LazyLoader(spec.loader)
module = sys.modules[{module!r}] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
class Own(torch.optim.Optimizer): pass
assert object.__getattribute__(module, "__class__") is not type(sys), "it has been loaded"
{use}
""")


def test_a_framework_that_two_threads_import_past_the_finder_knows_sing() -> None:
    run(
        f"""
{PAST}{BUILD}
import threading
sys.meta_path.insert(0, Past)
built = []
threads = [threading.Thread(target=lambda: built.append(build("sing_adamw"))) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert built == ["sing_plugins.optimizer.SING"] * 4, built
""",
        "-W",
        "error::RuntimeWarning",
    )


def test_pytest_and_its_workers_know_sing(tmp_path: Path) -> None:
    """pytest puts its own finder in front."""
    (tmp_path / "test_it.py").write_text(
        f"import torch, timm.optim\n{BUILD}\n"
        "def test_it():\n    assert build('sing_adamw') == 'sing_plugins.optimizer.SING'\n"
    )
    run("import pytest, sys\nsys.exit(pytest.main(['-q', '-n1', '-W', 'error::RuntimeWarning']))", cwd=tmp_path)


# Ways to a timm that does not know SING and that nothing tells of: when it builds an optimizer, that is found out.
UNSEEN = {
    "reloaded past the finder": "sys.meta_path.insert(0, Past)",
    "reloaded while the finder was out": WAYS_PAST["another list of finders"],
}


@pytest.mark.parametrize("way", UNSEEN.values(), ids=UNSEEN)
def test_a_timm_that_does_not_know_our_names_refuses_them(way: str) -> None:
    code = f"""
{PAST}{BUILD}
from sing_plugins.autoload import status
def state(): return {{each.framework: each for each in status()}}["timm"]
import timm.optim, timm.optim._optim_factory as factory
for name in ("sing_adamw", "SING_AdamW", "sing_sgd", "sing_lamb", "lookahead_sing_adamw"):
    {way}
    importlib.reload(factory)
    importlib.reload(timm.optim)
    assert not state().active and 'sing_plugins.enable("timm")' in state().why, state()
    assert build("adamw") == "torch.optim.adamw.AdamW" and not state().active
    said = refusal(name)
    assert all(part in said for part in (f"the name {{name!r}}", "timm", 'sing_plugins.enable("timm")')), said
    assert state().why == "registered", state()
    assert build("sing_adamw") == "sing_plugins.optimizer.SING"
"""
    run(code, "-W", "error::RuntimeWarning")


def test_a_timm_that_was_put_there_by_hand_refuses_our_names() -> None:
    run(f"""
{PAST}{BUILD}
import timm.optim, timm.optim._optim_factory as factory
spec = importlib.util.spec_from_file_location(factory.__name__, factory.__file__)
other = sys.modules[factory.__name__] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(other)
timm.optim.create_optimizer_v2 = other.create_optimizer_v2
said = refusal("sing_adamw")
assert "the name 'sing_adamw'" in said, said
assert build("adamw") == "torch.optim.adamw.AdamW"
assert "SING" in refusal("sing_adamw")
""")


def test_a_timm_that_is_imported_anew_never_makes_adamw_of_our_names() -> None:
    """It knows them, or else status says why not, and each use is an error."""
    run(f"""
import sys, torch, timm.optim
{BUILD}
from sing_plugins.autoload import status
for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
    del sys.modules[name]
for _ in range(2):
    said = refusal("sing_adamw")
    active = {{each.framework: each for each in status()}}["timm"].active
    assert (said == "trains with sing_plugins.optimizer.SING") if active else "in use" in said, said
""")


def test_torch_is_what_it_was_until_timm_is_imported_and_after_disable() -> None:
    run("""
import inspect, sys, torch
from torch.optim import Optimizer
import sing_plugins
from sing_plugins.autoload import FRAMEWORKS
assert Optimizer.__init__.__module__ == "torch.optim.optimizer" and not hasattr(Optimizer.__init__, "__wrapped__")
told = []
class Mixin:
    def __init_subclass__(cls, mark=None, **options):
        super().__init_subclass__(**options)
        told.append((cls.__name__, mark))
class Mixed(Optimizer, Mixin, mark=2): pass
assert told == [("Mixed", 2)], told
try:
    class Wrong(Optimizer, mark=1): pass
except TypeError as error:
    assert "takes no keyword arguments" in str(error), error
else:
    raise SystemExit("an option that nobody takes was taken")
import timm.optim
assert str(inspect.signature(Optimizer.__init__)).startswith("(self, params")
for name in FRAMEWORKS:
    sing_plugins.disable(name)
assert "__init_subclass__" not in vars(Optimizer) and not hasattr(Optimizer.__init__, "__wrapped__")
assert not any(type(finder).__module__.startswith("sing_") for finder in sys.meta_path)
optimizer = timm.optim.create_optimizer_v2(torch.nn.Linear(2, 2), opt="sing_adamw", lr=0.1)
assert type(optimizer) is torch.optim.AdamW, "as if SING were not installed"
""")


def test_enable_before_torch_is_imported_is_as_good_as_autoload() -> None:
    code = f"""
import sing_plugins
sing_plugins.enable("timm")
import sys
assert "torch" not in sys.modules
{PAST}{BUILD}
sys.meta_path.insert(0, Past)
assert build("sing_adamw") == "sing_plugins.optimizer.SING"
"""
    run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


# A `sing_plugins` of the user's, where Python looks first.
FOREIGN = {"a file": "sing_plugins.py", "a folder": "sing_plugins/__init__.py"}


@pytest.mark.parametrize("flags", [(), ("-W", "error::RuntimeWarning")], ids=["warnings", "warnings as errors"])
@pytest.mark.parametrize("file", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_sing_plugins_does_not_break_torch(file: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("raise SystemExit('it is not run')\n")
    done = run("import sys, torch\nassert 'sing_plugins' not in sys.modules", *flags, cwd=tmp_path)
    assert done.stderr.count("SING is not registered in any framework") == 1
    assert str(tmp_path / file) in done.stderr
    quiet = run("import torch", *flags, cwd=tmp_path, SING_PLUGINS_AUTOLOAD="0")
    assert "SING" not in quiet.stderr


def test_a_script_named_like_us_runs_once(tmp_path: Path) -> None:
    (tmp_path / "sing_plugins.py").write_text("import torch\nprint('once')\n")
    code = "import subprocess, sys\nsubprocess.run([sys.executable, 'sing_plugins.py'], check=True)"
    assert run(code, cwd=tmp_path).stdout.splitlines() == ["once"]


def test_an_empty_folder_named_like_us_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "sing_plugins").mkdir()
    code = "from timm.optim import list_optimizers\nassert 'sing_adamw' in list_optimizers('sing*')"
    assert "SING is not registered" not in run(code, cwd=tmp_path).stderr


def test_missing_metadata_of_every_framework_do_not_break_it() -> None:
    run("""
from importlib import metadata
def version(name): raise metadata.PackageNotFoundError(name)
import torch
metadata.version = version
import timm.optim
assert "sing_adamw" in timm.optim.list_optimizers("sing*")
""")


def test_two_frameworks_imported_by_two_threads() -> None:
    code = """
import importlib, threading, torch
errors = []
def use(statement):
    try:
        exec(statement)
    except BaseException as error:
        errors.append(error)
"""
    code += f"statements = {[BY_NAME[name][0] for name in ('transformers', 'timm')]}\n"
    code += """
threads = [threading.Thread(target=use, args=(statement,)) for statement in statements]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors
"""
    code += "\n".join(f"assert 'sing_adamw' in {BY_NAME[name][1]}" for name in ("transformers", "timm"))
    run(code, "-W", "error::RuntimeWarning")


def test_spawned_children_know_sing(tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"
    script.write_text("""
import multiprocessing

def names():
    from timm.optim import list_optimizers
    return list_optimizers("sing*")

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "sing_adamw" in pool.apply(names)
""")
    run(f"import runpy, sys\nsys.argv = [{str(script)!r}]\nrunpy.run_path({str(script)!r}, run_name='__main__')")
