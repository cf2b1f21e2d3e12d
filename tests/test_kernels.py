"""The compiled kernel: as exact as the float64 reference allows, whatever lies in memory, and never in the way."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import channels_last, contiguous, gradients, transposed, unaligned
from reference import Reference
from torch import Tensor, nn

import sing_plugins.step
from sing_plugins import SING, wrap
from sing_plugins.kernels import cpu
from sing_plugins.standardize import standardize

UNIT = 1 << 17  # _cpu.c's

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())


TAKEN: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "0-d": ((), contiguous),
    "one entry": ((1,), contiguous),
    "vector": ((1003,), contiguous),
    "matrix": ((37, 53), contiguous),
    "one row": ((1, 301), contiguous),
    "one column": ((301, 1), contiguous),
    "rows of two": ((129, 2), contiguous),
    "convolution": ((6, 5, 3, 3), contiguous),
    "channels last": ((6, 5, 3, 3), channels_last),
    "unaligned matrix": ((31, 33), unaligned),
    "unaligned vector": ((77,), unaligned),
    "5-d": ((2, 3, 2, 5, 7), contiguous),
    "a row of several units": ((2, UNIT + 5), contiguous),
    "several units": ((3 * UNIT + 7,), contiguous),
    "several units of rows": ((700, 401), contiguous),
}
HOSTS: list[dict[str, Any]] = [
    {"host": "adamw"},
    {"host": "adabelief"},
    {"host": "sgd", "momentum": 0.0},
    {"host": "sgd"},
    {"host": "sgd", "nesterov": True},
]


def host_name(host: dict[str, Any]) -> str:
    return "-".join(map(str, host.values()))


def parameters(names: list[str], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(made(torch.randn(shape, generator=generator).to(dtype))) for shape, made in map(TAKEN.get, names)
    ]


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
    step_with(params, optimizer, gradients(params, steps))


def step_with(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: Iterable[list[Tensor]]) -> None:
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()


def trained(names: list[str], steps: int = 11, **options: Any) -> tuple[list[nn.Parameter], SING]:
    params = parameters(names)
    optimizer = SING(params, **{"lr": 1e-2, "weight_decay": 0.1, **options})
    run(params, optimizer, steps)
    return params, optimizer


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


SMALL = [name for name, (shape, _) in TAKEN.items() if torch.Size(shape).numel() < 10_000]


@pytest.mark.parametrize(
    ("host", "softplus"),
    [
        *((host, {}) for host in HOSTS),
        *((host, {"softplus_beta": None}) for host in HOSTS[:2]),
        *((host, {"softplus_relative": 1.0}) for host in HOSTS[:2]),
    ],
    ids=host_name,
)
def test_a_hundred_steps_stay_within_the_stated_bounds_of_the_reference(
    host: dict[str, Any], softplus: dict[str, Any]
) -> None:
    options = {**host, **softplus, "weight_decay": 0.1}
    params, plain = parameters(SMALL), parameters(SMALL)
    references = [Reference(param, **{"momentum": 0.9, **options}) for param in params]
    optimizer, foreach = SING(params, lr=1e-2, **options), SING(plain, lr=1e-2, foreach=True, **options)
    assert [optimizer._implementation(group) for group in optimizer.param_groups] == [("auto", host["host"])]
    largest: dict[str, float] = {}
    for grads in gradients(params, 100):
        for index, (param, other) in enumerate(zip(params, plain, strict=True)):
            param.grad = other.grad = grads[index]
            references[index].step(grads[index], 1e-2)
        optimizer.step()
        foreach.step()
        for name, param, other, reference in zip(SMALL, params, plain, references, strict=True):
            state = optimizer.state[param]
            for key, bound in (("exp_avg", 3e-7), ("momentum_buffer", 1e-6)):
                if key in state:
                    expected = reference.state[key]
                    largest[name] = max(largest.get(name, 0.0), expected.abs().max().item())
                    assert (state[key].double() - expected).abs().max() <= bound * largest[name], (name, key)
            for key in ("exp_avg_sq", "exp_avg_var"):
                if key in state:
                    expected = reference.state[key]  # entries that all but equal the mean have fewer digits
                    atol = 1e-9 * expected.abs().max().item()
                    torch.testing.assert_close(state[key].double(), expected, rtol=3e-6, atol=atol)
            ours, theirs = error(param.detach(), reference.param), error(other.detach(), reference.param)
            assert ours <= (5e-6 if softplus == {"softplus_beta": None} else 2e-6), name
            assert ours <= max(1.5 * theirs, 3e-7), name


@pytest.mark.parametrize("level", range(cpu.instruction_set() + 1))
@pytest.mark.parametrize("host", HOSTS, ids=host_name)
def test_every_layout_and_instruction_set_gives_what_the_loop_gives(
    host: dict[str, Any], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "instruction_set", lambda: level)
    names = list(TAKEN)
    (fused, ours), (loop, theirs) = trained(names, **host), trained(names, **host, implementation="loop")
    for name, param, other in zip(names, fused, loop, strict=True):
        torch.testing.assert_close(param, other, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert param.stride() == other.stride()
        assert ours.state[param].keys() == theirs.state[other].keys()
        for key, value in ours.state[param].items():
            torch.testing.assert_close(value, theirs.state[other][key], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("host", HOSTS[:3], ids=host_name)
def test_the_number_of_threads_changes_no_bit(host: dict[str, Any]) -> None:
    before, results = torch.get_num_threads(), []
    steps = list(gradients(parameters(list(TAKEN)), 6))  # whose means are not the same in any number of threads
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            params = parameters(list(TAKEN))
            step_with(params, SING(params, lr=1e-2, weight_decay=0.1, **host), steps)
            results.append(params)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e19, 1e38], ids=str)
@pytest.mark.parametrize("name", ["matrix", "vector", "several units", "one column"])
def test_the_norm_of_gradients_of_any_size_is_right(name: str, scale: float) -> None:
    (param,) = parameters([name])
    grad = torch.rand(param.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    (expected,) = standardize([grad], eps=0.0)
    param.grad = (grad * scale).float()
    param.data.zero_()
    SING([param], lr=1.0, host="sgd", momentum=0.0, eps=1e-300, lookahead_k=None).step()
    torch.testing.assert_close(-param.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_norm_of_very_many_entries_is_right() -> None:
    """Squares that are added up one by one in float32 are 0.1 % short here."""
    grad = torch.full((30_000_000,), 1e-3)
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    SING([param], lr=1.0, host="sgd", momentum=0.0, lookahead_k=None).step()
    assert param[-1].item() == pytest.approx(-(30_000_000**-0.5), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("host", HOSTS, ids=host_name)
def test_entries_that_are_not_finite_are_what_they_are_in_the_loop(
    host: dict[str, Any], position: int, bad: float
) -> None:
    results = []
    for implementation in ("fused", "loop"):
        params = parameters(SMALL)
        optimizer = SING(params, lr=1e-2, implementation=implementation, **host)
        for grads in gradients(params, 2):
            for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if index % 3:
                    grad.as_strided((grad.numel(),), (1,))[position] = bad
                param.grad = grad
            optimizer.step()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


class Subclass(Tensor):
    pass


def other_strides(params: list[nn.Parameter]) -> None:
    params[0].grad = transposed(params[0].grad)  # type: ignore[arg-type]


def lazy_negative(params: list[nn.Parameter]) -> None:
    params[0].grad = torch._neg_view(params[0].grad)  # type: ignore[attr-defined]


def subclass(params: list[nn.Parameter]) -> None:
    params[0].grad = params[0].grad.as_subclass(Subclass)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [other_strides, lazy_negative, subclass])
def test_a_gradient_that_the_kernel_does_not_take_is_left_to_the_loop(
    change: Callable[[list[nn.Parameter]], None],
) -> None:
    results = []
    for implementation in ("auto", "loop"):
        params = parameters(["matrix", "matrix"])
        optimizer = SING(params, lr=1e-2, implementation=implementation)
        for grads in gradients(params, 6):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            change(params)
            optimizer.step()
        results.append(params)
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_left_to_the_loop(dtype: torch.dtype) -> None:
    results = []
    for implementation in ("auto", "loop"):
        params = parameters(["matrix", "vector"], dtype)
        run(params, SING(params, lr=1e-2, implementation=implementation), 6)
        results.append(params)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_state_of_another_layout_is_left_to_the_loop() -> None:
    results = []
    for implementation in ("auto", "loop"):
        params, optimizer = trained(["matrix"], implementation="loop")
        optimizer.param_groups[0]["implementation"] = implementation
        optimizer.state[params[0]]["exp_avg"] = transposed(optimizer.state[params[0]]["exp_avg"])
        run(params, optimizer, 6)
        results.append(params[0])
    assert torch.equal(*results)


def test_two_parameters_of_the_same_memory_are_updated_one_after_the_other() -> None:
    results = []
    for implementation in ("auto", "loop"):
        (first,) = parameters(["matrix"])
        params = [first, nn.Parameter(first.data)]
        run(params, SING(params, lr=1e-2, implementation=implementation), 6)
        results.append(first)
    assert torch.equal(*results)


def test_a_weight_moved_elsewhere_between_steps_is_found() -> None:
    results = []
    for move in (False, True):
        params, optimizer = trained(["convolution", "matrix"])
        if move:
            params[0].data = channels_last(params[0].data).clone(memory_format=torch.preserve_format)
            params[0].data = contiguous(params[0].data)
        optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].clone()
        for values in optimizer.state.values():
            values.pop("lookahead_params")  # a moved weight begins a cycle
        run(params, optimizer, 6)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autograd_notices_that_a_saved_weight_was_updated() -> None:
    params, optimizer = trained(["matrix"])
    loss = params[0].square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_goes_on_by_itself(duplicate: Callable[[SING], SING]) -> None:
    params, optimizer = trained(SMALL)
    other = duplicate(optimizer)
    copies = other.param_groups[0]["params"]
    run(copies, other, 7)
    run(params, optimizer, 7)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_a_compiled_step_is_made_of_what_the_compiler_knows(recwarn: pytest.WarningsRecorder) -> None:
    results = []
    for implementation in ("auto", "foreach"):
        params = parameters(["matrix", "vector"])
        step = SING(params, lr=1e-2, implementation=implementation).step
        step = torch.compile(step, backend="eager") if implementation == "auto" else step
        for grads in gradients(params, 6):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            step()
        results.append(params)
    for param, expected in zip(*results, strict=True):
        torch.testing.assert_close(param, expected, rtol=2e-6, atol=1e-7)  # torch takes the step for capturable there
    assert not [warning for warning in recwarn if "kernels" in str(warning.message)]


def test_resuming_is_exact() -> None:
    params, optimizer = trained(SMALL, steps=8)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = SING(others, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(params, optimizer, 7)
    run(others, resumed, 7)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_parameters_that_lack_a_gradient_in_some_steps_count_their_own_steps() -> None:
    params = parameters(SMALL)
    optimizer, references = SING(params, lr=1e-2, lookahead_k=None), [Reference(p, lookahead_k=None) for p in params]
    for step, grads in enumerate(gradients(params, 10)):
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            param.grad = grad if (index + step) % 3 else None
            if param.grad is not None:
                references[index].step(grad, 1e-2)
        optimizer.step()
    for param, reference in zip(params, references, strict=True):
        assert optimizer.state[param]["step"].item() == reference.steps
        torch.testing.assert_close(param.double(), reference.param, rtol=1e-5, atol=1e-6)


def test_a_forked_process_has_threads_of_its_own() -> None:
    """Its step may not wait for threads that it has not inherited. (torch's own operations with threads do.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (param,) = parameters(["several units"])
        optimizer = SING([param], lr=1e-2, lookahead_k=None)
        run([param], optimizer, 2)
        param.data.share_memory_()
        optimizer.step()
        after, steps = param.detach().clone(), optimizer.state[param]["step"].item()
        child = multiprocessing.get_context("fork").Process(target=optimizer.step)
        child.start()
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(param, after)
    assert optimizer.state[param]["step"].item() == steps


def test_a_wrapped_host_gets_what_standardize_gives() -> None:
    params, others = parameters(SMALL), parameters(SMALL)
    ours, host = wrap(torch.optim.SGD(params, lr=0.1), lookahead_k=None), torch.optim.SGD(others, lr=0.1)
    for grads in gradients(params, 3):
        for param, other, grad in zip(params, others, grads, strict=True):
            param.grad = grad
            (standardized,) = standardize([grad.double()])
            other.grad = standardized.float()
        ours.step()
        host.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


if "SANITIZED" in os.environ:  # make test-sanitized

    def test_the_kernel_is_the_one_with_sanitizers() -> None:
        assert Path(cpu.__file__).is_relative_to(Path(os.environ["SANITIZED"]).resolve())
        assert hasattr(cpu.library(), "__asan_init")


def test_the_kernel_is_the_one_of_this_source() -> None:
    """In a checkout, a change of the source needs a new `pip install -e .`."""
    folder = Path(cpu.__file__).parent
    built = max(path.stat().st_mtime for path in folder.glob("_cpu.*") if path.suffix in (".so", ".pyd"))
    assert built >= (folder / "_cpu.c").stat().st_mtime


def test_torch_functions_copy_a_block_of_gradients_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks change no bit, and what a step takes besides the states does not grow with the number of tensors."""
    results = []
    for block in (1, 1 << 24):
        monkeypatch.setattr(sing_plugins.step, "FOREACH_BLOCK", block)
        params, optimizer = trained(["matrix"] * 7, implementation="foreach")
        assert len(optimizer._batches(optimizer.param_groups[0])) == (7 if block == 1 else 1)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
