"""SING in Accelerate, in one process and in two, on scikit-learn's digits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import sing_accelerate
import sing_plugins
from sing_plugins import SING
from sing_plugins.autoload import status

OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.05}
NAMES = ("sing_adamw", "sing_sgd", "sing_radam")


def new_accelerator(**options: Any) -> Accelerator:
    """A first Accelerator, as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator() -> Accelerator:
    return new_accelerator()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 10)).double()


def digits() -> TensorDataset:
    data = load_digits()
    return TensorDataset(torch.tensor(data.data[:192]) / 16, torch.tensor(data.target[:192]))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train_by_hand(name: str, steps: int) -> nn.Module:
    """The same training without Accelerate."""
    model = net()
    optimizer = sing_plugins.create_optimizer(model, name, **OPTIONS)
    batches = list(DataLoader(digits(), batch_size=16))
    for batch in batches[:steps]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def difference(first: nn.Module, second: nn.Module) -> float:
    return max((a - b).abs().max().item() for a, b in zip(weights(first), weights(second), strict=True))


class Job:
    """A training with everything prepared: model, optimizer, learning-rate schedule and data."""

    def __init__(
        self, accelerator: Accelerator, name: str = "sing_adamw", batch_size: int = 16, **options: Any
    ) -> None:
        self.accelerator = accelerator
        model = net()
        optimizer = sing_accelerate.create_optimizer(accelerator, model, name, **OPTIONS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        loader = DataLoader(digits(), batch_size=batch_size)
        self.model, self.optimizer, self.schedule, self.loader = accelerator.prepare(model, optimizer, schedule, loader)

    def train(self, first: int, last: int, *, clip: float | None = None, scheduled: bool = False) -> Job:
        for step, batch in enumerate(self.loader):
            if not first <= step < last:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, batch))
                if clip is not None and self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    assert norm > clip  # it does clip
                self.optimizer.step()
                if scheduled:
                    self.schedule.step()
                self.optimizer.zero_grad()
        return self


# --- one process


@pytest.mark.parametrize("name", NAMES)
def test_training_equals_a_loop_without_accelerate(accelerator: Accelerator, name: str) -> None:
    job = Job(accelerator, name).train(0, 12)
    assert difference(job.model, train_by_hand(name, 12)) == 0.0
    assert difference(job.model, net()) > 0.01


def test_the_optimizer_has_the_name_that_was_asked_for(accelerator: Accelerator) -> None:
    assert type(sing_accelerate.create_optimizer(accelerator, net())) is SING
    assert sing_accelerate.create_optimizer(accelerator, net(), "SING_SGD", momentum="0.5").host == "sgd"  # type: ignore[attr-defined]
    wrapped = sing_accelerate.create_optimizer(accelerator, net(), "sing_rmsprop", lr=0.1, lookahead_k="none")
    assert type(wrapped.host) is torch.optim.RMSprop  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"Unknown optimizer 'sing_admw'\. Valid: sing, .*sing_radam"):
        sing_accelerate.create_optimizer(accelerator, net(), "sing_admw")


def test_layernorm_is_frozen_and_weights_are_decayed(accelerator: Accelerator) -> None:
    model = net()
    optimizer = sing_accelerate.create_optimizer(accelerator, model, **OPTIONS, no_weight_decay=["3.weight"])
    assert [name for name, param in model.named_parameters() if not param.requires_grad] == ["1.weight", "1.bias"]
    rates = {param: group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    assert {name: rates[param] for name, param in model.named_parameters() if param in rates} == {
        **{"0.weight": 0.05, "0.bias": 0.0},
        **{"3.weight": 0.0, "3.bias": 0.0},
    }


@pytest.mark.parametrize("name", ["sing_adamw", "sing_radam"])
def test_decay_all_and_no_freezing(accelerator: Accelerator, name: str) -> None:
    optimizer = sing_accelerate.create_optimizer(accelerator, net(), name, freeze="none", decay_all=True, **OPTIONS)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(6, 0.05)]


def test_a_bad_option_raises_before_the_model_is_touched(accelerator: Accelerator) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"Unknown option 'lookahedk' of sing_adamw\. Valid: .*lookahead_k"):
        sing_accelerate.create_optimizer(accelerator, model, lookahedk=3)
    with pytest.raises(ValueError, match=r"Invalid lr: -1"):
        sing_accelerate.create_optimizer(accelerator, model, lr=-1.0)
    assert all(param.requires_grad for param in model.parameters())


def test_prepare_makes_no_state_and_keeps_the_parameters(accelerator: Accelerator) -> None:
    job = Job(accelerator)
    assert not job.optimizer.state  # FSDP2 swaps the parameters in the groups: earlier state would be orphaned
    held = {id(param) for group in job.optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for param in job.model.parameters() if param.requires_grad}


def test_accumulated_gradients_are_one_step_of_lookahead() -> None:
    job = Job(new_accelerator(gradient_accumulation_steps=2), batch_size=8).train(0, 24)
    assert difference(job.model, train_by_hand("sing_adamw", 12)) < 1e-12
    assert job.optimizer.param_groups[0]["lookahead_step"] == 12 % 5


def test_clipping_has_no_effect(accelerator: Accelerator) -> None:
    job = Job(accelerator).train(0, 12, clip=1e-2)
    assert difference(job.model, train_by_hand("sing_adamw", 12)) < 1e-5


def test_a_prepared_schedule_sets_the_learning_rate(accelerator: Accelerator) -> None:
    job = Job(accelerator).train(0, 3, scheduled=True)
    assert [group["lr"] for group in job.optimizer.param_groups] == pytest.approx([0.02 * 0.9**3] * 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("done", range(1, 7))  # inside, at and after a Lookahead merge
def test_load_state_continues_exactly_at_every_phase_of_lookahead(name: str, done: int, tmp_path: Path) -> None:
    job = Job(new_accelerator(), name).train(0, done, scheduled=True)
    job.accelerator.save_state(str(tmp_path))
    job.train(done, 12, scheduled=True)

    resumed = Job(new_accelerator(), name)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(done, 12, scheduled=True)
    assert difference(job.model, resumed.model) == 0.0
    assert difference(job.model, Job(new_accelerator(), name).train(done, 12, scheduled=True).model) > 0.0


def test_sync_lookahead_finds_the_optimizer_in_a_prepared_one(accelerator: Accelerator) -> None:
    model = net()
    optimizer = accelerator.prepare(sing_accelerate.create_optimizer(accelerator, model, lr=0.1))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert any("lookahead_params" in state for state in optimizer.state.values())
    sing_plugins.sync_lookahead(optimizer)
    assert not any("lookahead_params" in state for state in optimizer.state.values())


def test_a_learning_rate_like_adamws_is_hinted_at(accelerator: Accelerator, caplog: pytest.LogCaptureFixture) -> None:
    sing_accelerate.create_optimizer(accelerator, net(), lr=1e-3)
    assert "lr=0.001 looks like a learning rate of AdamW" in caplog.text


# --- refused


def test_arguments_of_another_type(accelerator: Accelerator) -> None:
    with pytest.raises(TypeError, match=r"Invalid accelerator: Sequential\. Accepted: an accelerate\.Accelerator"):
        sing_accelerate.create_optimizer(net(), accelerator)
    with pytest.raises(TypeError, match=r"Invalid model: list\. Accepted: a torch\.nn\.Module"):
        sing_accelerate.create_optimizer(accelerator, list(net().parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prepare", [lambda a, model: a.prepare(model), lambda a, model: a.prepare_model(model)], ids=["prepare", "one"]
)
def test_a_prepared_model_is_refused(accelerator: Accelerator, prepare: Callable[..., nn.Module]) -> None:
    model = net()
    prepared = prepare(accelerator, model)
    for late in (prepared, model, accelerator.unwrap_model(prepared)):
        with pytest.raises(ValueError, match=r"Invalid model: Sequential has been prepared\..* first, then"):
            sing_accelerate.create_optimizer(accelerator, late)
    assert all(param.requires_grad for param in model.parameters())
    sing_accelerate.create_optimizer(accelerator, net())  # a second model is no problem


def fsdp_plugin(version: int, **options: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=version, **options)


def ds_config(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, "train_batch_size": "auto", "gradient_accumulation_steps": 1}


def use_plugin(accelerator: Accelerator, kind: DistributedType, plugin: Any) -> None:
    """What Accelerate's constructor does where there is a GPU; without one it ignores the plugin, silently."""
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = kind
    if kind == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugins = {"default": plugin}
        plugin._selected = True  # what its select() does where DeepSpeed is installed
    else:
        accelerator.state.fsdp_plugin = plugin


@pytest.mark.parametrize(
    ("kind", "plugin", "what"),
    [
        *((DistributedType.DEEPSPEED, partial(DeepSpeedPlugin, zero_stage=n), "DeepSpeed ZeRO") for n in (1, 2, 3)),
        (DistributedType.DEEPSPEED, lambda: DeepSpeedPlugin(zero_stage=0), None),
        (DistributedType.DEEPSPEED, lambda: DeepSpeedPlugin(hf_ds_config=ds_config(3)), "DeepSpeed ZeRO"),
        (DistributedType.DEEPSPEED, lambda: DeepSpeedPlugin(hf_ds_config=ds_config(0)), None),
        (DistributedType.MEGATRON_LM, lambda: None, "Megatron-LM"),
        (DistributedType.FSDP, lambda: fsdp_plugin(1), "FSDP1"),
        (DistributedType.FSDP, lambda: fsdp_plugin(1, use_orig_params=True), "FSDP1"),
        (DistributedType.FSDP, lambda: fsdp_plugin(1, sharding_strategy="NO_SHARD"), "FSDP1"),
        (DistributedType.FSDP, lambda: fsdp_plugin(1, sharding_strategy="NO_SHARD", use_orig_params=True), None),
        (DistributedType.FSDP, lambda: fsdp_plugin(2), None),
    ],
)
def test_what_flattens_the_parameters_is_refused_before_training(
    accelerator: Accelerator, kind: DistributedType, plugin: Callable[[], Any], what: str | None
) -> None:
    use_plugin(accelerator, kind, plugin())
    model = net()
    if what is None:
        sing_accelerate.create_optimizer(accelerator, model)
        return
    with pytest.raises(ValueError, match=rf"Invalid accelerator: it uses {what}.* FSDP2: .*fsdp_version=2"):
        sing_accelerate.create_optimizer(accelerator, model)
    assert all(param.requires_grad for param in model.parameters())


def test_there_is_nothing_to_enable_or_disable() -> None:
    sing_plugins.disable("accelerate")
    sing_plugins.enable("accelerate")
    told = {each.framework: each for each in status()}["accelerate"]
    assert told.active
    assert "import sing_accelerate" in told.why


# --- two processes: what follows `if __name__` runs in each of them


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes reports. `accelerate launch --cpu --num_processes 2` would start only one."""
    directory = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    result = subprocess.run(
        [*command, str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def test_there_are_two_processes(two_processes: list[dict[str, Any]]) -> None:
    assert [report["world"] for report in two_processes] == [[2, "MULTI_CPU", "DistributedDataParallel"]] * 2


@pytest.mark.parametrize("name", NAMES)
def test_ddp_in_two_processes_equals_one_process(two_processes: list[dict[str, Any]], name: str) -> None:
    for report in two_processes:
        assert report[f"ddp {name}"] < 1e-12


def test_load_state_in_two_processes_continues_exactly(two_processes: list[dict[str, Any]]) -> None:
    assert [report["resume"] for report in two_processes] == [0.0, 0.0]


FSDP2: dict[str, tuple[dict[str, Any], float]] = {  # with how far it may be from one process
    "sharded checkpoint": ({}, 1e-12),
    "full_checkpoint": ({"checkpoint": "FULL_STATE_DICT"}, 1e-12),
    "accumulated": ({"pieces": 2}, 1e-12),
    "clipped": ({"clip": 1e-2}, 1e-5),  # eps counts for more
}


@pytest.mark.parametrize("how", FSDP2)
def test_fsdp2_in_two_processes_equals_one_process(two_processes: list[dict[str, Any]], how: str) -> None:
    for report in two_processes:
        kind, from_one_process, _ = report[f"fsdp2 {how}"]
        assert kind == "DTensor"
        assert from_one_process < FSDP2[how][1]


@pytest.mark.parametrize("how", FSDP2)
def test_fsdp2_resumes_through_accelerate(two_processes: list[dict[str, Any]], how: str) -> None:
    """Accelerate 1.6 does not, with torch's AdamW either: 0.08 apart."""
    assert [report[f"fsdp2 {how}"][2] for report in two_processes] == [0.0, 0.0]


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"])
def test_a_wrapped_model_is_refused(two_processes: list[dict[str, Any]], wrapper: str) -> None:
    for report in two_processes:
        assert f"is wrapped in {wrapper}. Accepted: the model as it was constructed" in report[wrapper]


def ddp(name: str) -> float:
    job = Job(new_accelerator(), name, batch_size=8).train(0, 12)
    return difference(job.accelerator.unwrap_model(job.model), train_by_hand(name, 12))


def resume(directory: Path) -> float:
    job = Job(new_accelerator(), batch_size=8).train(0, 3)
    job.accelerator.save_state(str(directory / "state"))
    job.train(3, 12)
    resumed = Job(new_accelerator(), batch_size=8)
    resumed.accelerator.load_state(str(directory / "state"))
    return difference(job.model, resumed.train(3, 12).model)


def fsdp2(
    directory: Path, checkpoint: str = "SHARDED_STATE_DICT", pieces: int = 1, clip: float | None = None
) -> tuple[str, float, float]:
    def job() -> Job:
        accelerator = new_accelerator(gradient_accumulation_steps=pieces)
        use_plugin(accelerator, DistributedType.FSDP, fsdp_plugin(2, state_dict_type=checkpoint))
        return Job(accelerator, batch_size=8 // pieces)

    half, end = 3 * pieces, 12 * pieces
    first = job().train(0, half, clip=clip)
    first.accelerator.save_state(str(directory))
    first.train(half, end, clip=clip)
    kind = type(first.optimizer.param_groups[0]["params"][0].data).__name__
    whole = net()
    whole.load_state_dict({name: value.full_tensor() for name, value in first.model.state_dict().items()})
    resumed = job()
    resumed.accelerator.load_state(str(directory))
    resumed.train(half, end, clip=clip)
    pairs = zip(first.model.parameters(), resumed.model.parameters(), strict=True)
    apart = max((a - b).abs().max().full_tensor().item() for a, b in pairs)  # type: ignore[attr-defined]
    return kind, difference(whole, train_by_hand("sing_adamw", 12)), apart


def refusal(wrapped: nn.Module) -> str:
    try:
        sing_accelerate.create_optimizer(new_accelerator(), wrapped)
    except ValueError as error:
        return str(error)
    return "accepted"


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    job = Job(new_accelerator())
    world = [job.accelerator.num_processes, job.accelerator.distributed_type.value, type(job.model).__name__]
    report: dict[str, Any] = {"world": world, "resume": resume(directory)}
    report |= {f"ddp {name}": ddp(name) for name in NAMES}
    report["DistributedDataParallel"] = refusal(DistributedDataParallel(net()))
    no_shard = FullyShardedDataParallel(
        net(), sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True, device_id=torch.device("cpu")
    )
    report["FullyShardedDataParallel"] = refusal(no_shard)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    report["FSDPModule"] = refusal(fully_shard(net(), mesh=mesh))
    for how, (options, _) in FSDP2.items():
        try:
            report[f"fsdp2 {how}"] = fsdp2(directory / how, **options)
        except ValueError as error:  # Accelerate 1.6 makes no full checkpoints
            report[f"fsdp2 {how}"] = str(error), math.inf, math.inf
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
