"""The gradient standardization of SING: centralize (φ), then normalize (Γ).

Pure functions. Nothing here changes its input, and every statistic of every tensor is computed here and
nowhere else. Source: equations 2 and 3 and Algorithm 2 of "SING: A Plug-and-Play DNN Training Technique"
(Courtois, Scieur, Morel, Arias, Eboli, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)

# A float32 norm on the CPU adds the squares up one after the other: it is 0.1 % short at 3e7 entries and 6 % at 1e8.
# Blocks of this many entries keep the error below 1e-6; their norms are then combined in float64.
CPU_NORM_BLOCK = 16384

# Squares of the entries that make up a smaller norm are denormal, or zero.
_SAFE = {dtype: torch.finfo(dtype).tiny ** 0.5 * 1e4 for dtype in (torch.float32, torch.float64)}

_vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's statistics and state are kept: float32 at least."""
    return torch.float32 if tensor.dtype in LOW_PRECISION else tensor.dtype


def widest(device: torch.device) -> torch.dtype:
    """The most precise dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a ``torch.distributed.tensor.DTensor``, without importing that package: it takes a second."""
    return hasattr(tensor, "placements")


def has_centre(shape: torch.Size, rows_of_one: bool = False) -> bool:
    """Whether φ applies to a tensor of this shape.

    The paper centralizes every tensor of more than one dimension over all dimensions but the first. A row of one
    element is its own mean, so that rule would erase the gradient of an ``n×1`` tensor for ever; such tensors are
    left as they are unless ``rows_of_one`` asks for the paper's rule to the letter.
    """
    return len(shape) > 1 and (rows_of_one or shape.numel() > shape[0])


def centralize(grad: Tensor, rows_of_one: bool = False) -> Tensor:
    """φ: subtract from every row (index of the first dimension) its mean. ``grad`` itself where φ does not apply."""
    if not has_centre(grad.shape, rows_of_one):
        return grad
    return grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True)


def norm(grad: Tensor) -> Tensor:
    """Γ: the Euclidean norm over all entries, as a 0-d tensor (equation 3)."""
    if not _may_be_read(grad):
        return norms([grad])[0]
    if grad.numel() > CPU_NORM_BLOCK:
        blocks = torch.stack(torch._foreach_norm(torch.split(grad.reshape(-1), CPU_NORM_BLOCK)))
        return _vector_norm(blocks, dtype=torch.float64).to(grad.dtype)
    return _vector_norm(grad)


def norms(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Γ of tensors of one device, where nobody looks at it: squares are added in float64, in which none overflows."""
    return torch._foreach_norm(list(grads), 2, widest(grads[0].device))  # vector_norm would copy tensors into that


def standardize(
    grads: Sequence[Tensor],
    *,
    centralize: bool = True,
    normalize: bool = True,
    eps: float = 1e-8,
    rows_of_one: bool = False,
) -> list[Tensor]:
    """Standardize gradients, each tensor by itself: ``φ(g) / (Γ(φ(g)) + eps)``.

    Args:
        grads: gradients of one device and any shape; float16 and bfloat16 ones are computed and returned in float32.
        centralize: apply φ (tensors of more than one dimension).
        normalize: divide by the norm; a zero gradient stays zero.
        eps: added to the norm, which has the unit of the gradient (paper, below equation 3).
        rows_of_one: also centralize tensors whose rows have one element, which sets their gradient to zero.

    Returns:
        Tensors of the same shapes, in float32 at least; the inputs are unchanged. With both switches off, float32 and
        float64 gradients are returned as they are, not copied.
    """
    if not grads:
        return []
    if normalize and _share_memory_well(grads):
        return _standardize_in_one_piece(grads, centralize, eps, rows_of_one)
    whole = [grad.to(working_dtype(grad)) for grad in grads]
    centred = [_centralize(grad, rows_of_one) for grad in whole] if centralize else whole
    if not normalize:
        standardized = centred
    elif _may_be_read(grads[0]):
        pairs = zip(whole, centred, strict=True)
        standardized = [_normalize(grad, moved, eps, rows_of_one if centralize else None) for grad, moved in pairs]
    else:
        lengths = norms(centred)
        standardized = [grad / (length + eps) for grad, length in zip(centred, lengths, strict=True)]
    return standardized


def _normalize(grad: Tensor, centred: Tensor, eps: float, rows_of_one: bool | None) -> Tensor:
    """Γ where a norm may be looked at. ``rows_of_one`` is None where nothing was centralized."""
    length = norm(centred)
    if not grad.numel() or _SAFE[length.dtype] < length.item() < math.inf:
        return centred / (length + eps)
    # The sum of the squares is beyond the dtype, or the sums of the means are: that of 1e20 in float32.
    scale = _largest(grad)
    centred = grad / scale if rows_of_one is None else _centralize(grad / scale, rows_of_one)
    return centred / (norm(centred) + eps / scale)


def _share_memory_well(grads: Sequence[Tensor]) -> bool:
    """Whether launches are what a step's time goes into, and one piece of memory can hold these gradients."""
    if torch.compiler.is_compiling():  # which makes few launches of many operations itself
        return False
    return not _may_be_read(grads[0]) and len({working_dtype(grad) for grad in grads}) == 1


def _standardize_in_one_piece(grads: Sequence[Tensor], centralize: bool, eps: float, rows_of_one: bool) -> list[Tensor]:
    """Standardize with two launches for each tensor that is centralized, and few for all together.

    The gradients are copied into one piece of memory, since no multi-tensor function divides each tensor by its own
    number that is on the device.
    """
    memory, parts = in_one_piece(grads)
    for part in parts:
        if centralize and has_centre(part.shape, rows_of_one):
            part.sub_(part.mean(dim=tuple(range(1, part.dim())), keepdim=True))
    divide(memory, parts, norms(parts), eps)
    return parts


def divide(memory: Tensor, parts: Sequence[Tensor], lengths: Sequence[Tensor], eps: float) -> None:
    """Divide what :func:`in_one_piece` has made by ``length + eps``, each part by its own length."""
    divisors = torch.stack(list(lengths)).add_(eps).to(memory.dtype).unbind()
    memory.div_(torch.cat([divisor.expand(part.numel()) for divisor, part in zip(divisors, parts, strict=True)]))


def in_one_piece(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies of tensors of one device and working dtype, made by one launch.

    Returns:
        The memory that all of them share, and the copies, with the strides of the tensors that have no gaps.
    """
    sizes = [tensor.numel() for tensor in tensors]
    memory = torch.empty(sum(sizes), dtype=working_dtype(tensors[0]), device=tensors[0].device)
    parts = [_shaped_like(part, tensor) for part, tensor in zip(torch.split(memory, sizes), tensors, strict=True)]
    torch._foreach_copy_(parts, list(tensors))
    return memory, parts


def _shaped_like(part: Tensor, tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return part.view(tensor.shape)
    return part.as_strided(tensor.shape, tensor.stride())


def _may_be_read(tensor: Tensor) -> bool:
    """Whether a look at a tensor's entries costs nothing; elsewhere it waits for the device, or breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _largest(grad: Tensor) -> Tensor:
    """The largest magnitude to scale by; 1 where it is zero, infinite or NaN, which no scale would mend."""
    largest = grad.abs().amax()
    return largest if 0 < largest < math.inf else torch.ones_like(largest)


_centralize = centralize  # the keyword of `standardize` hides the function
