"""What two gloo processes run for test_distributed: each scenario raises if it is not as one process would be."""

from __future__ import annotations

import copy
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

from sing_plugins import SING, wrap
from sing_plugins.standardize import standardize

STEPS = 12
SCENARIOS: dict[str, Callable[[], None]] = {}
Create = Callable[[Any], Optimizer]


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


class Net(nn.Module):
    """Has tensors with fewer rows than there are processes, with rows of one element, and without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(6, 1)
        self.column = nn.Parameter(torch.randn(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.column.squeeze(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(8, 4, generator=generator, dtype=torch.float64),
        torch.randn(8, 1, generator=generator, dtype=torch.float64),
    )


def run(model: nn.Module, optimizer: Optimizer, steps: range, split: bool) -> None:
    """Train; with ``split`` every process takes its share of the batch."""
    for step in steps:
        x, y = batch(step)
        if split:
            x, y = x.chunk(dist.get_world_size())[dist.get_rank()], y.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def alone(create: Create) -> dict[str, Tensor]:
    model = net()
    run(model, create(model.parameters()), range(STEPS), split=False)
    return {name: param.detach() for name, param in model.named_parameters()}


def assert_as_alone(model: nn.Module, create: Create) -> None:
    expected = alone(create)
    for name, param in model.named_parameters():
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        torch.testing.assert_close(whole.detach(), expected[name.removeprefix("module.")], rtol=1e-12, atol=1e-12)


NATIVE = functools.partial(SING, lr=0.05, weight_decay=0.1)


@scenario
def ddp() -> None:
    model = nn.parallel.DistributedDataParallel(net())
    run(model, NATIVE(model.parameters()), range(STEPS), split=True)
    assert_as_alone(model, NATIVE)


@scenario
def zero_redundancy_optimizer() -> None:
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=SING, lr=0.05, weight_decay=0.1)
    run(model, optimizer, range(STEPS), split=True)
    assert_as_alone(model, NATIVE)


def sharded(mesh: Any = None) -> Net:
    model = net()
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    return model


@scenario
def fsdp2() -> None:
    for host in ("adamw", "adabelief", "sgd", "adafactor"):
        for foreach in (True, False):
            create = functools.partial(NATIVE, host=host, foreach=foreach)
            model = sharded(init_device_mesh("cpu", (2,)))
            run(model, create(model.parameters()), range(STEPS), split=True)
            assert_as_alone(model, create)


@scenario
def fsdp2_gradients_whose_squares_overflow() -> None:
    """In float32 the norm would be infinite and the update zero."""
    mesh, whole = init_device_mesh("cpu", (2,)), torch.rand(5, 3, dtype=torch.float64) + 0.1
    (expected,) = standardize([whole])
    (shard,) = standardize([distribute_tensor((whole * 1e25).float(), mesh)])
    torch.testing.assert_close(shard.full_tensor().double(), expected, rtol=1e-5, atol=1e-6)


@scenario
def fsdp2_with_an_older_torch() -> None:
    """Where its arithmetic on sharded tensors was not tested, SING refuses it."""
    model, version = sharded(init_device_mesh("cpu", (2,))), torch.__version__
    try:
        torch.__version__ = "2.9.1+cpu"  # type: ignore[assignment]
        run(model, NATIVE(model.parameters()), range(1), split=True)
    except RuntimeError as error:
        assert "torch 2.14 and later, but torch 2.9.1+cpu is installed" in str(error), error
    else:
        raise AssertionError("trained with an untested torch")
    finally:
        torch.__version__ = version


@scenario
def fsdp2_swapped_after_construction() -> None:
    """As Accelerate does it: the optimizer exists before the model is sharded, then gets the new parameters."""
    model = net()
    optimizer = NATIVE(model.parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    run(model, optimizer, range(STEPS), split=True)
    assert_as_alone(model, NATIVE)


@scenario
def hsdp() -> None:
    model = sharded(init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    run(model, NATIVE(model.parameters()), range(STEPS), split=True)
    assert_as_alone(model, NATIVE)


def wrapped_adam(params: Any) -> Optimizer:
    return wrap(torch.optim.Adam(params, lr=0.05))


@scenario
def fsdp2_wrapped() -> None:
    model = sharded(init_device_mesh("cpu", (2,)))
    run(model, wrapped_adam(model.parameters()), range(STEPS), split=True)
    assert_as_alone(model, wrapped_adam)


@scenario
def fsdp2_resume() -> None:
    """Through torch's distributed state dict, in the middle of a Lookahead cycle."""
    mesh = init_device_mesh("cpu", (2,))
    for create in (NATIVE, wrapped_adam):
        model = sharded(mesh)
        optimizer = create(model.parameters())
        run(model, optimizer, range(7), split=True)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        resumed = sharded(mesh)
        with torch.no_grad():
            for theirs, ours in zip(resumed.parameters(), model.parameters(), strict=True):
                theirs.copy_(ours)
        resumed_optimizer = create(resumed.parameters())
        set_optimizer_state_dict(resumed, resumed_optimizer, saved)
        run(resumed, resumed_optimizer, range(7, STEPS), split=True)
        assert_as_alone(resumed, create)


@scenario
def tensor_parallel() -> None:
    model = net()
    # the bare parameter between the two layers is whole, so the first layer's output is gathered
    plan = {"first": ColwiseParallel(output_layouts=Replicate()), "last": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    assert isinstance(model.first.weight, DTensor)
    for foreach in (True, False):
        create = functools.partial(NATIVE, foreach=foreach)
        twin = copy.deepcopy(model)
        run(twin, create(twin.parameters()), range(STEPS), split=False)
        assert_as_alone(twin, create)


def fsdp1(**options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(net(), device_id=torch.device("cpu"), **options)


def assert_refused(model: nn.Module) -> None:
    before = [param.detach().clone() for param in model.parameters()]
    for create in (NATIVE, wrapped_adam):
        try:
            run(model, create(model.parameters()), range(1), split=True)
        except RuntimeError as error:
            assert "SING needs whole tensors" in str(error), error
            assert "FSDP1" in str(error), error
        else:
            raise AssertionError("trained on flat pieces")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@scenario
def fsdp1_original_parameters() -> None:
    assert_refused(fsdp1(use_orig_params=True))


@scenario
def fsdp1_flat_parameters() -> None:
    assert_refused(fsdp1(use_orig_params=False))


@scenario
def fsdp1_no_shard() -> None:
    model = fsdp1(use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD)
    run(model, NATIVE(model.parameters()), range(STEPS), split=True)
    expected = alone(NATIVE)
    for name, param in model.named_parameters():
        name = name.replace("_fsdp_wrapped_module.", "")
        torch.testing.assert_close(param.detach(), expected[name], rtol=1e-12, atol=1e-12)


def main(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    outcomes = {}
    for name, function in SCENARIOS.items():
        try:
            function()
            outcomes[name] = "as alone"
        except Exception:
            outcomes[name] = traceback.format_exc()
    Path(directory, f"rank{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
