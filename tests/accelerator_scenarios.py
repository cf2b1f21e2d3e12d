"""What test_accelerator_kernel.py runs in processes of its own: on a CUDA device, or in Triton's interpreter.

The interpreter, which TRITON_INTERPRET=1 turns on, runs the kernels on tensors of the CPU, some milliseconds a program.
Triton reads the variable when it is imported, and everything else in the process would get the interpreter too.
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from layouts import channels_last, contiguous, gradients, transposed, unaligned
from reference import Reference
from torch import Tensor, nn

from sing_plugins import SING, kernels, wrap
from sing_plugins.kernels import accelerator
from sing_plugins.standardize import standardize

DEVICE = torch.device("cpu") if os.environ.get("TRITON_INTERPRET") == "1" else torch.device("cuda", 0)
on_a_device = pytest.mark.xfail(DEVICE.type == "cpu", reason="the interpreter launches nothing", run=False)

HOSTS: list[dict[str, Any]] = [
    {"host": "adamw", "betas": (0.9, 0.99)},
    {"host": "adabelief", "betas": (0.9, 0.99)},
    {"host": "sgd", "momentum": 0.0},
    {"host": "sgd", "momentum": 0.9},
    {"host": "sgd", "momentum": 0.9, "nesterov": True},
]
SWITCHES: dict[str, dict[str, Any]] = {
    "all on": {"lookahead_k": 2},
    "all off": {"centralize": False, "normalize": False, "softplus_beta": None, "lookahead_k": None},
    "centralize": {"normalize": False, "softplus_beta": None, "lookahead_k": 2},
    "normalize": {"centralize": False, "lookahead_k": None},
}
OPTIONS: list[dict[str, Any]] = [
    {"centralize_rows_of_one": True, "decay_all": True, "lookahead_alpha": 0.3, "lookahead_k": 1},
    {"betas": (0.0, 0.0), "eps": 1e-3, "softplus_beta": None},
    {"softplus_beta": 5.0},
    {"softplus_relative": 0.25},
    {"softplus_relative": 0.25, "host": "adabelief", "eps": 1e-3},
]


def name_of(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items())


# With units of 64 entries: shapes of one unit, of several whole rows a unit, and of several units a row.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "0-d": ((), contiguous),
    "vector": ((77,), contiguous),
    "matrix": ((7, 9), contiguous),
    "one column": ((70, 1), contiguous),
    "narrow": ((150, 3), contiguous),
    "channels last": ((5, 6, 3, 3), channels_last),
    "unaligned": ((3, 31), unaligned),
    "long rows": ((9, 131), contiguous),
    "longer rows": ((2, 1201), contiguous),
    "one long row": ((1, 67), contiguous),
    "long vector": ((2100,), contiguous),
}


@pytest.fixture(autouse=True)
def kernel_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator.missing_on(DEVICE) == ""
    monkeypatch.setitem(kernels._MODULES, DEVICE.type, accelerator)
    monkeypatch.setattr(accelerator, "IS_DEFAULT", True)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "UNIT", 64)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is copied to the device, one entry a copy."""
    made: list[object] = []
    original = accelerator._Table._there

    def counted(table: Any, values: Any) -> Tensor:
        made.append(values)
        return original(table, values)

    monkeypatch.setattr(accelerator._Table, "_there", counted)
    return made


def parameters(names: list[str], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(shape, generator=generator), made) for shape, made in map(LAYOUTS.__getitem__, names)]
    return [nn.Parameter(made(value.to(DEVICE, dtype))) for value, made in drawn]


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for grads in gradients(params, steps):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()


def trained(names: list[str], steps: int = 3, **options: Any) -> tuple[list[nn.Parameter], SING]:
    params = parameters(names)
    optimizer = SING(params, **{"lr": 1e-2, "weight_decay": 0.1, "lookahead_k": 2, **options})
    run(params, optimizer, steps)
    return params, optimizer


def used_the_kernel(optimizer: SING) -> bool:
    return isinstance(optimizer._kernels.get(DEVICE.type), accelerator.Kernel)


def assert_follows_the_reference(options: dict[str, Any], sign: int = 1, **ours: Any) -> None:
    """Two steps with all shapes of problems.py; parameters and state at every step."""
    params = [nn.Parameter(p.detach().to(DEVICE)) for p in problems.parameters(torch.float32)]
    optimizer, references = SING(params, lr=1.0, **options, **ours), [Reference(p.cpu(), **options) for p in params]
    largest: dict[tuple[int, str], float] = {}
    for step, grads in enumerate(problems.gradients(2, torch.float32)):
        problems.set_gradients(params, [sign * grad.to(DEVICE) for grad in grads])
        problems.set_learning_rate(optimizer, problems.learning_rate(step))
        optimizer.step()
        for index, (param, grad, reference) in enumerate(zip(params, grads, references, strict=True)):
            if not param.numel():
                continue
            reference.step(grad, problems.learning_rate(step))
            state = dict(optimizer.state[param])
            assert state.pop("step") == step + 1
            assert state.keys() == reference.state.keys()
            for name, actual in {**state, "param": param.detach()}.items():
                expected = reference.param if name == "param" else reference.state[name]
                key = index, name
                largest[key] = max(largest.get(key, 0.0), expected.abs().max().item())
                error = (actual.double().cpu() - expected).abs().max().item()
                assert error <= 2e-6 * largest[key], (tuple(param.shape), name, step, error / largest[key])
    assert used_the_kernel(optimizer)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("host", HOSTS, ids=name_of)
def test_every_host_and_switch_follows_the_reference(host: dict[str, Any], switches: dict[str, Any]) -> None:
    assert_follows_the_reference({**host, **switches, "weight_decay": 0.1})


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_every_other_option_follows_the_reference(options: dict[str, Any]) -> None:
    assert_follows_the_reference({"weight_decay": 0.1, **options})


def test_ascent_is_descent_of_the_negative() -> None:
    assert_follows_the_reference({"weight_decay": 0.1}, sign=-1, maximize=True)


@pytest.mark.parametrize("host", HOSTS[:2], ids=name_of)
def test_twenty_steps_stay_near_the_reference(host: dict[str, Any]) -> None:
    options = {**host, "weight_decay": 0.1}
    (param,) = parameters(["matrix"])
    optimizer, reference = SING([param], lr=1e-2, **options), Reference(param.cpu(), **options)
    for (grad,) in gradients([param], 20):
        param.grad = grad
        optimizer.step()
        reference.step(grad.cpu(), 1e-2)
    assert (param.double().cpu() - reference.param).norm() <= 2e-6 * reference.param.norm()
    for key in optimizer.state[param].keys() - {"step"}:
        torch.testing.assert_close(optimizer.state[param][key].double().cpu(), reference.state[key], rtol=3e-6, atol=0)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("normalize", [True, False])
def test_every_layout_gives_what_the_loop_gives(normalize: bool) -> None:
    names = list(LAYOUTS) if normalize else ["narrow", "long rows", "long vector"]
    options = {"normalize": normalize, "lookahead_k": 1}
    (fused, ours), (loop, theirs) = trained(names, 1, **options), trained(names, 1, **options, implementation="loop")
    assert used_the_kernel(ours)
    assert not used_the_kernel(theirs)
    for name, param, other in zip(names, fused, loop, strict=True):
        torch.testing.assert_close(param, other, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert param.stride() == other.stride()
        assert ours.state[param].keys() == theirs.state[other].keys()
        for key, value in ours.state[param].items():
            torch.testing.assert_close(value, theirs.state[other][key], rtol=1e-5, atol=2e-6)


def standardized(grads: list[Tensor], **options: Any) -> list[Tensor]:
    group = {"centralize": True, "centralize_rows_of_one": False, "normalize": True, **options}
    return accelerator.Kernel().standardize(grads, group, "", 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e38], ids=str)
@pytest.mark.usefixtures("small_units")
def test_gradients_of_any_size_are_standardized(scale: float) -> None:
    names = ["vector", "matrix", "one column", "long rows"]
    grads = [torch.rand(LAYOUTS[name][0], dtype=torch.float64) + 0.1 for name in names]
    actual = standardized([(grad * scale).float().to(DEVICE) for grad in grads])
    for ours, expected in zip(actual, standardize(grads, eps=0.0), strict=True):
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "shape", [(2, accelerator.UNIT + 5), (3 * accelerator.UNIT + 7,), (40, 700), (3, 301)], ids=str
)
def test_large_means_cost_no_digit(shape: tuple[int, ...]) -> None:
    grad = torch.randn(shape) + 1e4
    (expected,) = standardize([grad.double()], eps=0.0)
    (actual,) = standardized([grad.to(DEVICE)])
    # The mean is a float32, half a unit of whose last place is 5e-4 here.
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=2e-6, atol=6e-4 * expected.abs().max().item())
    assert actual.double().norm().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(("bad", "position"), [(float("nan"), -1), (float("inf"), 0), (float("-inf"), -1)])
@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2]], ids=name_of)
def test_entries_that_are_not_finite_are_what_they_are_in_the_loop(
    host: dict[str, Any], bad: float, position: int
) -> None:
    results = []
    for implementation in ("fused", "loop"):
        params = parameters(["vector", "long rows", "matrix", "matrix"])
        for index, (param, grad) in enumerate(zip(params, next(gradients(params, 1)), strict=True)):
            if index < 3:
                grad.view(-1)[position] = bad
            param.grad = grad
        optimizer = SING(params, lr=1e-2, implementation=implementation, **host)
        optimizer.step()
        assert used_the_kernel(optimizer) == (implementation == "fused")
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_zero_gradient_gives_a_zero_update() -> None:
    params = parameters(["matrix", "vector"])
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    SING(params, lr=1e-2).step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_the_result_is_the_same_at_every_run() -> None:
    first, second = (trained(["matrix", "long vector"], 1)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parameters_that_lack_a_gradient_in_some_steps_count_their_own_steps() -> None:
    params = parameters(["vector", "matrix", "unaligned"])
    optimizer = SING(params, lr=1e-2, lookahead_k=None)
    references = [Reference(param.cpu(), lookahead_k=None) for param in params]
    for step, grads in enumerate(gradients(params, 6)):
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            param.grad = grad if step > 4 or (index + step) % 3 else None
            if param.grad is not None:
                references[index].step(grad.cpu(), 1e-2)
        optimizer.step()
    for param, reference in zip(params, references, strict=True):
        assert optimizer.state[param]["step"].item() == reference.steps
        torch.testing.assert_close(param.double().cpu(), reference.param, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
def test_steps_rates_and_merges_on_the_device_are_read_there(lr: Any) -> None:
    names = ["vector", "matrix"]
    (params, optimizer), (others, other) = trained(names, 2, lookahead_k=3), trained(names, 2, lookahead_k=3)
    (group,) = optimizer.param_groups
    group["capturable"] = True
    group["lr"] = lr.to(DEVICE) if isinstance(lr, Tensor) else lr
    other.param_groups[0]["lr"] = 0.05
    for _ in range(5):
        run(params, optimizer, 1)
        run(others, other, 1)
        for param, expected in zip(params, others, strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)
        phases = [of.state_dict()["param_groups"][0]["lookahead_step"] for of in (optimizer, other)]
        assert phases[0] == phases[1]
    assert [optimizer.state[param]["step"].item() for param in params] == [7, 7]


def test_only_what_has_changed_is_copied(copies: list[object]) -> None:
    params, optimizer = trained(["vector", "matrix"], 1, lookahead_k=3)

    def copied() -> int:
        copies.clear()
        optimizer.step()
        return len(copies)

    assert len(copies) == 5  # layout, units, blocks, steps and addresses
    assert [copied(), copied()] == [0, 0]  # the second one with a merge
    kept, params[0].grad = params[0].grad, torch.ones_like(params[0])
    assert [copied(), copied()] == [1, 0]
    optimizer.param_groups[0]["lr"] = 0.5
    assert copied() == 0
    optimizer.state[params[1]]["step"] += 7
    assert copied() == 2  # steps, whose address changes with them
    assert copied() == 0
    assert [optimizer.state[param]["step"].item() for param in params] == [8, 15]
    assert kept is not None  # or the new gradient might be where it was


def test_a_step_that_failed_on_the_way_is_not_counted_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for fails in (True, False):
        params, optimizer = trained(["matrix"], 1, lookahead_k=None, betas=(0.5, 0.5))
        if fails:
            with monkeypatch.context() as patched:
                patched.setattr(accelerator._load(), "update", Failing())
                with pytest.raises(ValueError, match="on purpose"):
                    optimizer.step()
        optimizer.step()
        results.append(params[0])
        assert optimizer.state[params[0]]["step"].item() == 2
    assert torch.equal(*results)


class Failing:
    def __getitem__(self, grid: object) -> object:
        raise ValueError("on purpose")


def test_a_weight_moved_elsewhere_between_steps_is_found() -> None:
    results = []
    for move in (False, True):
        params, optimizer = trained(["channels last", "matrix"], lookahead_k=None)
        if move:
            params[0].data = params[0].data.clone()
        optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].clone()
        run(params, optimizer, 2)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autograd_notices_that_a_saved_weight_was_updated() -> None:
    params, optimizer = trained(["matrix"], 1)
    loss = params[0].square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_resuming_is_exact() -> None:
    params, optimizer = trained(["vector", "matrix"])
    others = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = SING(others, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(params, optimizer, 2)
    run(others, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_what_the_kernel_does_not_take_is_left_to_torch() -> None:
    results = []
    for implementation in ("auto", kernels.of_torch(DEVICE)):
        params = parameters(["matrix", "matrix"]) + parameters(["matrix"], torch.bfloat16)
        optimizer = SING(params, lr=1e-2, implementation=implementation)
        for grads in gradients(params, 2):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            params[0].grad = transposed(grads[0])
            optimizer.step()
        results.append(params)
    (ours, taken, low), (theirs, other, other_low) = results
    assert torch.equal(ours, theirs)
    assert torch.equal(low, other_low)
    torch.testing.assert_close(taken, other, rtol=1e-6, atol=1e-6)


def test_two_parameters_of_the_same_memory_are_left_to_torch() -> None:
    results = []
    for implementation in ("auto", kernels.of_torch(DEVICE)):
        (first,) = parameters(["matrix"])
        params = [first, nn.Parameter(first.data)]
        run(params, SING(params, lr=1e-2, implementation=implementation), 2)
        results.append(first)
    assert torch.equal(*results)


def test_a_wrapped_host_gets_what_standardize_gives() -> None:
    params, others = parameters(["vector", "matrix"]), parameters(["vector", "matrix"])
    ours, host = wrap(torch.optim.SGD(params, lr=0.1), lookahead_k=None), torch.optim.SGD(others, lr=0.1)
    for grads in gradients(params, 2):
        for param, other, grad in zip(params, others, grads, strict=True):
            param.grad = grad
            other.grad = standardize([grad.double()])[0].float()
        ours.step()
        host.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


def test_decay_rates_in_two_parts_are_as_exact_as_in_one() -> None:
    for beta in (0.999, 0.9, 0.95, 1 - 1e-6, 0.0):
        most, rest = accelerator._in_two(beta)
        assert ctypes.c_float(most).value == most
        assert abs(most + ctypes.c_float(rest).value - beta) < 1e-15


@on_a_device
@pytest.mark.parametrize("host", HOSTS, ids=name_of)
def test_a_step_is_three_launches_and_no_wait(host: dict[str, Any]) -> None:
    launched = {}
    for count in (10, 1000):
        params = [nn.Parameter(torch.randn(8, 9, device=DEVICE)) for _ in range(count)]
        optimizer = SING(params, lr=1e-2, weight_decay=0.1, **host)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(7):
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        launched[count] = [name for name in names if not name.startswith(("Mem", "Optimizer"))]
    assert launched[10] == launched[1000]
    assert len(launched[10]) == 3


@on_a_device
@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
def test_a_graph_of_a_step_makes_steps(implementation: str) -> None:
    results = []
    for is_captured in (False, True):
        params = parameters(["vector", "matrix"])
        lr = torch.tensor(1e-2, device=DEVICE)
        optimizer = SING(params, lr=lr, lookahead_k=2, implementation=implementation, capturable=True)
        for param in params:
            param.grad = torch.ones_like(param) * param.detach().sin()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if is_captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for _ in range(3):
            lr.mul_(0.5)
            graph.replay() if is_captured else optimizer.step()
        assert [optimizer.state[param]["step"].item() for param in params] == [4.0, 4.0]
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_a_device
def test_very_long_rows_and_offsets_beyond_32_bits() -> None:
    (long,) = standardized([torch.full((1, 100_000_000), 1e-3, device=DEVICE)], centralize=False)
    assert long[0, ::1000].norm().item() * 1000**0.5 == pytest.approx(1.0, rel=1e-6)
    free, _ = torch.cuda.mem_get_info(DEVICE)
    entries = 2**31 + 5 if free > 20e9 else 2**27 + 5
    grad = torch.zeros(entries, device=DEVICE)
    grad[-2:] = torch.tensor([3.0, 4.0], device=DEVICE)
    (far,) = standardized([grad])
    torch.testing.assert_close(far[-3:].cpu(), torch.tensor([0.0, 0.6, 0.8]))
