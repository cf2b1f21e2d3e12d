"""Standardization, and the paper's theory as properties that are executed."""

from __future__ import annotations

import math

import pytest
import torch
from problems import SHAPES, gradients, parameters
from reference import centralized, normalized
from torch import nn

from sing_plugins import SING
from sing_plugins.standardize import _standardize_in_one_piece, centralize, norm, norms, standardize

BARE = {"host": "sgd", "momentum": 0.0, "lookahead_k": None}  # equation 2 alone: no momentum, no Lookahead


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_standardized_gradient_follows_equations_2_and_3(shape: tuple[int, ...]) -> None:
    grad = torch.randn(shape, dtype=torch.float64)
    expected = normalized(centralized(grad), 1e-8) if grad.numel() else grad
    torch.testing.assert_close(standardize([grad])[0], expected, rtol=1e-13, atol=1e-15)


def test_standardization_leaves_its_input_alone() -> None:
    grads = next(gradients(1))
    copies = [grad.clone() for grad in grads]
    standardize(grads)
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, copies, strict=True))


def test_norm_of_the_standardized_gradient_is_the_root_of_the_number_of_tensors() -> None:
    """Lemmas A.1 and A.3."""
    grads = [grad for grad in next(gradients(1)) if grad.numel()]
    for switch in (True, False):
        parts = standardize(grads, centralize=switch, eps=1e-30)
        total = math.sqrt(sum(float(part.square().sum()) for part in parts))
        assert total == pytest.approx(math.sqrt(len(grads)), rel=1e-12)


def test_tensors_with_rows_of_one_element_are_left_uncentralized_unless_asked() -> None:
    grad = torch.randn(5, 1, 1, 1)
    assert torch.equal(centralize(grad), grad)
    assert torch.count_nonzero(centralize(grad, rows_of_one=True)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_gradients_are_standardized_in_float32(dtype: torch.dtype) -> None:
    grad = (torch.randn(64, 33) + 5).to(dtype)
    result = standardize([grad])[0]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, standardize([grad.double()])[0].float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(3_000_000,), (3, 1_000_000), (1_000_000, 3)], ids=str)
def test_float32_norm_of_a_large_tensor_is_accurate(shape: tuple[int, ...]) -> None:
    """A plain float32 norm on the CPU is off by 1e-4 at this size and by several percent at 1e8 entries."""
    grad = torch.rand(shape)
    assert norm(grad).item() == pytest.approx(grad.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("host", ["adamw", "adabelief", "adafactor", "sgd"])
def test_rescaling_the_loss_does_not_change_the_trajectory(host: str) -> None:
    """Theorem 3.2, first part."""
    results = []
    for scale in (1.0, 1024.0):
        params = parameters()
        optimizer = SING(params, lr=1e-2, host=host, eps=1e-30)
        for grads in gradients(10):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad * scale
            optimizer.step()
        results.append(params)
    for plain, rescaled in zip(*results, strict=True):
        torch.testing.assert_close(plain, rescaled, rtol=1e-12, atol=1e-14)


def test_clipping_does_not_change_the_trajectory() -> None:
    """Appendix D.1: layer-wise, and by the norm of all gradients."""
    results = []
    for clip in (None, "layer", "all"):
        params = parameters()
        optimizer = SING(params, lr=1e-2, eps=1e-30)
        for grads in gradients(10):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
                if clip == "layer":
                    nn.utils.clip_grad_norm_([param], 0.1)
            if clip == "all":
                nn.utils.clip_grad_norm_(params, 0.1)
            optimizer.step()
        results.append(params)
    for plain, layer, everything in zip(*results, strict=True):
        torch.testing.assert_close(plain, layer, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(plain, everything, rtol=1e-9, atol=1e-12)


def test_mean_of_every_centralized_tensor_is_preserved() -> None:
    """Theorem 3.2, second part: row by row, hence tensor by tensor."""
    params = [param for param in parameters() if param.dim() > 1 and param[:1].numel() > 1]
    means = [param.detach().flatten(1).mean(1) for param in params]
    optimizer = SING(params, lr=0.1, **BARE)
    for _ in range(20):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    for param, mean in zip(params, means, strict=True):
        torch.testing.assert_close(param.detach().flatten(1).mean(1), mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("closeness", [0.9, 1e-3, 1e-6])
def test_one_step_leaves_the_ball_that_gradient_descent_cannot_leave(closeness: float) -> None:
    """Theorem 3.1 on F(x) = |x - x*|² / 2, whose ball of radius r is as large as one likes.

    With lr = 2r/√D SING is outside after one step from anywhere in the ball; gradient descent with that lr moves by
    lr times a gradient that vanishes, and stays.
    """
    radius, tensors = 0.5, 4
    minimum = [torch.randn(3, dtype=torch.float64) for _ in range(tensors)]
    direction = [torch.randn(3, dtype=torch.float64) for _ in range(tensors)]
    length = math.sqrt(sum(float(d.square().sum()) for d in direction))
    start = [m + closeness * radius * d / length for m, d in zip(minimum, direction, strict=True)]
    lr = 2 * radius / math.sqrt(tensors)

    def distance_after_a_step(optimizer_of: type[torch.optim.Optimizer], **options: object) -> float:
        params = [nn.Parameter(point.clone()) for point in start]
        optimizer = optimizer_of(params, lr=lr, **options)
        sum((p - m).square().sum() / 2 for p, m in zip(params, minimum, strict=True)).backward()
        optimizer.step()
        return math.sqrt(sum(float((p - m).detach().square().sum()) for p, m in zip(params, minimum, strict=True)))

    assert distance_after_a_step(SING, **BARE, eps=1e-30) >= radius
    assert distance_after_a_step(torch.optim.SGD) < radius


@pytest.mark.parametrize("shape", [(3, 5), (7,), (3, 40_000), ()], ids=str)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e19), (torch.float32, 3e38), (torch.float64, 1e307)])
def test_gradients_whose_squares_overflow_are_standardized_like_small_ones(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    """The norm is infinite there if squares are summed up as they are, and the update silently zero."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.rand(shape, generator=generator, dtype=torch.float64).mul_(0.9).add_(0.1)
    (expected,) = standardize([grad])
    (huge,) = standardize([(grad * scale).to(dtype)])
    torch.testing.assert_close(huge.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_whose_squares_vanish_are_divided_by_their_norm() -> None:
    grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected,) = standardize([grad], eps=0.0)
    (tiny,) = standardize([(grad * 1e-30).float()], eps=0.0)
    torch.testing.assert_close(tiny.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_norm_that_is_not_looked_at_does_not_overflow() -> None:
    """As on an accelerator: whatever the norm, the same operations run, and no entry is infinite."""
    huge, tiny = norms([torch.full((10_000,), 1e25), torch.full((100, 100), 1e-30)])
    assert huge.item() == pytest.approx(1e27)
    assert tiny.item() == pytest.approx(1e-28)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_of_one", [False, True])
def test_gradients_in_one_piece_of_memory_as_on_an_accelerator_are_the_same(
    dtype: torch.dtype, rows_of_one: bool
) -> None:
    grads = [grad.to(dtype) for grad in next(gradients(1))]
    grads += [torch.randn(3, 4, 5, 6).to(dtype, memory_format=torch.channels_last), torch.randn(8, 4).t().to(dtype)]
    grads += [torch.full((3, 4), float("nan"), dtype=dtype), torch.randn(1, 4).to(dtype).expand(3, 4)]
    together = _standardize_in_one_piece(grads, True, 1e-8, rows_of_one)
    for grad, result in zip(grads, together, strict=True):
        (expected,) = standardize([grad.double()], rows_of_one=rows_of_one)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert result.dtype == torch.float32
        assert result.stride() == torch.empty_like(grad).stride()
    (only,) = _standardize_in_one_piece(grads[:1], False, 1e-8, rows_of_one)
    torch.testing.assert_close(only, standardize(grads[:1], centralize=False)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_not_hidden(bad: float) -> None:
    (standardized,) = standardize([torch.tensor([[1.0, bad], [2.0, 3.0]])])
    assert not standardized.isfinite().all()
