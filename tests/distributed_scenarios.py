"""What gloo processes run for test_distributed: each scenario raises if it is not as one process would be.

Some look at tensors cut in every way, others at what the engines make of a model.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

from sing_plugins import SING, wrap
from sing_plugins.standardize import standardize

STEPS = 20
CHECKPOINTS = Path()  # see main
deviation = 0.0
SCENARIOS: dict[str, Callable[[], None]] = {}
Create = Callable[[Any], Optimizer]


@functools.cache
def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache
def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("outer", "inner"))


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


def alone(create: Create, make: Callable[[], nn.Module] = net) -> dict[str, Tensor]:
    model = make()
    run(model, create(model.parameters()), range(STEPS), split=False)
    return {name: param.detach() for name, param in model.named_parameters()}


def assert_as_alone(model: nn.Module, create: Create, make: Callable[[], nn.Module] = net) -> None:
    expected = alone(create, make)
    for name, param in model.named_parameters():
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        assert_equal(whole.detach(), expected[name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")])


def assert_equal(value: Tensor, expected: Tensor) -> None:
    """To 1e-12; notes the largest deviation of this process's scenario."""
    global deviation
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    if value.numel():
        deviation = max(deviation, float((value - expected).abs().max()))


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
            model = sharded(line())
            run(model, create(model.parameters()), range(STEPS), split=True)
            assert_as_alone(model, create)


@scenario
def fsdp2_gradients_whose_squares_overflow() -> None:
    """In float32 the norm would be infinite and the update zero."""
    whole = torch.rand(5, 3, dtype=torch.float64) + 0.1
    param = nn.Parameter(distribute_tensor(torch.zeros(5, 3), line()))
    param.grad = distribute_tensor((whole * 1e25).float(), line())
    SING([param], lr=1.0, host="sgd", momentum=0.0).step()
    (expected,) = standardize([whole])
    torch.testing.assert_close(-param.full_tensor().double(), expected, rtol=1e-5, atol=1e-6)


@scenario
def fsdp2_swapped_after_construction() -> None:
    """As Accelerate does it: the optimizer exists before the model is sharded, then gets the new parameters."""
    model = net()
    optimizer = NATIVE(model.parameters())
    fully_shard(model, mesh=line())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    run(model, optimizer, range(STEPS), split=True)
    assert_as_alone(model, NATIVE)


@scenario
def hsdp() -> None:
    model = sharded(grid())
    run(model, NATIVE(model.parameters()), range(STEPS), split=True)
    assert_as_alone(model, NATIVE)


def wrapped_adam(params: Any, **options: Any) -> Optimizer:
    return wrap(torch.optim.Adam(params, lr=0.05), **options)


@scenario
def fsdp2_wrapped() -> None:
    model = sharded(line())
    run(model, wrapped_adam(model.parameters()), range(STEPS), split=True)
    assert_as_alone(model, wrapped_adam)


@scenario
def fsdp2_resume() -> None:
    """Through torch's distributed state dict, in the middle of a Lookahead cycle."""
    mesh = line()
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
def checkpoint_of_two_processes() -> None:
    """Saved by two in the middle of a Lookahead cycle; goes on in any other number of them."""
    adafactor = functools.partial(NATIVE, host="adafactor", momentum=0.9)
    for name, create in (("adamw", NATIVE), ("adafactor", adafactor), ("wrapped", wrapped_adam)):
        model = sharded(line())
        optimizer = create(model.parameters())
        saves = dist.get_world_size() == 2
        if saves:
            run(model, optimizer, range(7), split=True)
        weights, state = get_state_dict(model, optimizer)
        kept = {"weights": weights, "state": state}
        (dcp.save if saves else dcp.load)(kept, checkpoint_id=CHECKPOINTS / name)
        if not saves:
            set_state_dict(model, optimizer, model_state_dict=kept["weights"], optim_state_dict=kept["state"])
            run(model, optimizer, range(7, STEPS), split=True)
            assert_as_alone(model, create)


class Tied(nn.Module):
    """Uses a weight twice, and never learns another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 1)
        self.second.weight = self.first.weight
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) + self.second(x).sin())


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


@scenario
def fsdp2_of_tied_and_frozen_weights() -> None:
    for create in (NATIVE, wrapped_adam):
        model = fully_shard(tied(), mesh=line())
        run(model, create(model.parameters()), range(STEPS), split=True)
        assert_as_alone(model, create, tied)


def parallelized(mesh: DeviceMesh) -> Net:
    model = net()
    # the bare parameter between the two layers is whole, so the first layer's output is gathered
    plan = {"first": ColwiseParallel(output_layouts=Replicate()), "last": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh, plan)
    assert isinstance(model.first.weight, DTensor)
    return model


@scenario
def fsdp2_of_tensor_parallel() -> None:
    """A dimension that is split twice, from right to left."""
    for create in (NATIVE, functools.partial(NATIVE, host="adafactor"), wrapped_adam):
        model = parallelized(grid()["inner"])
        fully_shard(model, mesh=grid()["outer"])
        for step in range(STEPS):  # ranks that share a part of the model see the same part of the batch
            x, y = (part.chunk(grid().size(0))[grid().get_local_rank(0)] for part in batch(step))
            if step == 0:
                optimizer = create(model.parameters())
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        assert_as_alone(model, create)


@scenario
def all_ranks_skip_the_step_of_which_one_has_an_entry_that_is_not_finite() -> None:
    for create in (functools.partial(NATIVE, nonfinite="skip"), functools.partial(wrapped_adam, nonfinite="skip")):
        alone = [nn.Parameter(torch.ones(5, 3, dtype=torch.float64)), nn.Parameter(torch.ones(4, dtype=torch.float64))]
        params = [nn.Parameter(own_part(param.detach(), line(), [Shard(0)])) for param in alone]
        expected, optimizer = create(alone), create(params)
        for step in range(6):
            for own, param in zip(alone, params, strict=True):
                own.grad = torch.randn(own.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                if step in (0, 3):
                    own.grad[0] = torch.nan
                param.grad = own_part(own.grad, line(), [Shard(0)])
            if step in (0, 3):
                assert params[0].grad is not None
                has_it = not params[0].grad.to_local().isfinite().all()
                assert has_it is (dist.get_rank() == 0)
            expected.step()
            optimizer.step()
        for own, param in zip(alone, params, strict=True):
            assert_is_part_of(param.detach(), own.detach())
        assert [count for key, count in optimizer.param_groups[0].items() if key.endswith("skipped_steps")] == [2]


@scenario
def tensor_parallel() -> None:
    model = parallelized(line())
    for foreach in (True, False):
        create = functools.partial(NATIVE, foreach=foreach)
        twin = copy.deepcopy(model)
        run(twin, create(twin.parameters()), range(STEPS), split=False)
        assert_as_alone(twin, create)


# --- tensors cut in every way -----------------------------------------------------------------------------------------

# Rows that divide evenly, unevenly, that are fewer than the ranks, one; tensors of none to four dimensions.
SHAPES = [(8, 4), (5, 3), (3, 7), (1, 6), (6, 1), (2, 3, 5), (3, 2, 2, 2), (9,), (1,), ()]
HOSTS: list[dict[str, Any]] = [
    {"host": "adamw"},
    {"host": "adafactor", "momentum": 0.9, "capturable": True},
    {"host": "adamw", "softplus_relative": 1.0},
]
if "HARD" in os.environ:
    HOSTS += [
        {"host": "adamw", "softplus_beta": None, "centralize": False},
        {"host": "adamw", "normalize": False, "lookahead_k": None, "maximize": True},
        {"host": "adabelief"},
        {"host": "adabelief", "softplus_relative": 1.0, "eps": 1e-3},
        {"host": "adafactor", "softplus_relative": 1.0},
        {"host": "sgd", "nesterov": True},
        {"host": "adafactor"},
    ]
LAYOUTS: dict[str, Callable[[], tuple[DeviceMesh, list[Placement]]]] = {
    "rows": lambda: (line(), [Shard(0)]),
    "columns": lambda: (line(), [Shard(1)]),
    "last": lambda: (line(), [Shard(-1)]),
    "replicated": lambda: (line(), [Replicate()]),
    "hybrid": lambda: (grid(), [Replicate(), Shard(0)]),
    "rows and columns": lambda: (grid(), [Shard(0), Shard(1)]),
    "columns and rows": lambda: (grid(), [Shard(1), Shard(0)]),
    "rows twice": lambda: (grid(), [Shard(0), Shard(0)]),
    "columns, replicated": lambda: (grid(), [Shard(1), Replicate()]),
}


def cut(whole: Tensor, layout: str) -> Tensor:
    """Along the dimensions that it has; -1 is the last one."""
    mesh, wanted = LAYOUTS[layout]()
    dims = [getattr(place, "dim", whole.dim()) for place in wanted]
    dims = [dim + whole.dim() if dim < 0 and whole.dim() else abs(dim) for dim in dims]
    return own_part(whole, mesh, [Shard(dim) if dim < whole.dim() else Replicate() for dim in dims])


def own_part(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Of a tensor that every rank has: nothing is sent."""
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def wholes(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def assert_is_part_of(value: Tensor, whole: Tensor, **tolerance: float) -> None:
    if isinstance(value, DTensor):
        value, whole = value.to_local(), own_part(whole, value.device_mesh, value.placements).to_local()
    if tolerance:
        torch.testing.assert_close(value, whole, **tolerance)
    else:
        assert_equal(value, whole)


def assert_tensors_as_alone(
    layouts: list[str | None], create: Create, grads_too: list[str | None] | None = None
) -> None:
    """Parameters and state after every fifth step; some lack a gradient at some steps, and one always."""
    alone = [nn.Parameter(whole) for whole in wholes(0)]
    params = [
        nn.Parameter(cut(p.detach(), name) if name else p.detach().clone())
        for p, name in zip(alone, layouts, strict=True)
    ]
    expected, optimizer = create(alone), create(params)
    for step in range(STEPS):
        for at, grad in enumerate(wholes(1 + step)):
            given = at != 4 and (at + step) % 4 != 1
            alone[at].grad = grad if given else None
            name = (grads_too or layouts)[at]
            params[at].grad = (cut(grad, name) if name else grad.clone()) if given else None
        expected.step()
        optimizer.step()
        if step % 5 == 4:
            for own, param in zip(alone, params, strict=True):
                assert_is_part_of(param.detach(), own.detach())
                state = optimizer.state.get(param, {})
                assert state.keys() == expected.state.get(own, {}).keys()
                for key, value in state.items():
                    assert_is_part_of(value, expected.state[own][key])
                    assert not value.dim() or isinstance(value, DTensor) is isinstance(param, DTensor)


def every_host(params: list[nn.Parameter], **options: Any) -> Optimizer:
    return SING(params, **{"lr": 0.05, "weight_decay": 0.1, "lookahead_k": 3, **options})


def for_every_host(layouts: list[str | None], grads_too: list[str | None] | None = None) -> None:
    for options in HOSTS:
        assert_tensors_as_alone(layouts, functools.partial(every_host, **options), grads_too)
    assert_tensors_as_alone(layouts, wrapped_adam, grads_too)


def cut_as(layout: str) -> None:
    for_every_host([layout] * len(SHAPES))


for _name in LAYOUTS:
    SCENARIOS[f"cut: {_name}"] = functools.partial(cut_as, _name)


@scenario
def cut_in_all_ways_beside_tensors_that_are_whole() -> None:
    names = [*LAYOUTS, None]
    for_every_host([names[at % len(names)] for at in range(len(SHAPES))])


@scenario
def gradients_that_are_cut_otherwise_or_not_added_up_yet() -> None:
    for_every_host(["rows"] * len(SHAPES), ["columns"] * len(SHAPES))
    mesh = line()
    grad = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    alone, param = nn.Parameter(torch.ones_like(grad)), nn.Parameter(distribute_tensor(torch.ones_like(grad), mesh))
    alone.grad = grad * dist.get_world_size()
    param.grad = DTensor.from_local(grad, mesh, [Partial()])
    for own in (alone, param):
        SING([own], lr=0.1).step()
    assert_equal(param.full_tensor().detach(), alone.detach())


@scenario
def low_precision_shards() -> None:
    """The same as one process would, but for the order of additions."""
    for host in ("adamw", "adafactor"):
        whole = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
        alone, param = nn.Parameter(whole.clone()), nn.Parameter(distribute_tensor(whole.clone(), line()))
        own, optimizer = SING([alone], host=host, lr=0.1), SING([param], host=host, lr=0.1)
        for step in range(6):
            alone.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
            param.grad = distribute_tensor(alone.grad, line())
            own.step()
            optimizer.step()
        torch.testing.assert_close(param.full_tensor().detach(), alone.detach(), rtol=2e-2, atol=2e-2)
        for key, value in optimizer.state[param].items():
            assert_is_part_of(value, own.state[alone][key], rtol=1e-5, atol=1e-6)


def collectives(layout: str | None, **options: Any) -> int:
    """How often the ranks communicate in one step with 36 tensors in two param groups."""
    params = [nn.Parameter(cut(torch.ones(4 + at % 5, 6), layout) if layout else torch.ones(4, 6)) for at in range(36)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[:18]}, {"params": params[18:], "weight_decay": 0.1}]
    optimizer = wrap(torch.optim.Adam(groups)) if options.get("wrapped") else SING(groups, lookahead_k=2, **options)
    optimizer.step()
    with CommDebugMode() as debug:
        optimizer.step()  # which merges
    return debug.get_total_counts()


@scenario
def one_all_reduce_for_all_norms() -> None:
    counted = {
        (layout, *options.values()): collectives(layout, **options)
        for layout in (None, "replicated", "rows", "columns", "hybrid", "rows and columns")
        for options in ({"host": "adamw"}, {"host": "adafactor"}, {"wrapped": True})
    }
    for kind in ("adamw", True):
        assert [counted[layout, kind] for layout in (None, "replicated")] == [0, 0], counted
        assert counted["rows", kind] == counted["hybrid", kind] == 1, counted
        assert counted["columns", kind] == 2, counted  # one more, of the rows' sums
        two_ways = grid().size(0) > 1
        assert counted["rows and columns", kind] == 2 + two_ways, counted
    assert counted[None, "adafactor"] == counted["replicated", "adafactor"] == 0, counted
    # Two groups, each with the sums over columns, of the rows' averages, and of the squares of the change.
    assert counted["rows", "adafactor"] == 1 + 2 * 3, counted


# --- engines ----------------------------------------------------------------------------------------------------------


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
    assert_as_alone(model, NATIVE)


def main(rank: int, processes: int, directory: str) -> None:
    global CHECKPOINTS, deviation
    CHECKPOINTS = Path(directory).parent
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=processes)
    outcomes = {}
    for name in SCENARIOS if processes > 1 else [checkpoint_of_two_processes.__name__]:
        deviation = 0.0
        try:
            SCENARIOS[name]()
            outcomes[name] = {"error": None, "deviation": deviation}
        except Exception:
            outcomes[name] = {"error": traceback.format_exc(), "deviation": None}
    Path(directory, f"rank{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
