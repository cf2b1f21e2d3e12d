"""PyTorch's generic expectations of an optimizer, through its own ``OptimizerInfo`` machinery.

``OptimizerInfo`` describes an optimizer (inputs, errors, schedulers); ``optims`` runs one test for each of them.
"""

from __future__ import annotations

import io
import itertools
import pickle
from copy import deepcopy
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from sing_plugins import SING, wrap

SCHEDULERS = (
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ExponentialLR(opt, gamma=0.99)],
    [lambda opt: ConstantLR(opt, factor=0.4, total_iters=4), lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: OneCycleLR(opt, max_lr=0.02, total_steps=400, cycle_momentum=False)],
)


def sing(name: str) -> Any:
    def create(params: Any, **options: Any) -> Optimizer:
        return SING(params, **{"host": name, **options})

    create.__name__ = f"SING_{name}"
    return create


def wrapped(host: type[Optimizer], **fixed: Any) -> Any:
    def create(params: Any, **options: Any) -> Optimizer:
        ours = {key: options.pop(key) for key in ("centralize", "normalize", "lookahead_k") if key in options}
        return wrap(host(params, **{**fixed, **options}), **ours)

    create.__name__ = f"Wrapped_{host.__name__}"
    return create


def sing_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    return [
        OptimizerInput(params=None, kwargs={"lr": 0.01}, desc="the paper's recipe"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.01)}, desc="tensor lr"),
        OptimizerInput(params=None, kwargs={"lr": 0.01, "weight_decay": 0.1, "decay_all": True}, desc="decay"),
        OptimizerInput(params=None, kwargs={"lr": 0.01, "centralize": False, "normalize": False}, desc="no φ, no Γ"),
        OptimizerInput(params=None, kwargs={"lr": 0.01, "lookahead_k": None}, desc="no Lookahead"),
    ]


def wrapped_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    return [
        OptimizerInput(params=None, kwargs={"lr": 0.01}, desc="standardization and Lookahead"),
        OptimizerInput(params=None, kwargs={"lr": 0.01, "weight_decay": 0.1}, desc="decay by the host"),
        OptimizerInput(params=None, kwargs={"lr": 0.01, "lookahead_k": None}, desc="no Lookahead"),
    ]


def error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    ours = [({"lr": -1.0}, "Invalid l.* -1.0"), ({"lookahead_k": 0}, "Invalid lookahead_k: 0")]
    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(OptimizerInput(params=None, kwargs=kwargs), error_type=ValueError, error_regex=regex)
        for kwargs, regex in ours
    ]


def info(create: Any, inputs: Any, **options: Any) -> OptimizerInfo:
    return OptimizerInfo(
        create,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=SCHEDULERS,
        supports_complex=False,
        **options,
    )


NATIVE = [
    info(sing(host), sing_inputs, supported_impls=("foreach",), not_og_supported_flags=("foreach", "maximize"))
    for host in ("adamw", "adabelief", "adafactor", "sgd")
]
WRAPPED = [
    info(wrapped(host, **fixed), wrapped_inputs, supported_impls=(), not_og_supported_flags=())
    for host, fixed in ((torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.RAdam, {}))
]
# timm's optimizers check neither their lr nor anything that torch would; old ones cannot clip where no gradient is
LAMB = info(wrapped(timm.optim.Lamb, max_grad_norm=None), wrapped_inputs, supported_impls=(), not_og_supported_flags=())
LAMB.optim_error_inputs_func = None
INFOS = [*NATIVE, *WRAPPED, LAMB]


def problem(device: str, dtype: torch.dtype, contiguous: bool = True) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    torch.manual_seed(0)
    if contiguous:
        weight, bias = torch.randn(10, 5, device=device, dtype=dtype), torch.randn(10, device=device, dtype=dtype)
    else:
        weight = torch.randn(10, 5, 2, device=device, dtype=dtype)[..., 0]
        bias = torch.randn(10, 2, device=device, dtype=dtype)[..., 0]
    return nn.Parameter(weight), nn.Parameter(bias), torch.randn(5, device=device, dtype=dtype)


def closure_of(optimizer: Optimizer, weight: Tensor, bias: Tensor, x: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


class TestGeneric(TestCase):
    @optims(INFOS)
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        if optim_info.optim_error_inputs_func is None:
            return
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = case.optimizer_error_input
            params = [nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
            self.assertEqual(case.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            expect = self.assertWarnsRegex if issubclass(case.error_type, Warning) else self.assertRaisesRegex
            with expect(case.error_type, case.error_regex):
                optim_info.optim_cls(params, **given.kwargs)

    @optims(INFOS, dtypes=[torch.float32])
    def test_goes_the_right_direction(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for contiguous, schedulers in itertools.product((True, False), ([], *optim_info.scheduler_inputs)):
            for given in optim_info.optim_inputs_func(device=device):
                weight, bias, x = problem(device, dtype, contiguous)
                optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
                created = [scheduler(optimizer) for scheduler in schedulers]
                closure = closure_of(optimizer, weight, bias, x)
                initial = closure().item()
                for _ in range(20):
                    loss = optimizer.step(closure)
                    for scheduler in created:
                        scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
                self.assertLess(closure().item(), initial, given.desc)

    @optims(NATIVE, dtypes=[torch.float64])
    def test_maximize_goes_the_other_direction(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        weight, bias, x = problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias], lr=0.01, maximize=True)
        closure = closure_of(optimizer, weight, bias, x)
        initial = closure().item()
        for _ in range(20):
            optimizer.step(closure)
        self.assertGreater(closure().item(), initial)

    @optims(NATIVE, dtypes=[torch.float64])
    def test_foreach_matches_forloop(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            results = []
            for foreach in (False, True):
                weight, bias, x = problem(device, dtype)
                optimizer = optim_info.optim_cls([weight, bias], **given.kwargs, foreach=foreach)
                for _ in range(8):
                    optimizer.step(closure_of(optimizer, weight, bias, x))
                results.append((weight, bias, [optimizer.state[p] for p in (weight, bias)]))
            self.assertEqual(*results, rtol=0, atol=0)

    @optims(INFOS, dtypes=[torch.float64])
    def test_default_dtype_does_not_matter(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        results = []
        previous = torch.get_default_dtype()
        try:
            for default in (torch.float32, torch.float64):
                torch.set_default_dtype(default)
                weight, bias, x = problem(device, dtype)
                optimizer = optim_info.optim_cls([weight, bias], lr=0.01)
                for _ in range(8):
                    optimizer.step(closure_of(optimizer, weight, bias, x))
                results.append((weight, bias))
        finally:
            torch.set_default_dtype(previous)
        self.assertEqual(*results, rtol=1e-6, atol=1e-6)

    @optims(INFOS, dtypes=[torch.float32])
    def test_param_groups_have_their_own_options(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        weight, bias, x = problem(device, dtype)
        before = bias.detach().clone()
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.0, "weight_decay": 0.0}]
        optimizer = optim_info.optim_cls(groups, lr=0.01, weight_decay=0.1)
        for _ in range(8):
            optimizer.step(closure_of(optimizer, weight, bias, x))
        self.assertEqual(bias, before, rtol=0, atol=0)

    @optims(INFOS, dtypes=[torch.float32])
    def test_step_does_nothing_without_gradients(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, _ = problem(device, dtype)
            before = deepcopy([weight, bias])
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            for _ in range(6):
                optimizer.step()
            self.assertEqual([weight, bias], before, rtol=0, atol=0)

    @optims(INFOS, dtypes=[torch.float32])
    def test_step_does_nothing_for_zero_gradients(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        weight, bias, _ = problem(device, dtype)
        before = deepcopy([weight, bias])
        optimizer = optim_info.optim_cls([weight, bias], lr=0.01, weight_decay=0.0)
        for _ in range(6):
            weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
            optimizer.step()
        self.assertEqual([weight, bias], before, rtol=0, atol=0)

    @optims(INFOS, dtypes=[torch.float32])
    def test_gradients_are_never_changed(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, x = problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            for _ in range(6):
                closure_of(optimizer, weight, bias, x)()
                grads, versions = [weight.grad, bias.grad], [weight.grad._version, bias.grad._version]
                optimizer.step()
                self.assertTrue(weight.grad is grads[0] and bias.grad is grads[1])
                self.assertEqual([grad._version for grad in grads], versions)

    @optims(INFOS, dtypes=[torch.float32])
    def test_can_be_printed(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        weight, bias, x = problem(device, dtype)
        optimizer = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.5}], lr=0.01)
        optimizer.step(closure_of(optimizer, weight, bias, x))
        self.assertIn("lr: 0.5", repr(optimizer))

    @optims(INFOS, dtypes=[torch.float64])
    def test_state_dict_is_deterministic_and_resumes(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, x = problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            closure = closure_of(optimizer, weight, bias, x)
            for _ in range(7):
                optimizer.step(closure)
            weight_c, bias_c = deepcopy(weight), deepcopy(bias)
            twin = optim_info.optim_cls([weight_c, bias_c], **given.kwargs)
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
            untouched = deepcopy(saved)
            twin.load_state_dict(saved)
            self.assertEqual(saved, untouched)
            closure_c = closure_of(twin, weight_c, bias_c, x)
            for _ in range(7):
                optimizer.step(closure)
                twin.step(closure_c)
                self.assertEqual((weight, bias), (weight_c, bias_c), rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), twin.state_dict())

    @optims(NATIVE, dtypes=[torch.float64])
    def test_older_state_dicts_load(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        weight, bias, x = problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias], lr=0.01)
        optimizer.step(closure_of(optimizer, weight, bias, x))
        old = deepcopy(optimizer.state_dict())
        for flag in optim_info.not_og_supported_flags:
            del old["param_groups"][0][flag]
        for state in old["state"].values():
            state["step"] = state["step"].item()
        optimizer.load_state_dict(old)
        optimizer.step(closure_of(optimizer, weight, bias, x))
        self.assertTrue(all(torch.is_tensor(state["step"]) for state in optimizer.state.values()))

    @optims(INFOS, dtypes=[torch.float32])
    def test_loads_from_and_to_named_state_dicts(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for named_first in (True, False):
            weight, bias, x = problem(device, dtype)
            names = [("weight", weight), ("bias", bias)]
            optimizer = optim_info.optim_cls(names if named_first else [weight, bias], lr=0.01)
            optimizer.step(closure_of(optimizer, weight, bias, x))
            other = optim_info.optim_cls([weight, bias] if named_first else names, lr=0.01)
            other.load_state_dict(optimizer.state_dict())
            self.assertEqual(other.state_dict()["state"], optimizer.state_dict()["state"])

    @optims(INFOS, dtypes=[torch.float32])
    def test_pickle_and_deepcopy_keep_everything_public(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        weight, bias, x = problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias], lr=0.01)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, weight, bias, x))

        def public(o: Optimizer) -> set[str]:
            return {name for name in o.__dict__ if not name.startswith("_")}

        for twin in (deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            self.assertEqual(public(optimizer), public(twin))
            self.assertEqual(optimizer.state_dict(), twin.state_dict())

    @optims(INFOS, dtypes=[torch.float32])
    def test_hooks_are_called_in_order_and_can_be_removed(
        self, device: str, dtype: torch.dtype, optim_info: Any
    ) -> None:
        weight, bias, x = problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias], lr=0.01)
        calls: list[str] = []
        handles = [
            optimizer.register_step_pre_hook(lambda *_: calls.append("step pre")),
            optimizer.register_step_post_hook(lambda *_: calls.append("step post")),
            optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save pre")),
            optimizer.register_state_dict_post_hook(lambda _, state_dict: calls.append("save post")),
            optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre")),
            optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post")),
        ]
        optimizer.step(closure_of(optimizer, weight, bias, x))
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(calls, ["step pre", "step post", "save pre", "save post", "load pre", "load post"])
        for handle in handles:
            handle.remove()
        optimizer.step()
        self.assertEqual(len(calls), 6)

    @optims(INFOS, dtypes=[torch.float32])
    def test_state_dict_hooks_may_replace_the_state_dict(
        self, device: str, dtype: torch.dtype, optim_info: Any
    ) -> None:
        weight, bias, x = problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias], lr=0.01)
        optimizer.step(closure_of(optimizer, weight, bias, x))

        def with_rate(state_dict: dict[str, Any], lr: float) -> dict[str, Any]:
            return {**state_dict, "param_groups": [{**group, "lr": lr} for group in state_dict["param_groups"]]}

        optimizer.register_state_dict_post_hook(lambda _, state_dict: with_rate(state_dict, 0.5))
        self.assertEqual(optimizer.state_dict()["param_groups"][0]["lr"], 0.5)
        optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: with_rate(state_dict, 0.25))
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.25)

    @optims(INFOS)
    def test_complex_gradients_are_refused(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        param = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        param.grad = torch.randn_like(param)
        optimizer = optim_info.optim_cls([param], lr=0.01)
        with self.assertRaisesRegex(RuntimeError, "does not support complex gradients"):
            optimizer.step()

    @optims(NATIVE, dtypes=[torch.float32])
    def test_parameters_of_mixed_dtypes_share_an_optimizer(
        self, device: str, dtype: torch.dtype, optim_info: Any
    ) -> None:
        params = [
            nn.Parameter(torch.randn(4, 3, dtype=d))
            for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        ]
        for foreach in (True, False):
            optimizer = optim_info.optim_cls(params, lr=0.01, foreach=foreach)
            for _ in range(6):
                for param in params:
                    param.grad = torch.ones_like(param) * torch.arange(3).to(param.dtype)
                optimizer.step()
        self.assertTrue(all(torch.isfinite(param).all() for param in params))


instantiate_device_type_tests(TestGeneric, globals(), only_for=("cpu",))
