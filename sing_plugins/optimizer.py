"""The SING optimizer: its param groups, its state dict, and the update of one batch of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sing_plugins import states
from sing_plugins.batches import Batch, gradient
from sing_plugins.checks import ParamGroup, check_saved_by, check_saved_group, check_saved_state
from sing_plugins.group_options import SOFTPLUS_BETA, adopt_paper_group, check_group, host_options
from sing_plugins.hosts import Totals
from sing_plugins.kernels import asked_for, of_torch, takes_state
from sing_plugins.lookahead import SLOW
from sing_plugins.nonfinite import SKIPPED, looks
from sing_plugins.options import FOREACH, FUSED, PROPAGATE, plain
from sing_plugins.sharded import ShardedTotals, local
from sing_plugins.standardize import is_dtensor, working_dtype
from sing_plugins.step import Standardizing
from sing_plugins.update import COMPENSATION, apply


class SING(Standardizing):
    """Standardize every tensor's gradient, then update with a host optimizer (paper, Algorithm 2).

    A step centralizes each gradient (φ), divides it by its norm (Γ), decays the weights, lets the host update them
    with a softplus-calibrated denominator, and every ``lookahead_k`` steps moves them back to the slow weights of
    Lookahead. ``p.grad`` is not changed, no state exists before the first step, and everything that a step needs is
    in :meth:`state_dict`, so that training resumes exactly at any phase of the Lookahead cycle.

    Args:
        params: parameters, named parameters or param groups; read once, so generators are fine.
        lr: learning rate, a number or a tensor of one element. Usually ten times AdamW's best: the highest that is
            stable (paper C.2). Default 5e-3.
        betas: decay rates of the first and second moment, for the hosts adamw and adabelief. Default (0.9, 0.999).
        eps: added to the gradient's norm (paper, below equation 3); also to the host's denominator where softplus is
            off, and by adabelief to its variance (``eps / N`` with ``softplus_relative``). Default 1e-8.
        weight_decay: decoupled: ``p ← p (1 - lr · weight_decay)`` before the update. Usually a tenth of AdamW's.
            Reaches tensors of more than one dimension only, unless ``decay_all``. Default 0.
        foreach: torch's name for ``implementation="foreach"`` (True) and ``"loop"`` (False); None leaves it to that.
        maximize: ascend instead of descending.
        capturable: keep the counts of steps and Lookahead's phase on the parameters' device, so that a CUDA graph of a
            step can be replayed: it counts on, and it reads ``lr`` from the tensor on the device that is given there
            (a number is captured as it is). One step has to be made before the capture. Default False: such counts
            are kept on the CPU, where they cost less.
        implementation: ``"fused"``, ``"foreach"``, ``"loop"``, or ``"auto"`` (default): fused where a kernel takes the
            tensor (see :mod:`sing_plugins.kernels`), else foreach on accelerators and loop on the CPU. What is asked
            to be fused and cannot be is updated by foreach.
        host: ``"adamw"``, ``"adabelief"``, ``"adafactor"`` or ``"sgd"``; for any other optimizer see
            :func:`sing_plugins.wrap`.
        momentum: sgd (default 0.9); adafactor's first moment (default 0: none).
        nesterov: sgd (default False).
        decay_rate: adafactor: its second moment decays by ``1 - step**-decay_rate``. Default 0.8.
        clip_threshold: adafactor: largest root mean square of an update before lr. Default 1.
        centralize: φ, for tensors of more than one dimension (equation 2).
        normalize: Γ (equation 3).
        softplus_beta: sharpness of the softplus that replaces ``+ eps`` in the host's denominator, or None for
            ``+ eps``. Default 50. The host sgd has no denominator and does not use it.
        softplus_relative: the same in proportion to the tensor's size, in place of the one number: of N entries, β is
            ``softplus_relative · √N``, since a gradient of norm 1 has entries of about 1/√N. With it the best lr is
            near AdamW's (docs/size.md). Default None.
        lookahead_k: Lookahead's period in steps, or None for no Lookahead. Default 5.
        lookahead_alpha: the share of the fast weights in a Lookahead merge. Default 0.5.
        centralize_rows_of_one: a tensor whose rows have one element (``n×1``) is not centralized, since its gradient
            would become zero for ever. That deviates from the paper; True restores the paper's rule.
        decay_all: let weight decay reach tensors of zero and one dimension too, as torch.optim.AdamW does. With it
            and the four components off (``centralize=normalize=False, softplus_beta=lookahead_k=None``), the host
            adamw equals torch.optim.AdamW.
        nonfinite: what a step does whose gradients have entries that are NaN or infinite. ``"propagate"`` (default):
            as torch's optimizers, it takes them in, but normalization spreads one over its whole tensor. ``"skip"``:
            nothing of the step happens, for no parameter; the param groups count such steps in ``skipped_steps``, and
            the first one is logged. ``"raise"``: it raises before anything has changed. Either looks at the gradients
            once more in every step, for which an accelerator is waited for.
        kahan_sum: for parameters in float16 and bfloat16: keep what rounding loses in another tensor of their dtype
            (2 bytes a parameter), and add it to the next step's. Default False.

    Parameters in float16 and bfloat16 keep their state in float32. They are updated in float32 and then rounded to
    their dtype, in which a change below half a unit in the last place is lost (of 1.0 in bfloat16, one below 0.002);
    ``kahan_sum`` keeps it. A zero gradient gives a zero update.

    Raises:
        ValueError: a hyper-parameter that is not accepted, or that the host does not have.
        RuntimeError: at a step: sparse or complex gradients, or parameters that are flat pieces of sharded tensors.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        implementation: str = "auto",
        host: str = "adamw",
        momentum: float | None = None,
        nesterov: bool | None = None,
        decay_rate: float | None = None,
        clip_threshold: float | None = None,
        centralize: bool = True,
        normalize: bool = True,
        softplus_beta: float | None = SOFTPLUS_BETA,
        softplus_relative: float | None = None,
        lookahead_k: int | None = 5,
        lookahead_alpha: float = 0.5,
        centralize_rows_of_one: bool = False,
        decay_all: bool = False,
        nonfinite: str = PROPAGATE,
        kahan_sum: bool = False,
    ) -> None:
        given = {
            "betas": betas,
            "momentum": momentum,
            "nesterov": nesterov,
            "decay_rate": decay_rate,
            "clip_threshold": clip_threshold,
        }
        defaults: ParamGroup = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "implementation": implementation,
            "differentiable": False,  # unpickling a torch optimizer adds it to the defaults
            "host": host,
            "centralize": centralize,
            "normalize": normalize,
            "softplus_beta": softplus_beta,
            "softplus_relative": softplus_relative,
            "lookahead_k": lookahead_k,
            "lookahead_alpha": lookahead_alpha,
            "lookahead_step": 0,
            "centralize_rows_of_one": centralize_rows_of_one,
            "decay_all": decay_all,
            "nonfinite": nonfinite,
            SKIPPED: 0,
            "kahan_sum": kahan_sum,
            **host_options(host, {name: plain(value) for name, value in given.items() if value is not None}),
        }
        defaults = {name: plain(value) for name, value in defaults.items()}
        check_group(defaults, host)
        super().__init__(params, defaults)

    _can_be_traced = True

    @property
    def host(self) -> str:
        """The name of the host optimizer."""
        return str(self.defaults["host"])

    def _check_group(self, group: ParamGroup) -> None:
        check_group(group, self.host)

    def _add_param_group(self, param_group: ParamGroup) -> None:
        if isinstance(param_group, dict):
            param_group.update({name: plain(param_group[name]) for name in self.defaults if name in param_group})
            self._check_group({**self.defaults, **param_group})
        super(Standardizing, self).add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            adopt_paper_group(group)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for values in self.state.values():
            if "step" in values and not isinstance(values["step"], Tensor):  # in older files
                values["step"] = states.counter(values["step"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SING with the same host, or of the optimizer file published with the paper.

        Hyper-parameters are those of the state dict, as in every torch optimizer.

        Raises:
            ValueError: the state dict is another host's or another optimizer's, whose moments are those of gradients
                that were not standardized; or it is truncated or another model's. Nothing is changed then.
        """
        accepted: dict[str, Any] = {}

        def check(_: object, hooked: dict[str, Any]) -> None:
            for group in hooked["param_groups"]:
                check_saved_by("adamw" if "grad_central" in group else group.get("host"), self.host)
                group = dict(group)
                adopt_paper_group(group)
                check_saved_group(group, self.defaults, self._prefix, self._check_group)
            check_saved_state(hooked, self.param_groups, states.needed, (SLOW, COMPENSATION))
            accepted.update(hooked)

        # After the user's own hooks, which may convert what they load, and before those that look at what was loaded.
        last = self.register_load_state_dict_pre_hook(check)
        first = self.register_load_state_dict_post_hook(
            lambda _: states.restore_precision(self.param_groups, self.state, accepted), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def _slow_weight(self, param: Tensor) -> Tensor:
        return param.to(working_dtype(param), copy=True)

    def _lacks_state(self, param: Tensor, group: ParamGroup) -> bool:
        return not states.is_complete(param, group, self.state.get(param, {}))

    def _implementation(self, group: ParamGroup) -> tuple[str, str | None]:
        return asked_for(group), group["host"]

    def _update(self, batch: Batch, group: ParamGroup, merge: bool | Tensor) -> None:
        if batch.implementation != FUSED:
            self._update_by_torch(batch, group, merge)
            return
        device = batch.params[0].device
        taken: list[Tensor] = []
        kept: list[dict[str, Any]] = []
        others: list[Tensor] = []
        for param, state in zip(batch.params, states.complete(batch.params, group, self.state), strict=True):
            if takes_state(param, state, group, merge):
                taken.append(param)
                kept.append(state)
            else:
                others.append(param)
        if len({param.data_ptr() for param in taken}) < len(taken):  # threads would meet in the same memory
            taken, others = [], batch.params
        if taken:
            self._kernels[device.type].step(taken, list(map(gradient, taken)), kept, group, merge)
        for left in [others] if others and of_torch(device) == FOREACH else [[param] for param in others]:
            self._update(Batch(of_torch(device), left), group, merge)

    def _update_by_torch(self, batch: Batch, group: ParamGroup, merge: bool | Tensor) -> None:
        kept, totals = states.complete(batch.params, group, self.state), Totals(batch.params)
        if batch.shards is not None:
            kept = [{name: local(value) for name, value in state.items()} for state in kept]
            totals = ShardedTotals(batch.params)
        params = list(map(local, batch.params))
        apply(params, self._standardized(batch, group), kept, group, totals, merge, self._lookahead)
        if batch.shards is not None:
            torch.autograd.graph.increment_version(batch.params)

    def _traced_step(self) -> None:
        """A step as torch.compile sees it: nothing but operations on tensors that exist."""
        for group in self.param_groups:
            phase: list[Any] = []
            batches = self._init_group(group, -1, phase, [], [], [], [], [])
            due = self._lookahead.count(group, phase[0])
            for number in range(batches):
                params: list[Tensor] = []
                grads: list[Tensor] = []
                owners: list[int] = []
                names: list[str] = []
                values: list[Tensor] = []
                self._init_group(group, number, [], params, grads, owners, names, values)
                kept: list[dict[str, Any]] = [{} for _ in params]
                for owner, name, value in zip(owners, names, values, strict=True):
                    kept[owner][name] = value
                apply(params, self._standardize(grads, group), kept, group, Totals(params), due, self._lookahead)

    def _init_group(
        self,
        group: ParamGroup,
        number: int,
        phase: list[Any],
        params: list[Tensor],
        grads: list[Tensor],
        owners: list[int],
        names: list[str],
        values: list[Tensor],
    ) -> int:
        """Make what is missing of a param group's state, and list a batch of it.

        torch.compile runs a method of this name when it traces a step, and knows what is in the lists afterwards.

        Args:
            group: the param group.
            number: of the batch; below zero for none.
            phase: to be filled with Lookahead's phase.
            params, grads: to be filled with the batch's parameters and their gradients.
            owners, names, values: to be filled with the batch's states: whose, which, and the tensor.

        Returns:
            The number of batches.

        Raises:
            RuntimeError: the group has sharded tensors or flat pieces of them, or looks at gradients.
        """
        self._whole.check(self.param_groups)
        batches = self._batches(group)
        if looks(group, self._prefix) or any(is_dtensor(batch.params[0]) for batch in batches):
            raise RuntimeError(
                "A step that is compiled takes no sharded tensors, and no other nonfinite than 'propagate'. "
                "Leave it uncompiled."
            )
        group["capturable"] = True  # as torch.compile takes it for
        updated = [param for batch in batches for param in batch.params]
        for param in self._lookahead.begin(group, updated, self.state):
            self.state[param][SLOW] = self._slow_weight(param)
        self._lookahead.give_up(updated)  # nobody notes how a compiled step leaves the weights
        phase.append(self._lookahead.phase(group))
        if number >= 0:
            params += batches[number].params
            grads += map(gradient, params)
            for owner, state in enumerate(states.complete(params, group, self.state)):
                for name, value in state.items():
                    owners.append(owner)
                    names.append(name)
                    values.append(value)
        return len(batches)
