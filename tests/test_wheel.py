"""The built wheel, not the checkout: in a fresh environment, with all frameworks and with each one alone.

The environments see this interpreter's torch and frameworks through links to its installed packages, all but our own
editable installation. Nothing is fetched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

from sing_plugins.autoload import FRAMEWORKS as BY_NAME_FRAMEWORKS
from sing_plugins.autoload import LIBRARIES

ROOT = Path(__file__).parents[1]
PACKAGES = {"sing_plugins", "sing_torch_entry_point"}
PACKAGES |= {"sing_transformers", "sing_timm", "sing_fairseq", "sing_accelerate"}
FRAMEWORKS = {**BY_NAME_FRAMEWORKS, **LIBRARIES}
# What a framework's own by-name path cannot do without.
NEEDS = {"transformers": {"accelerate"}}


def run(*command: str | Path, **variables: str) -> str:
    """Run a command outside of the checkout, without what this process's environment says about Python and SING."""
    hidden = ("PYTHON", "SING_", "TORCH_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)} | variables
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd="/", env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory)


def build(tmp_path_factory: pytest.TempPathFactory, **variables: str) -> Path:
    """Built from a copy: a build leaves folders behind, and takes what an earlier one has compiled."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    skip = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "demo", "*.so", "*.pyd")
    shutil.copytree(ROOT, source, ignore=skip, dirs_exist_ok=True)
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", built)
    run(*command, source, **variables)
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes an environment with the wheel and one framework, or all of them; gives its interpreter."""
    made: dict[str, Path] = {}

    def make(frameworks: str) -> Path:
        if frameworks not in made:
            root = tmp_path_factory.mktemp(frameworks)
            run(sys.executable, "-m", "venv", "--without-pip", root / "venv")
            made[frameworks] = root / "venv" / "bin" / "python"
            (root / "packages").mkdir()
            wanted = set(FRAMEWORKS) if frameworks == "all" else {frameworks} | NEEDS.get(frameworks, set())
            link_packages(root / "packages", set(FRAMEWORKS) - wanted)
            site = run(made[frameworks], "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            Path(site, "packages.pth").write_text(f"{root / 'packages'}\n")
            pip = (sys.executable, "-m", "pip", "--python", made[frameworks])
            run(*pip, "install", "--no-deps", "--no-index", wheel)
        return made[frameworks]

    return make


def link_packages(folder: Path, left_out: set[str]) -> None:
    """Link every installed package but ours and those of some frameworks."""
    hidden = set()
    for name in ["sing-plugins", *(d for framework in left_out for d in FRAMEWORKS[framework].distributions)]:
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        hidden |= {file.parts[0] for file in files}
    for site in dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")):
        for entry in Path(site).iterdir():
            if entry.name not in hidden | PACKAGES and "sing_plugins" not in entry.name and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)


def test_the_wheel_holds_our_packages_whole_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES
    for folder in (ROOT, ROOT / "integrations"):
        for package in PACKAGES:
            for file in (folder / package).rglob("*.py"):
                assert file.relative_to(folder).as_posix() in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]  # one for every Python and every torch
    assert sum(name.startswith("sing_plugins/kernels/_cpu.") and name.endswith((".so", ".pyd")) for name in names) == 1


def test_the_wheel_says_what_it_needs_and_how_it_is_started(wheel: Path) -> None:
    files = {name.partition(".dist-info/")[2]: name for name in zipfile.ZipFile(wheel).namelist()}
    about = Parser().parsestr(zipfile.ZipFile(wheel).read(files["METADATA"]).decode())
    assert about["Requires-Python"] == ">=3.10"
    always = [need for need in about.get_all("Requires-Dist") if "extra ==" not in need]
    assert [need.partition(">")[0] for need in always] == ["torch"]
    assert {*FRAMEWORKS, "recipes", "dev", "all"} <= set(about.get_all("Provides-Extra"))
    entries = zipfile.ZipFile(wheel).read(files["entry_points.txt"]).decode().split("\n")
    assert {"sing_plugins = sing_torch_entry_point:install", "sing-plugins = sing_plugins.cli:main"} <= set(entries)


# What a user's script says and our name is not in it, but for Accelerate, which has no names.
BY_NAME = {
    "transformers": """
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
example = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1}
arguments = TrainingArguments(FOLDER, optim="sing_adamw", learning_rate=0.01, max_steps=3, report_to=[],
    save_strategy="no", use_cpu=True, disable_tqdm=True)
Trainer(BertForSequenceClassification(config), arguments, train_dataset=[example] * 8).train()
""",
    "timm": """
import timm
from timm.optim import create_optimizer_v2
model = timm.create_model("test_vit")
optimizer = create_optimizer_v2(model, opt="sing_adamw", lr=0.01)
for _ in range(3):
    model(torch.randn(2, 3, 160, 160)).square().mean().backward()
    optimizer.step()
""",
    "fairseq": """
import sys
from fairseq_cli.train import cli_main
sys.argv[1:] = (
    "--task dummy_lm --tokens-per-sample 8 --dict-size 49 --dataset-size 32 --arch transformer_lm "
    "--decoder-embed-dim 8 --decoder-ffn-embed-dim 8 --decoder-layers 1 --decoder-attention-heads 2 --batch-size 4 "
    "--optimizer sing --lr 0.01 --max-update 3 --cpu --no-save --disable-validation --num-workers 0"
).split()
cli_main()
""",
    "accelerate": """
from accelerate import Accelerator
from sing_accelerate import create_optimizer
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(3, 2)
optimizer = create_optimizer(accelerator, model, "sing_adamw", lr=0.01)
model, optimizer = accelerator.prepare(model, optimizer)
for _ in range(3):
    accelerator.backward(model(torch.randn(4, 3)).square().mean())
    optimizer.step()
""",
}

AROUND = """
import sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
FOLDER = {folder!r}
steps = []
register_optimizer_step_post_hook(lambda optimizer, *_: steps.append(type(optimizer)))
{script}
assert [step.__module__ + "." + step.__name__ for step in steps] == ["sing_plugins.optimizer.SING"] * 3, steps
import sing_plugins
assert sing_plugins.__file__.startswith(sys.prefix), sing_plugins.__file__
others = {others!r}
assert not any(name.partition(".")[0] in others for name in sys.modules), others
"""


@pytest.mark.parametrize("framework", BY_NAME)
def test_each_framework_trains_by_name_without_the_other_three(
    framework: str, environment: Callable[[str], Path], tmp_path: Path
) -> None:
    python = environment(framework)
    others = set(FRAMEWORKS) - {framework} - NEEDS.get(framework, set())
    run(python, "-c", AROUND.format(folder=str(tmp_path), script=BY_NAME[framework], others=others))
    status, _, kernel = run(python.with_name("sing-plugins"), "status").partition("\n\n")
    assert kernel.startswith("compiled kernel: yes")
    table = {line.split()[0]: line for line in status.splitlines()}
    assert {name for name in FRAMEWORKS if "not installed" in table[name]} == others


def test_with_all_frameworks_every_name_is_known_with_no_import_of_ours(environment: Callable[[str], Path]) -> None:
    python = environment("all")
    run(
        python,
        "-W",
        "error::RuntimeWarning",
        "-c",
        "import timm.optim, transformers, fairseq.options, accelerate\n"
        "transformers.TrainingArguments('/nowhere', optim='sing_adamw')\n"
        "assert {'sing_adamw', 'sing_lamb'} <= set(timm.optim.list_optimizers('sing*'))",
    )
    _, _, choices = run(python, "-m", "fairseq_cli.train", "--help").partition("--optimizer {")
    assert "sing" in choices.partition("}")[0].split(",")
    table, _, _ = run(python.with_name("sing-plugins"), "status").partition("\n\n")
    assert [line.split()[3] for line in table.splitlines()] == ["active", *["yes"] * 4]


def test_the_kernel_of_the_wheel_gives_what_the_loop_gives(environment: Callable[[str], Path], tmp_path: Path) -> None:
    for file in ("test_kernels.py", "layouts.py", "reference.py"):
        shutil.copy(ROOT / "tests" / file, tmp_path)
    chosen = ("-k", "every_layout or threads or bounds", "-p", "no:cacheprovider", "-p", "no:xdist", tmp_path)
    out = run(environment("all"), "-m", "pytest", "-q", *chosen)
    assert " passed" in out
    assert "skipped" not in out


def test_without_a_compiler_the_installation_works_and_says_what_is_missing(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    wheel = build(tmp_path_factory, CC="false")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path)
    run(*pip, wheel)
    train = (
        "import torch, sing_plugins\n"
        "weight = torch.nn.Parameter(torch.ones(3, 2))\n"
        "weight.grad = torch.rand(3, 2)\n"
        "sing_plugins.SING([weight]).step()\n"
        "assert not torch.equal(weight, torch.ones(3, 2))\n"
        "print(sing_plugins.__file__)"
    )
    assert run(sys.executable, "-c", train, PYTHONPATH=str(tmp_path)).startswith(str(tmp_path))
    status = run(sys.executable, "-m", "sing_plugins", "status", PYTHONPATH=str(tmp_path))
    assert "compiled kernel: no, it was not compiled: reinstall sing-plugins where there is a C compiler" in status
