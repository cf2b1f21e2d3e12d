"""The shapes of the parameters of real models, written down so that no framework is needed to measure a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

Shape = tuple[int, ...]
Shapes = list[Shape]


def resnet18() -> Shapes:
    """Torchvision's ResNet18: 11.7 million parameters in 62 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    for width, before in ((64, 64), (128, 64), (256, 128), (512, 256)):
        convolutions: Shapes = [(width, before, 3, 3), *[(width, width, 3, 3)] * 3]
        if width != before:
            convolutions.append((width, before, 1, 1))
        for shape in convolutions:
            shapes += [shape, (width,), (width,)]
    return [*shapes, (1000, 512), (1000,)]


def vit_small() -> Shapes:
    """timm's vit_small_patch16_224: 22.1 million parameters in 152 tensors."""
    norm: Shapes = [(384,), (384,)]
    block = [*norm, *linear(384, 1152), *linear(384, 384), *norm, *linear(384, 1536), *linear(1536, 384)]
    return [(1, 1, 384), (1, 197, 384), (384, 3, 16, 16), (384,), *block * 12, *norm, *linear(384, 1000)]


def bert_base() -> Shapes:
    """BERT base: 109.5 million parameters in 199 tensors."""
    norm: Shapes = [(768,), (768,)]
    layer = [*linear(768, 768) * 4, *norm, *linear(768, 3072), *linear(3072, 768), *norm]
    return [(30522, 768), (512, 768), (2, 768), *norm, *layer * 12, *linear(768, 768)]


def linear(inputs: int, outputs: int) -> Shapes:
    """A linear layer's weight and bias."""
    return [(outputs, inputs), (outputs,)]


def small(count: int) -> Shapes:
    """``count`` tensors of 256 entries: nothing but overhead."""
    return [(16, 16)] * count


def matrices(count: int, total: int) -> Shapes:
    """``count`` equal matrices, as square as can be, of about ``total`` entries together."""
    each = total // count
    rows = next(rows for rows in range(math.isqrt(each), 0, -1) if each % rows == 0)
    return [(rows, each // rows)] * count


def entries(shapes: Iterable[Shape]) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in shapes)


MODELS: dict[str, Callable[[], Shapes]] = {
    "ResNet18": resnet18,
    "ViT-S": vit_small,
    "BERT base": bert_base,
    "2,000 × 256": lambda: small(2_000),
    "10,000 × 256": lambda: small(10_000),
}
REAL = ("ResNet18", "ViT-S", "BERT base")
