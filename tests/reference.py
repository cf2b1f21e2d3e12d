"""A slow reference of SING in float64, written from the paper; the optimizers are compared with it at every step.

One tensor, one line of the paper at a time; no code is shared with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def centralized(grad: Tensor, rows_of_one: bool = False) -> Tensor:
    """φ of Algorithm 2, without tensors whose rows have one element."""
    if grad.dim() <= 1 or (grad[0].numel() == 1 and not rows_of_one):
        return grad
    rows = [row - row.sum() / row.numel() for row in grad]
    return torch.stack(rows)


def normalized(grad: Tensor, eps: float) -> Tensor:
    """Division by Γ (equations 2 and 3)."""
    return grad / (math.sqrt(float((grad * grad).sum())) + eps)


def softplus(x: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(x * beta, torch.zeros_like(x)) / beta


@dataclass
class Reference:
    """One parameter's trajectory under SING, in float64."""

    param: Tensor
    host: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    decay_rate: float = 0.8
    clip_threshold: float = 1.0
    centralize: bool = True
    normalize: bool = True
    softplus_beta: float | None = 50.0
    softplus_relative: float | None = None
    lookahead_k: int | None = 5
    lookahead_alpha: float = 0.5
    centralize_rows_of_one: bool = False
    decay_all: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        self.param = self.param.detach().double().clone()
        self.slow = self.param.clone()

    def step(self, grad: Tensor, lr: float) -> None:
        grad = grad.detach().double()
        self.steps += 1
        if self.centralize:
            grad = centralized(grad, self.centralize_rows_of_one)
        if self.normalize:
            grad = normalized(grad, self.eps)
        if self.param.dim() > 1 or self.decay_all:
            self.param = self.param * (1 - lr * self.weight_decay)
        self.param = self.param - lr * getattr(self, f"_{self.host}")(grad, lr)
        if self.lookahead_k is not None and self.steps % self.lookahead_k == 0:
            self.slow = self.slow + self.lookahead_alpha * (self.param - self.slow)
            self.param = self.slow.clone()
        if self.lookahead_k is not None:
            self.state["lookahead_params"] = self.slow

    def _average(self, key: str, value: Tensor, beta: float) -> Tensor:
        self.state[key] = beta * self.state.get(key, torch.zeros_like(value)) + (1 - beta) * value
        return self.state[key]

    def _safe(self, root: Tensor, eps: float | None = None) -> Tensor:
        if self.softplus_relative is not None:
            size = math.sqrt(root.numel())
            return softplus(size * root, self.softplus_relative) / size  # that of a gradient of root mean square 1
        if self.softplus_beta is not None:
            return softplus(root, self.softplus_beta)
        return root + (self.eps if eps is None else eps)

    def _adamw(self, grad: Tensor, lr: float) -> Tensor:
        beta1, beta2 = self.betas
        m_hat = self._average("exp_avg", grad, beta1) / (1 - beta1**self.steps)
        v_hat = self._average("exp_avg_sq", grad**2, beta2) / (1 - beta2**self.steps)
        return m_hat / self._safe(v_hat.sqrt())

    def _adabelief(self, grad: Tensor, lr: float) -> Tensor:
        beta1, beta2 = self.betas
        m = self._average("exp_avg", grad, beta1)
        eps = self.eps if self.softplus_relative is None else self.eps / grad.numel()  # that of a mean square of 1
        self.state["exp_avg_var"] = self._average("exp_avg_var", (grad - m) ** 2, beta2) + eps
        s_hat = self.state["exp_avg_var"] / (1 - beta2**self.steps)
        return m / (1 - beta1**self.steps) / self._safe(s_hat.sqrt())

    def _adafactor(self, grad: Tensor, lr: float) -> Tensor:
        beta2 = 1 - self.steps**-self.decay_rate
        square = grad**2 + 1e-30
        if grad.dim() < 2:
            v_hat = self._average("exp_avg_sq", square, beta2)
        else:
            row = self._average("exp_avg_sq_row", square.mean(-1), beta2)
            column = self._average("exp_avg_sq_col", square.mean(-2), beta2)
            v_hat = (row / row.mean(-1, keepdim=True)).unsqueeze(-1) * column.unsqueeze(-2)
        root = v_hat.sqrt()
        update = grad / self._safe(root, eps=0.0)
        rms = update.square().mean().sqrt()
        update = update / torch.clamp(rms / self.clip_threshold, min=1.0)
        if self.momentum:
            update = self._average("exp_avg", lr * update, self.momentum) / lr
        return update

    def _sgd(self, grad: Tensor, lr: float) -> Tensor:
        if not self.momentum:
            return grad
        buffer = self.momentum * self.state.get("momentum_buffer", torch.zeros_like(grad)) + grad
        self.state["momentum_buffer"] = buffer
        return grad + self.momentum * buffer if self.nesterov else buffer
