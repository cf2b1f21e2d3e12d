"""The Triton kernel: run by Triton's interpreter, compiled for devices that are not here, and on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sing_plugins import kernels
from sing_plugins.kernels import accelerator, cpu

pytest.importorskip("triton", reason="Triton, which the extra dev brings, has no wheels for this system")

SCENARIOS = Path(__file__).parent / "accelerator_scenarios.py"
TYPES = {
    "addresses": "*i64",
    "layout": "*i64",
    "tensor_of_unit": "*i32",
    "tensor_of_block": "*i32",
    "sums": "*fp64",
    "squares": "*fp64",
    "means": "*fp32",
    "table": "*fp32",
    "due": "*i32",
}
CUDA_KERNELS = [
    ("statistics", {"chunk": accelerator.UNIT}),
    (
        "factors",
        {
            **{"host": 0, "lr_is_there": False, "statistics_are_there": True},
            **{"relative": True, "normalize": True, "maximize": False},
        },
    ),
    (
        "factors",
        {
            **{"host": 2, "lr_is_there": True, "statistics_are_there": False},
            **{"relative": False, "normalize": False, "maximize": True},
        },
    ),
    ("update", {"host": 0, "softplus": True, "merge": 2, "block": accelerator.BLOCK}),
    ("update", {"host": 1, "softplus": True, "merge": 0, "block": accelerator.BLOCK}),
    ("update", {"host": 1, "softplus": False, "merge": 0, "block": accelerator.BLOCK}),
    ("update", {"host": 4, "softplus": False, "merge": 1, "block": accelerator.BLOCK}),
    ("update", {"host": -1, "softplus": False, "merge": 0, "block": accelerator.BLOCK}),
]


def run(*command: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout


def test_every_scenario_holds_in_the_interpreter() -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(SCENARIOS), TRITON_INTERPRET="1")


@pytest.mark.xfail(not torch.cuda.is_available(), reason="there is no CUDA device here", run=False)
def test_every_scenario_holds_on_a_device() -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(SCENARIOS))


@pytest.mark.parametrize(("name", "constants"), CUDA_KERNELS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_kernel_compiles_for_a_device_that_is_not_here(
    name: str, constants: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(accelerator._load(), name)
    lr = "*fp32" if constants.get("lr_is_there") else "fp32"
    types = {**TYPES, "lr": lr, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {name: types.get(name, "fp32") for name in kernel.arg_names}, constants)
    assert compiled(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]


def test_the_kernels_number_hosts_as_the_one_for_the_cpu_does() -> None:
    code = accelerator._load()
    numbers = [code._ADAMW, code._ADABELIEF, code._SGD, code._SGD_MOMENTUM, code._SGD_NESTEROV]
    assert [number.value for number in numbers] == [
        *(number for number, _ in cpu.HOSTS.values()),
        cpu._SGD_MOMENTUM,
        cpu._SGD_NESTEROV,
    ]
    assert code._NO_HOST.value == accelerator._NO_HOST == cpu._NO_HOST


def test_triton_is_not_imported_before_a_tensor_is_on_a_device() -> None:
    script = "import sys, torch; before = 'triton' in sys.modules; import sing_plugins; "
    run(
        "-c",
        script + "assert ('triton' in sys.modules) == before; assert 'sing_plugins.kernels._triton' not in sys.modules",
    )


def test_without_triton_there_is_no_kernel_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "_triton", raising=False)
    monkeypatch.setitem(sys.modules, "sing_plugins.kernels._triton", None)
    for cached in (accelerator._load, accelerator.missing, accelerator.missing_on, accelerator.library):
        monkeypatch.setattr(accelerator, cached.__name__, cached.__wrapped__)
    assert accelerator.missing().startswith("Triton cannot be imported: ")
    assert accelerator.missing_on(torch.device("cuda", 0)) == accelerator.missing()
    assert accelerator.library() is None


def test_a_device_that_cannot_run_the_kernel_has_none_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(accelerator.Kernel, "standardize", fails)
    reason = accelerator.missing_on.__wrapped__(torch.device("cpu"))
    assert reason == "Triton cannot be used on cpu: no C compiler"
