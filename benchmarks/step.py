"""Time and memory of one optimizer step, SING beside torch's AdamW in the same run.

    python benchmarks/step.py [--model resnet18|bert|many-small] [--rounds 15] [--threads 1] [--device cpu]

Every optimizer steps in turn, round by round, so that a noisy machine slows them all alike; the medians are quoted,
and their ratio to ``AdamW, one by one``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from sing_plugins import SING, wrap

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    """The shapes of torchvision's ResNet18: 11.7 million parameters in 62 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    for width, before in ((64, 64), (128, 64), (256, 128), (512, 256)):
        convolutions: Shapes = [(width, before, 3, 3), *[(width, width, 3, 3)] * 3]
        if width != before:
            convolutions.append((width, before, 1, 1))
        for shape in convolutions:
            shapes += [shape, (width,), (width,)]
    return [*shapes, (1000, 512), (1000,)]


def bert() -> Shapes:
    """The shapes of a BERT of 4 layers and width 512: 28.8 million parameters in 69 tensors."""
    layer: Shapes = [(512, 512), (512,)] * 4 + [(2048, 512), (2048,), (512, 2048), (512,)] + [(512,)] * 4  # type: ignore[list-item]
    return [(30522, 512), (512, 512), (2, 512), (512,), (512,), *layer * 4]


def many_small() -> Shapes:
    """2,000 tensors of 256 entries: nothing but overhead."""
    return [(16, 16)] * 2000


MODELS: dict[str, Callable[[], Shapes]] = {"resnet18": resnet18, "bert": bert, "many-small": many_small}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW, one by one": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=False),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "SING, one by one": lambda params: SING(params, lr=1e-2, foreach=False),
    "SING, foreach": lambda params: SING(params, lr=1e-2, foreach=True),
    "SING, default": lambda params: SING(params, lr=1e-2),
    "SING without Lookahead": lambda params: SING(params, lr=1e-2, lookahead_k=None),
    "SING without softplus": lambda params: SING(params, lr=1e-2, softplus_beta=None),
    "wrap(AdamW)": lambda params: wrap(torch.optim.AdamW(params, lr=1e-3)),
}


def seconds(optimizer: Optimizer, steps: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / steps


def measure(model: str, rounds: int, device: str) -> list[dict[str, float | str]]:
    optimizers = {}
    for name, create in OPTIMIZERS.items():
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in MODELS[model]()]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizers[name] = create(params)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer, 5, device))  # one Lookahead cycle
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first makes the state
    reference = medians["AdamW, one by one"]
    return [
        {
            "optimizer": name,
            "milliseconds": 1000 * median,
            "ratio": median / reference,
            "state_bytes_per_parameter": _state_bytes(optimizers[name]),
        }
        for name, median in medians.items()
    ]


def _state_bytes(optimizer: Optimizer) -> float:
    entries = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    return sum(v.nbytes for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)) / entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all of them")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of 5 steps for each optimizer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    results = {model: measure(model, args.rounds + 1, args.device) for model in args.model or MODELS}
    if args.json:
        print(json.dumps({"torch": torch.__version__, "threads": args.threads, "results": results}, indent=1))
        return
    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s), medians of {args.rounds} rounds")
    for model, rows in results.items():
        print(f"\n{model}: {'optimizer':<24}{'ms a step':>10}{'ratio':>8}{'state bytes/parameter':>24}")
        for row in rows:
            print(
                f"{'':{len(model)}}  {row['optimizer']:<24}{row['milliseconds']:>10.2f}{row['ratio']:>8.2f}"
                f"{row['state_bytes_per_parameter']:>24.1f}"
            )


if __name__ == "__main__":
    main()
