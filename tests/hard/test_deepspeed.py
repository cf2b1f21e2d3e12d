"""DeepSpeed, really: ZeRO stage 0 is plain training; what flattens is refused before anything has changed."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sing_accelerate
from sing_plugins import SING, wrap

STEPS = 10
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
Create = Callable[[Any], Optimizer]
CREATE: dict[str, Create] = {
    "adamw": lambda params: SING(params, **OPTIONS),
    "sgd": lambda params: SING(params, host="sgd", **OPTIONS),
    "no norm": lambda params: SING(params, normalize=False, **OPTIONS),
    "two groups": lambda params: SING([{"params": list(params)}, {"params": [], "weight_decay": 0.0}], **OPTIONS),
    "wrapped": lambda params: wrap(torch.optim.Adam(params, lr=0.05)),
}
BF16 = {"bf16": {"enabled": True}}
FLAT: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"zero_optimization": {"stage": stage}} for stage in (1, 2, 3)},
    **{f"bf16, stage {stage}": {**BF16, "zero_optimization": {"stage": stage}} for stage in (1, 2, 3)},
    "bf16 added up in float32": {
        **{**BF16, "data_types": {"grad_accum_dtype": "fp32"}},  # brings BF16_Optimizer
        "zero_optimization": {"stage": 1},
    },
    "offloaded": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
}


def stepped(optimizer: Optimizer) -> Optimizer:
    """After a first step: whoever flattens may come late."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    return optimizer


def loaded(optimizer: Optimizer) -> Optimizer:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


BEFORE: dict[str, Callable[[Optimizer], Optimizer]] = {
    "made": lambda optimizer: optimizer,
    "loaded": loaded,
    "stepped": stepped,
}


# --- in pytest


@pytest.fixture(scope="module")
def reports_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    @cache
    def run(count: int) -> tuple[Path, list[int], list[str]]:
        directory = tmp_path_factory.mktemp("deepspeed")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(directory)],
                env={
                    **os.environ,
                    **{name: str(value) for name, value in shared.items()},
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
                    "PYTHONPATH": os.pathsep.join(sys.path),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        logs = [process.communicate(timeout=600)[0] for process in processes]
        return directory, [process.returncode for process in processes], logs

    def reports(count: int) -> list[dict[str, Any]]:
        directory, codes, logs = run(count)
        assert codes == [0] * count, logs
        return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(count)]

    return reports


Reports = Callable[[int], list[dict[str, Any]]]


@pytest.mark.parametrize("kind", CREATE)
def test_stage_0_equals_plain_training(kind: str, reports_of: Reports) -> None:
    assert [report[f"stage 0, {kind}"] for report in reports_of(1)] == [0.0]
    for report in reports_of(2):
        assert report[f"stage 0, {kind}"] < 1e-6  # the mean of two gradients in float32


def test_the_clipping_that_deepspeed_does_unasked_changes_nothing(reports_of: Reports) -> None:
    (report,) = reports_of(1)
    assert report["clipped"] < 1e-6
    assert report["clipped, no norm"] > 1e-3  # it does clip


def test_bf16_at_stage_0_equals_master_weights_after_a_step_with_zero_gradients(reports_of: Reports) -> None:
    """DeepSpeed makes that step when it starts, whatever the optimizer is."""
    (report,) = reports_of(1)
    assert report["bf16, stage 0"] == 0.0
    assert report["bf16, stage 0, without that step"] > 1e-3


def test_bf16_at_stage_0_takes_an_optimizer_that_has_frozen_parameters(reports_of: Reports) -> None:
    """DeepSpeed leaves them out of its copies in float32."""
    (report,) = reports_of(1)
    assert report["bf16, stage 0, frozen"] == ["trained", 0.0]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("config", FLAT)
def test_what_flattens_is_refused_before_the_first_update(
    config: str, before: str, processes: int, reports_of: Reports
) -> None:
    for report in reports_of(processes):
        for kind in ("adamw", "wrapped"):
            said, moved = report[f"{config}, {before}, {kind}"]
            assert said.startswith("SING needs whole tensors"), said
            assert ("DeepSpeed ZeRO-3" if "stage 3" in config else "DeepSpeed ZeRO-1/2") in said
            assert "Use DDP, FSDP2 (fully_shard" in said
            assert "DeepSpeed's ZeRO stage 0" in said
            assert moved == 0.0


def test_a_copy_that_gets_the_partition_is_refused(reports_of: Reports) -> None:
    (report,) = reports_of(1)
    for what in ("copied", "loaded", "with one group more"):
        assert report[what].startswith("SING needs whole tensors"), report[what]


def test_the_flat_optimizer_for_low_precision_is_refused_when_it_is_made(reports_of: Reports) -> None:
    """DeepSpeed makes one of its own fused Adams only, but whoever calls it can."""
    (report,) = reports_of(1)
    assert report["FP16_Optimizer"].startswith("SING needs whole tensors"), report["FP16_Optimizer"]


def test_accelerate_with_deepspeed(reports_of: Reports) -> None:
    (report,) = reports_of(1)
    assert report["accelerate, stage 0"] == 0.0
    for stage in (1, 2, 3):
        assert report[f"accelerate, stage {stage}"].startswith("Invalid accelerator: it uses DeepSpeed ZeRO")


# --- in processes with DeepSpeed


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)


def loss_of(model: nn.Module, step: int, rank: int = 0, world: int = 1) -> Tensor:
    dtype = next(model.parameters()).dtype
    x, y = (part.chunk(world)[rank].to(dtype) for part in batch(step))
    return (model(x) - y).square().mean()


def plain(create: Create) -> nn.Module:
    model = net()
    optimizer = create(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    return max((a.detach().float() - b.detach().float()).abs().max().item() for a, b in zip(first, second, strict=True))


def engine_of(model: nn.Module, optimizer: Optimizer, **config: Any) -> Any:
    import deepspeed

    # As Accelerate and Trainer do it, so that nobody but the optimizer refuses. Left out, clipping is at 1.
    config = {"train_batch_size": 8, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0, **config}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def train(engine: Any, steps: int = STEPS) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for step in range(steps):
        engine.backward(loss_of(engine, step, rank, world))
        engine.step()


def from_plain(create: Create, **config: Any) -> float:
    model = net()
    train(engine_of(model, create(model.parameters()), **config))
    return difference(list(model.parameters()), list(plain(create).parameters()))


def from_master_weights(zero_step: bool) -> float:
    """bfloat16 at stage 0, from what it does written out."""
    model = net()
    optimizer = CREATE["adamw"](model.parameters())
    train(engine_of(model, optimizer, **BF16))
    low = net(torch.bfloat16)
    master = [nn.Parameter(param.detach().float()) for param in low.parameters()]
    plain = CREATE["adamw"](master)
    if zero_step:
        stepped(plain)
    for step in range(STEPS):
        low.zero_grad()
        loss_of(low, step).backward()
        for own, param in zip(master, low.parameters(), strict=True):
            own.grad = param.grad.float()
        plain.step()
        with torch.no_grad():
            for own, param in zip(master, low.parameters(), strict=True):
                param.copy_(own)
    return difference(optimizer.param_groups[0]["params"], master)


def with_frozen(params: Iterable[nn.Parameter]) -> Optimizer:
    frozen, *others = params
    return SING([frozen.requires_grad_(False), *others], **OPTIONS)


def refusal(config: dict[str, Any], create: Create, before: Callable[[Optimizer], Optimizer]) -> tuple[str, float]:
    """What is said, and how far the weights have moved."""
    import deepspeed

    model = net()
    optimizer = before(create(model.parameters()))
    weights = [param.detach().clone().to(torch.bfloat16 if "bf16" in config else None) for param in model.parameters()]
    try:
        train(engine_of(model, optimizer, **config), steps=1)
    except RuntimeError as error:
        with deepspeed.zero.GatheredParameters([param for param in model.parameters() if hasattr(param, "ds_id")]):
            return str(error), difference(list(model.parameters()), weights)
    return "trained", 0.0


def refusal_of_what_became_of(change: Callable[[Optimizer], Optimizer]) -> str:
    """The optimizer in an engine, changed, makes a step."""
    model = net()
    optimizer = CREATE["adamw"](model.parameters())
    engine_of(model, optimizer, zero_optimization={"stage": 1})
    changed = change(optimizer)
    try:
        stepped(changed)
    except RuntimeError as error:
        return str(error)
    return "trained"


def one_group_more(optimizer: Optimizer) -> Optimizer:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    return optimizer


def flat_low_precision() -> str:
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    try:
        FP16_Optimizer(CREATE["adamw"](net(torch.bfloat16).parameters()), low_precision_dtype=torch.bfloat16)
    except RuntimeError as error:
        return str(error)
    return "made"


def with_accelerate(stage: int) -> float | str:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DeepSpeedPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    # With cpu=True Accelerate would pass over the plugin.
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = net()
    try:
        optimizer = sing_accelerate.create_optimizer(accelerator, model, freeze="none", decay_all=True, **OPTIONS)
    except ValueError as error:
        return str(error)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert type(prepared).__name__ == "DeepSpeedEngine"
    for step in range(STEPS):
        accelerator.backward(loss_of(prepared, step))
        optimizer.step()
        optimizer.zero_grad()
    return difference(
        list(model.parameters()), list(plain(lambda params: SING(params, decay_all=True, **OPTIONS)).parameters())
    )


def main(directory: Path) -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    report: dict[str, Any] = {f"stage 0, {kind}": from_plain(create) for kind, create in CREATE.items()}
    report |= {
        f"{name}, {before}, {kind}": refusal(config, CREATE[kind], change)
        for name, config in FLAT.items()
        for before, change in BEFORE.items()
        for kind in ("adamw", "wrapped")
    }
    if os.environ["WORLD_SIZE"] == "1":
        report["clipped"] = from_plain(CREATE["adamw"], gradient_clipping=1.0)
        report["clipped, no norm"] = from_plain(CREATE["no norm"], gradient_clipping=1.0)
        report["bf16, stage 0"] = from_master_weights(zero_step=True)
        report["bf16, stage 0, without that step"] = from_master_weights(zero_step=False)
        report["bf16, stage 0, frozen"] = refusal(BF16, with_frozen, BEFORE["made"])
        report["copied"] = refusal_of_what_became_of(copy.deepcopy)
        report["loaded"] = refusal_of_what_became_of(loaded)
        report["with one group more"] = refusal_of_what_became_of(one_group_more)
        report["FP16_Optimizer"] = flat_low_precision()
        report |= {f"accelerate, stage {stage}": with_accelerate(stage) for stage in (0, 1, 2, 3)}
    (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
