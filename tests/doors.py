"""Random names and options for every door of SING, what has to come of them, and the check of what did.

A door builds an optimizer from what a user gives. The tables here say of every value what the optimizer has to have of
it, in words of their own: nothing is read from the package's tables.
"""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

import sing_plugins
from sing_plugins import SING
from sing_plugins.wrapper import Wrapped

OURS = Path(sing_plugins.__file__).parents[1]


class Word:
    """A value that a table speaks of by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


REFUSED, LEFT_OUT = Word("REFUSED"), Word("LEFT_OUT")


@dataclass(frozen=True)
class Case:
    """A value of an option.

    Attributes:
        given: by the user.
        typed: what the optimizer has then; REFUSED if nobody takes the value, LEFT_OUT if it stands for the default.
        may_refuse: whether an error is right too.
    """

    given: Any
    typed: Any = REFUSED
    may_refuse: bool = False

    def __repr__(self) -> str:
        return f"{self.given!r} ({self.typed!r})"


@dataclass
class Fault:
    """Why something has to be refused.

    Attributes:
        argument: what an error names.
        given: its value.
        whose: "ours": the error names both; "theirs": it may be a framework's own.
    """

    argument: str
    given: Any
    whose: str = "ours"


@dataclass
class Expected:
    """What has to come of a configuration: one of the faults named, or else the optimizer and its options."""

    host: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    maybe: list[Fault] = field(default_factory=list)  # what may be refused, too
    wrapped: bool = False
    exactly: type | None = None  # another framework's own optimizer, which is what was named


@dataclass
class Attempt:
    """A door, with all that is given.

    Attributes:
        given: for the report of a failure.
        build: goes through the door.
        model: what it is given.
        expected: what has to come of it.
        backward: computes the model's gradients; None for the tiny model's.
        registered: what the door's framework has registered.
    """

    given: Any
    build: Callable[[], Optimizer]
    model: nn.Module
    expected: Expected
    backward: Callable[[], object] | None = None
    registered: Callable[[], Any] = tuple

    def __repr__(self) -> str:
        return f"{self.given!r}"


# ------------------------------------------------------------------------------------------------------------- values

HUGE = 10**400
NO_NUMBERS = (
    *(math.nan, math.inf, -math.inf, -1, -0.5, True, "fast", "", "nan", "-inf", "1e400", "-1", "none of it", "1 2"),
    *([], [0.1], (), {}, 1j, b"x", object, HUGE, -(10**400), np.float32(np.nan), np.array([0.1, 0.2])),
    *(torch.tensor([0.1, 0.2]), torch.tensor(math.nan), torch.tensor(-1.0), torch.empty(0), torch.zeros(40, 40)),
    *(torch.ones(2, device="meta"), torch.ones((), device="meta"), np.array("x"), np.zeros((9, 99)), Decimal("NaN")),
    *([0.1] * 500, "x" * 5000, {"a": 1}, {0.1}, lambda: 0.1),
)
NO_FLAGS = ("maybe", "", "2", 2, 0.5, math.nan, [], [True], {}, object, torch.ones(2), np.array([True, False]), b"1")
NO_WORDS = (
    "everything",
    "",
    " ",
    3,
    True,
    [],
    ["loop"],
    object,
    torch.ones(2),
    np.array(["norm", "none"]),
    b"none",
    1j,
)
NO_PAIRS = (
    *("0.9", "0.9:", "a:b", "", "0.9:0.9:0.9", (), (0.9,), (0.9, 0.9, 0.9), (1.0, 0.9), (0.9, -0.1), (math.nan, 0.9)),
    *(0.9, True, object, {}, torch.ones(3), torch.tensor(0.9), np.array([0.5, 2.0]), (0.9, "x"), ((0.9, 0.9), 0.9)),
    *([None, 0.9], (0.9, torch.ones(2)), (0.9, 10**400), 1j),
)


def numbers(*good: float, also_bad: tuple[Any, ...] = ()) -> tuple[list[Case], list[Case]]:
    typed = [
        case
        for x in good
        for case in (
            Case(x, x),
            Case(np.float64(x), x),
            Case(np.float32(x), float(np.float32(x))),
            Case(np.array(x), x),
        )
    ]
    texts = [case for x in good for case in (Case(str(x), x), Case(f" {x:e}", float(f"{x:e}")))]
    lenient = [Case(Fraction(1, 2), 0.5, True), Case(Decimal("0.5"), 0.5, True), Case(torch.tensor(0.5), 0.5, True)]
    bad = [Case(value) for value in (*NO_NUMBERS, *also_bad)]
    return [*typed, *lenient, *bad], texts


def flags() -> tuple[list[Case], list[Case]]:
    typed = [case for x in (True, False) for case in (Case(x, x), Case(np.bool_(x), x))]
    texts = [Case("true", True), Case("False", False), Case("1", True), Case("no", False), Case("ON", True)]
    texts += [Case(1, True), Case(0, False), Case(np.int64(1), True)]
    return [*typed, *map(Case, NO_FLAGS)], texts


def words(*good: str) -> tuple[list[Case], list[Case]]:
    return [*(Case(x, x) for x in good), *map(Case, NO_WORDS)], [Case(x.upper(), x) for x in good]


def pairs() -> tuple[list[Case], list[Case]]:
    typed = [Case((0.5, 0.75), (0.5, 0.75)), Case([0.5, 0.75], (0.5, 0.75)), Case((0, 0.0), (0.0, 0.0))]
    typed += [Case((np.float32(0.5), 0.75), (0.5, 0.75))]
    typed += [Case(value, (0.5, 0.75), True) for value in (np.array([0.5, 0.75]), torch.tensor([0.5, 0.75]))]
    return [*typed, *map(Case, NO_PAIRS)], [Case(x, (0.5, 0.75)) for x in ("0.5:0.75", "(0.5, 0.75)", "[.5,.75]")]


def with_none(cases: tuple[list[Case], list[Case]], typed: Any = None) -> tuple[list[Case], list[Case]]:
    """None is a value, or stands for the default."""
    texts = [Case("none", None), Case("NULL", None)] if typed is None else []
    return [*cases[0], Case(None, typed)], [*cases[1], *texts]


Table = dict[str, tuple[list[Case], list[Case]]]

ABOVE_ZERO = (0, 0.0, "0")
RATE = (
    [case for case in numbers(0.01, 0.5, 0, also_bad=(None,))[0] if not isinstance(case.given, torch.Tensor)]
    + [Case(torch.tensor(0.25), 0.25), Case(torch.tensor([0.25]), 0.25), Case(torch.tensor([0.1, 0.2]))]
    + [Case(value) for value in (torch.tensor(math.nan), torch.tensor(-1.0), torch.empty(0), torch.tensor(1j))]
    + [Case(torch.ones((), device="meta"))],
    numbers(0.01, 0.5)[1],
)
# option -> (cases, further ones where strings are read)
STANDARDIZING: Table = {
    "centralize": flags(),
    "normalize": flags(),
    "lookahead_k": with_none(
        (
            [
                *(Case(x, x) for x in (1, 2, 5, 10**6)),
                Case(np.int64(2), 2),
                *map(Case, (2.5, 0, "0", "2.5", *(bad for bad in NO_NUMBERS if bad is not HUGE))),
            ],
            [Case("5", 5), Case(" 2", 2)],
        )
    ),
    "lookahead_alpha": numbers(0.5, 1, 1e-3, also_bad=(0, 1.5, None)),
    "centralize_rows_of_one": flags(),
    "nonfinite": words("propagate", "skip", "raise"),
}
NATIVE: Table = {
    **STANDARDIZING,
    "lr": RATE,
    "eps": numbers(1e-8, 1e-3, also_bad=(*ABOVE_ZERO, None)),
    "weight_decay": numbers(0.01, 0.5, 0, also_bad=(None,)),
    "softplus_beta": with_none(numbers(50, 0.5, also_bad=ABOVE_ZERO)),
    "softplus_relative": with_none(numbers(1, 0.25, also_bad=ABOVE_ZERO)),
    "decay_all": flags(),
    "maximize": flags(),
    "capturable": flags(),
    "foreach": with_none(flags()),
    "kahan_sum": flags(),
    "implementation": words("fused", "foreach", "loop", "auto"),
}
BETAS = with_none(pairs(), LEFT_OUT)
MOMENTUM = with_none(numbers(0.5, 0, also_bad=(1, 1.5, "1")), LEFT_OUT)
OF_HOST: dict[str, Table] = {
    "adamw": {"betas": BETAS},
    "adabelief": {"betas": BETAS},
    "sgd": {"momentum": MOMENTUM, "nesterov": with_none(flags(), LEFT_OUT)},
    "adafactor": {
        "momentum": MOMENTUM,
        "decay_rate": with_none(numbers(0.5, 0.8, also_bad=ABOVE_ZERO), LEFT_OUT),
        "clip_threshold": with_none(numbers(0.5, 2, also_bad=ABOVE_ZERO), LEFT_OUT),
    },
}
SOMEHOST = {option: cases for table in OF_HOST.values() for option, cases in table.items()}


def _of_host(*cases: tuple[Any, Any]) -> tuple[list[Case], list[Case]]:
    """What torch's own optimizers take and refuse; they take infinity, which is theirs to judge."""
    return [Case(*case) for case in cases], []


FOREIGN_RATE = _of_host(
    (0.01, 0.01), (0.5, 0.5), (np.float32(0.5), 0.5), (-1.0, REFUSED), ("fast", REFUSED), ([], REFUSED)
)
FOREIGN: dict[str, Table] = {
    "radam": {"betas": _of_host(((0.5, 0.75), (0.5, 0.75)), ((2, 3), REFUSED), ("x", REFUSED)), "eps": FOREIGN_RATE},
    "adam": {
        "betas": _of_host(((0.5, 0.75), (0.5, 0.75)), ((2, 3), REFUSED), (object, REFUSED)),
        "amsgrad": flags(),
        "foreach": with_none(flags()),
        "maximize": flags(),
    },
    "rmsprop": {
        "alpha": FOREIGN_RATE,
        "centered": flags(),
        "momentum": _of_host((0.5, 0.5), (-1, REFUSED), (torch.ones(2), REFUSED)),
    },
    "adagrad": {"lr_decay": FOREIGN_RATE, "initial_accumulator_value": FOREIGN_RATE},
    "rprop": {"etas": _of_host(((0.5, 1.5), (0.5, 1.5)), ((2, 3), REFUSED), ("x", REFUSED))},
}
WRAPPING: Table = {**STANDARDIZING, "norm_eps": numbers(1e-8, 1e-3, also_bad=(*ABOVE_ZERO, None))}

# As given beside the options; ``decay_all`` is for every name.
GROUPING: Table = {
    "freeze": ([Case(None, "none"), *words("default", "layernorm", "norm", "none")[0]], words("norm", "none")[1]),
}
TYPOS = ("lookahed_k", "weight_decy", "Lr", "beta", "softplus", "look_ahead_k", "host", "amsgrad_", "learning_rate")


# ------------------------------------------------------------------------------------------------------------- options


def table_of(host: str, *, model: bool = True) -> Table:
    """The options of a name's host."""
    grouping = GROUPING if model else {}
    if host in OF_HOST:
        return {**NATIVE, **OF_HOST[host], **grouping}
    decay = {} if host == "rprop" else {"weight_decay": FOREIGN_RATE}
    return {"lr": FOREIGN_RATE, **decay, **FOREIGN[host], **WRAPPING, **grouping, "decay_all": flags()}


SOFTPLUS = ("softplus_beta", "softplus_relative")
NO_OPTION = {"sgd": SOFTPLUS}  # of the names, not of the constructor


@st.composite
def options_of(draw: st.DrawFn, host: str, *, door: str) -> dict[str, Case]:
    """Up to four options: most of them good, so that they meet each other.

    Args:
        host: whose options.
        door: "typed" takes Python values, "parsed" strings too, "text" has nothing else.
    """
    table = table_of(host, model=door != "typed")
    chosen: dict[str, Case] = {}
    for option in draw(st.lists(st.sampled_from(sorted(table)), max_size=4, unique=True)):
        typed, texts = table[option]
        cases = typed if door == "typed" else [*typed, *texts]
        if door == "text":
            cases = [as_text(case) for case in [*typed, *texts] if has_text(case)]
        good = [case for case in cases if case.typed is not REFUSED]
        chosen[option] = draw(st.sampled_from(good if draw(st.integers(0, 3)) else cases))
    if not draw(st.integers(0, 5)):
        foreign = sorted(set(SOMEHOST) - set(table)) if host in OF_HOST else [*SOFTPLUS, "kahan_sum"]
        foreign += NO_OPTION.get(host, ()) if door != "typed" else ()
        unknown = draw(st.sampled_from([*foreign, *(t for t in TYPOS if t not in ("host",) or door != "typed")]))
        chosen[unknown] = Case(draw(st.sampled_from(["0.5", "true"] if door == "text" else [0.5, "0.5", True])))
    return chosen


def has_text(case: Case) -> bool:
    """Whether a command line can give a value, to which a comma is the end."""
    if isinstance(case.given, str):
        return "," not in case.given and case.given == case.given.strip() and 0 < len(case.given) < 50
    if isinstance(case.given, tuple):
        are_numbers = all(isinstance(entry, (int, float)) for entry in case.given)
        return are_numbers and len(case.given) == 2 and len(repr(case.given)) < 50
    return isinstance(case.given, (bool, int, float)) and len(repr(case.given)) < 50


def as_text(case: Case) -> Case:
    if isinstance(case.given, str):
        return case
    text = f"{case.given[0]}:{case.given[1]}" if isinstance(case.given, tuple) else str(case.given)
    return Case(text, case.typed, case.may_refuse)


def expect(host: str, options: dict[str, Case], *, door: str) -> Expected:
    """What has to come of options for a host."""
    table, expected = table_of(host, model=door != "typed"), Expected(host)
    native = host in OF_HOST
    for option, case in options.items():
        known = option in table and option not in (NO_OPTION.get(host, ()) if door != "typed" else ())
        ours = "ours" if native or option in (*WRAPPING, "freeze", "decay_all") or not known else "theirs"
        typed = case.typed
        if case.given is None and door == "parsed" and typed is REFUSED and option not in ("freeze",):
            typed = LEFT_OUT
        if not known and native and option in SOMEHOST and typed is LEFT_OUT:
            continue
        if not known:
            whose = "theirs" if door == "typed" and option not in (*SOMEHOST, *SOFTPLUS) else ours
            expected.faults.append(Fault(option, option, whose))
        elif typed is REFUSED:
            expected.faults.append(Fault(option, case.given, ours))
        elif typed is not LEFT_OUT:
            expected.options[option] = typed
            expected.maybe += [Fault(option, case.given, ours)] if case.may_refuse else []
    given = expected.options
    implied = {None: given.get("implementation"), True: "foreach", False: "loop"}[given.get("foreach")]
    if native and given.get("implementation", "auto") not in ("auto", implied):
        expected.faults.append(Fault("foreach", given["foreach"]))
    if given.get("nesterov") and given.get("momentum", 0.9) == 0:
        expected.faults.append(Fault("nesterov", True))
    relative = given.get("softplus_relative")
    for option, idle in {"softplus_beta": (None, 50), "softplus_relative": (None,)}.items():
        if host == "sgd" and given.get(option) not in (None, *idle):
            expected.faults.append(Fault(option, given[option]))
    if native and relative is not None and given.get("softplus_beta", 50) != 50:
        expected.faults.append(Fault("softplus_beta", given["softplus_beta"]))
    if native and relative is not None and given.get("normalize") is False:
        expected.faults.append(Fault("normalize", False))
    return expected


def given_of(options: dict[str, Case]) -> dict[str, Any]:
    return {option: case.given for option, case in options.items()}


# ------------------------------------------------------------------------------------------------------------- names

NATIVE_NAMES = {"sing": "adamw", **{f"sing_{host}": host for host in OF_HOST}}
NAMES = {**NATIVE_NAMES, **{f"sing_{host}": host for host in FOREIGN}}
OTHERS = ("adamw", "adam", "sgd", "adafactor", "adamw_torch", "lamb", "radam", "muon", "lookahead_sing_adamw")
NO_NAMES = ("", "sing_", "sing_lbfgs", "sing_sparseadam", "sing_sing", "sing__adamw", "sing adamw", "singing", "_sing")
NO_STRINGS = (None, 3, True, 0.5, b"sing", ["sing"], ("sing",), object, torch.zeros(3), np.array(["sing", "sing"]))


EVERY_NAME = {
    *NAMES,
    *("sing_" + name.lower() for name, kind in vars(torch.optim).items() if isinstance(kind, type)),
}
COMPACT = {name.replace("_", "") for name in EVERY_NAME}


@st.composite
def misspelled(draw: st.DrawFn) -> str:
    """One of our names with a letter left out, doubled, changed or exchanged with the next one."""
    name = draw(st.sampled_from(sorted(NATIVE_NAMES)))
    place = draw(st.integers(0, len(name) - 1))
    head, letter, tail = name[:place], name[place], name[place + 1 :]
    change = draw(st.sampled_from(["", letter * 2, "x", tail[:1] + letter]))
    return head + change + (tail[1:] if change == tail[:1] + letter else tail)


def names(*, any_case: bool = True) -> st.SearchStrategy[str]:
    cases = [str, str.upper, str.title] if any_case else [str]
    return st.builds(lambda name, change: change(name), st.sampled_from(sorted(NAMES)), st.sampled_from(cases))


# ------------------------------------------------------------------------------------------------------------- checks


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def picture(model: nn.Module) -> Any:
    """All of a model that an attempt might change, and what it might register."""
    hooks = [name for name in vars(model) if name.endswith("_hooks")]
    modules = [
        (
            module.training,
            sorted(vars(module)),
            {key: value for key, value in vars(module).items() if isinstance(value, (tuple, str, bool))},
            [len(vars(module)[name]) for name in hooks if name in vars(module)],
        )
        for module in model.modules()
    ]
    parameters = [
        (id(p), p.requires_grad, p.grad is None, sorted(vars(p)), len(p._backward_hooks or ()), p.detach().clone())
        for p in model.parameters()
    ]
    hooked = [len(getattr(torch_optimizer, f"_global_optimizer_{when}_hooks")) for when in ("pre", "post")]
    return modules, [entry[:-1] for entry in parameters], [entry[-1].tolist() for entry in parameters], hooked


def is_ours(error: BaseException) -> bool:
    """Whether it was raised in our files."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return file.is_relative_to(OURS / "sing_plugins") or file.is_relative_to(OURS / "integrations")


def names_fault(message: str, fault: Fault) -> bool:
    """Whether an error names an argument and its value, be it as given or as read."""
    if fault.argument.replace("_", "-") not in message.replace("_", "-"):
        return False
    given = fault.given
    shown = {repr(given), str(given)}
    if isinstance(given, (torch.Tensor, np.ndarray)):
        shown.add(f"of shape {tuple(given.shape)}")
    if isinstance(given, list) and len(given) == 1:
        shown.add(repr(given[0]))
    if isinstance(given, (list, np.ndarray, np.generic)):
        plain = given if isinstance(given, list) else given.tolist()
        shown.add(repr(tuple(plain) if isinstance(plain, list) else plain))
    for read in (int, float):
        with suppress(Exception):
            shown.add(repr(read(given)))
    return any(text[:12].lower() in message.lower() for text in shown if text)  # a word is read in lower case


def check(attempt: Attempt) -> None:
    """Make an attempt, and compare with what had to come: (a) to (d) of tests/hard/test_doors.py."""
    model, expected = attempt.model, attempt.expected
    before = picture(model), attempt.registered()
    optimizer, refusal = None, None
    try:
        optimizer = attempt.build()
    except (Exception, SystemExit) as error:
        refusal = error
    if refusal is not None:
        assert (picture(model), attempt.registered()) == before, f"a failure has changed something: {refusal!r}"
        check_refusal(refusal, expected)
        return
    assert not expected.faults, f"accepted in spite of {expected.faults}: {optimizer}"
    assert attempt.registered() == before[1]
    if expected.exactly is not None:
        assert type(optimizer) is expected.exactly
        return
    check_options(optimizer, expected)
    if "freeze" in expected.options:
        kept = [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
        assert all(p.requires_grad == (expected.options["freeze"] == "none") for p in kept)
    check_step(optimizer, model, attempt.backward)


def check_refusal(error: BaseException, expected: Expected) -> None:
    """There is a fault, and an error of ours names one with its value."""
    faults = expected.faults or expected.maybe
    assert faults, f"refused, but good: {error!r}"
    assert len(str(error)) < 6000, f"{len(str(error))} letters: {str(error)[:300]!r}"
    if is_ours(error) or all(fault.whose == "ours" for fault in faults):
        named = any(names_fault(str(error), fault) for fault in (*faults, *expected.maybe))
        assert named, f"names none: {error!r}"


def check_options(optimizer: Optimizer, expected: Expected) -> None:
    """It is SING with that host, and has the options that were given."""
    native = expected.host in OF_HOST and not expected.wrapped
    assert isinstance(optimizer, SING if native else Wrapped)
    host = optimizer.host if native else type(optimizer.host).__name__.lower()  # type: ignore[union-attr]
    assert host == expected.host
    for option, typed in expected.options.items():
        if option == "freeze" or (option == "decay_all" and not native):
            continue
        key = f"sing_{option}" if not native and option in WRAPPING else option
        found = [group.get(key, 0.0) for group in optimizer.param_groups]
        if option == "weight_decay":
            found = [max(found)]
        for value in found:
            if isinstance(value, torch.Tensor):
                value = value.item()
            assert type(value) in (bool, int, float, str, tuple, type(None)), f"{option} is kept as {type(value)}"
            same = value == typed if not isinstance(typed, float) else math.isclose(value, typed, rel_tol=1e-6)
            assert same, f"{option}: {value!r} instead of {typed!r}"
            assert not isinstance(typed, (bool, str)) or type(value) is type(typed)


def check_step(optimizer: Optimizer, model: nn.Module, backward: Callable[[], object] | None) -> None:
    """Two steps train, and leave finite weights."""
    for _ in range(2):
        optimizer.zero_grad()
        if backward is None:
            model(torch.randn(8, 6)).square().mean().backward()
        else:
            backward()
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- doors


class Mine(torch.optim.SGD):
    """A host that somebody has written."""


@st.composite
def named(draw: st.DrawFn, *, any_case: bool = True, strings: bool = False) -> tuple[Any, str | None]:
    """A name, and its host or None if it is no name of ours."""
    kind = draw(st.integers(0, 12))
    if kind < 8:
        name = draw(names(any_case=any_case))
        return name, NAMES[name.lower()]
    if kind == 8:
        wrong = draw(misspelled())
        assume(wrong.lower() not in EVERY_NAME and wrong.lower().replace("_", "") not in COMPACT)
        return wrong, None
    muon = ("sing_muon",) if hasattr(torch.optim, "Muon") else OTHERS  # which old torches do not have
    return draw(st.sampled_from([muon, OTHERS, NO_NAMES, NO_NAMES if strings else NO_STRINGS][kind - 9])), None


@st.composite
def creation(draw: st.DrawFn, accelerator: Any = None) -> Attempt:
    """``sing_plugins.create_optimizer``, or Accelerate's."""
    model: Any = net()
    name, host = draw(named())
    options = draw(options_of(host or "adamw", door="parsed")) if host or not is_muon(name) else {}
    expected, given = expect(host or "adamw", options, door="parsed"), given_of(options)
    if host is None:
        expected.faults.append(Fault("optimizer", name))
    weird = draw(st.integers(0, 11))
    if weird == 0:
        good, value = draw(st.sampled_from(HOSTS_GIVEN))
        given["hosts"] = value
        expected.faults += [] if good else [Fault("hosts", value)]
    elif weird == 1:
        good, value = draw(st.sampled_from(UNDECAYED))
        given["no_weight_decay"] = value
        expected.faults += [] if good else [Fault("no_weight_decay", value)]
    elif weird == 2:
        good, make = draw(st.sampled_from(GROUPS))
        given["groups"] = make(model)
        expected.faults += [] if good else [Fault("groups", given["groups"], good or "theirs")]
    first = (
        draw(st.sampled_from([None, "net", list(model.parameters()), torch.zeros(2), nn.Linear]))
        if weird == 3
        else model
    )
    expected.faults += [] if first is model else [Fault("model", type(first).__name__)]
    what: Any = (name, given) if first is model else (first, name, given)
    if accelerator is None:
        return Attempt(what, lambda: sing_plugins.create_optimizer(first, name, **given), model, expected)
    import sing_accelerate

    return Attempt(what, lambda: sing_accelerate.create_optimizer(accelerator, first, name, **given), model, expected)


HOSTS_GIVEN: list[tuple[bool, Any]] = [
    *((True, value) for value in (None, {}, {"mine": Mine})),
    *((False, value) for value in (torch.ones(2), torch.ones(()), torch.zeros(()), 3, "radam", ["radam"], Mine, True)),
    *((False, value) for value in ({"mine": 3}, {3: Mine}, {"mine": None}, {"mine": "SGD"}, {None: Mine}, np.ones(2))),
]
UNDECAYED: list[tuple[bool, Any]] = [
    *((True, value) for value in ((), ["0.weight"], {"3.weight", "0.bias"}, {"module.0.weight": 1})),
    *(
        (False, value)
        for value in ("0.weight", ["nope"], 3, [3], torch.ones(2), None, [None], b"x", [b"0.weight"], Mine)
    ),
]
GROUPS: list[tuple[Any, Callable[[nn.Module], Any]]] = [
    (True, lambda model: None),
    (True, lambda model: list(model.parameters())),
    (True, lambda model: model.parameters()),
    (True, lambda model: model.named_parameters()),
    (True, lambda model: [{"params": model.parameters()}]),
    (False, lambda model: 3),
    (False, lambda model: torch.ones(2)),
    (False, lambda model: []),
    (False, lambda model: "net"),
    (False, lambda model: [{"parameters": 3}]),
]


@st.composite
def construction(draw: st.DrawFn) -> Attempt:
    """``SING(...)``."""
    model = net()
    host = draw(st.sampled_from(sorted(OF_HOST)))
    options = draw(options_of(host, door="typed"))
    expected, given = expect(host, options, door="typed"), given_of(options)
    if host != "adamw" or draw(st.booleans()):
        given["host"] = host
    if "host" not in options and not draw(st.integers(0, 7)):
        given["host"] = draw(st.sampled_from(["AdamW", "sing_adamw", "sing", "radam", "", *NO_STRINGS]))
        expected.faults.append(Fault("host", given["host"]))
    if "host" in options:  # in the place of a typo
        given["host"] = options["host"].given
        expected.faults = [Fault("host", given["host"])]
    params = draw(st.sampled_from([list, tuple, iter, lambda found: [{"params": list(found)}]]))
    return Attempt(given, lambda: SING(params(model.parameters()), **given), model, expected)


@st.composite
def wrapping(draw: st.DrawFn) -> Attempt:
    """``sing_plugins.wrap(...)``."""
    model = net()
    expected, options = Expected(wrapped=True), {}
    for option in draw(st.lists(st.sampled_from(sorted(WRAPPING)), max_size=4, unique=True)):
        cases = WRAPPING[option][0]
        good = [case for case in cases if case.typed is not REFUSED]
        case = options[option] = draw(st.sampled_from(good if draw(st.integers(0, 3)) else cases))
        if case.typed is REFUSED:
            expected.faults.append(Fault(option, case.given))
        else:
            expected.options[option] = case.typed
            expected.maybe += [Fault(option, case.given)] if case.may_refuse else []
    given = given_of(options)
    if not draw(st.integers(0, 7)):
        typo = draw(st.sampled_from([*TYPOS, "softplus_beta", "kahan_sum", "eps", "lr", "freeze"]))
        given[typo] = 0.5
        expected.faults.append(Fault(typo, 0.5, "theirs"))
    good, kind = draw(st.sampled_from([*((True, h) for h in WRAPPED), *((False, h) for h in UNWRAPPABLE)]))
    host = kind(model) if good or kind in MADE else kind
    expected.host = type(host).__name__.lower()
    expected.faults += [] if good else [Fault("optimizer", type(host).__name__ if kind in MADE else host)]
    groups = (
        [(sorted(group), len(group["params"])) for group in host.param_groups] if isinstance(host, Optimizer) else []
    )

    def registered() -> Any:
        now = getattr(host, "param_groups", []) if isinstance(host, Optimizer) else []
        return [len(group["params"]) for group in now], isinstance(host, Optimizer) and sorted(vars(host))

    def build() -> Optimizer:
        try:
            return sing_plugins.wrap(host, **given)
        except Exception:
            if isinstance(host, Optimizer):
                assert [(sorted(group), len(group["params"])) for group in host.param_groups] == groups
            raise

    return Attempt((kind, given), build, model, expected, registered=registered)


WRAPPED = [
    lambda model, kind=kind: kind(model.parameters(), lr=0.01)
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RAdam, torch.optim.Adagrad, torch.optim.Rprop, Mine)
]
MADE = [
    lambda model: SING(model.parameters()),
    lambda model: sing_plugins.wrap(torch.optim.SGD(model.parameters())),
    lambda model: torch.optim.LBFGS(model.parameters()),
    lambda model: torch.optim.SparseAdam(model.parameters()),
]
UNWRAPPABLE = [*MADE, None, "adamw", torch.optim.SGD, torch.ones(2), 3, {"lr": 1}]


@st.composite
def timm(draw: st.DrawFn) -> Attempt:
    """timm's ``create_optimizer_v2(model, opt=NAME, **options)``."""
    from timm.optim import create_optimizer_v2, get_optimizer_class
    from timm.optim._optim_factory import default_registry

    model = net()
    name, host = draw(named())
    options = draw(options_of(host or "adamw", door="parsed")) if host or not is_muon(name) else {}
    expected, given = expect(host or "adamw", options, door="parsed"), given_of(options)
    if host is not None and draw(st.booleans()):
        name = name.replace("_", "")
    if "momentum" in options and host in ("adafactor", None, "adamw", "adabelief"):
        # An argument of timm's own, with a value for every optimizer: it says that it is not used.
        expected.faults = [fault for fault in expected.faults if fault.argument != "momentum"]
        expected.options.pop("momentum", None)
    if "momentum" in options and options["momentum"].given is None and host in ("sgd", "rmsprop"):
        expected.options.pop("momentum", None)
    if host is None:
        expected.faults.append(Fault("optimizer", name, "theirs"))
    if is_muon(name) and get_class("muon") is not None:  # timm's, where it has one, takes every parameter
        expected = Expected("muon")
    if host is None and isinstance(name, str) and name in OTHERS and get_class(name) is not None:
        given, expected = {"lr": 0.01}, Expected(exactly=get_optimizer_class(name, bind_defaults=False))
    if isinstance(name, str) and name == "lookahead_sing_adamw":
        expected.faults = [Fault("opt", name)]
    return Attempt(
        (name, given),
        lambda: create_optimizer_v2(model, opt=name, **given),
        model,
        expected,
        registered=lambda: {key: id(info) for key, info in default_registry._optimizers.items()},
    )


def is_muon(name: Any) -> bool:
    """torch's Muon, which does not take every parameter of the model, nor the options of any other host."""
    return isinstance(name, str) and name == "sing_muon"


def get_class(name: str) -> type | None:
    """timm's own class of that exact name."""
    from timm.optim._optim_factory import default_registry

    info = default_registry._optimizers.get(name)
    return None if info is None else info.opt_class  # type: ignore[return-value]


TRAINER_OWN = {"lr": "learning_rate", "weight_decay": "weight_decay"}


@st.composite
def trainer(draw: st.DrawFn, folder: str) -> Attempt:
    """Trainer's ``TrainingArguments(optim=NAME, optim_args="...")`` and ``create_optimizer``."""
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    model = net()
    name, host = draw(named(any_case=False, strings=True))
    options = draw(options_of(host or "adamw", door="text")) if host or not is_muon(name) else {}
    arguments: dict[str, Any] = {}
    expected = expect(host or "adamw", options, door="text")
    for option, argument in TRAINER_OWN.items():
        case = options.get(option)
        if case is not None and case.typed not in (REFUSED, LEFT_OUT) and draw(st.integers(0, 3)):
            arguments[argument] = expected.options[option] = case.typed
            del options[option]
        elif case is not None:  # in optim_args it has no place
            expected.faults.append(Fault(option, case.given))
    texts = ",".join(f"{option}={case.given}" for option, case in options.items())
    if not draw(st.integers(0, 15)):
        extra = draw(st.sampled_from(["lookahead_k", "betas=(0.9,0.98", "=3", "eps=1]", "eps=1e-8,eps=1e-8"]))
        texts = f"{texts},{extra}"
        expected.faults.append(Fault("option", texts))
    if host is None:
        expected.faults.append(Fault("optim", name, "ours" if is_muon(name) else "theirs"))
    if name in OTHERS and name in [member.value for member in OptimizerNames]:
        kinds = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}
        assume(name in kinds)
        texts, expected = "", Expected(exactly=kinds[name])

    def build() -> Optimizer:
        made = TrainingArguments(
            output_dir=folder,
            optim=name,
            optim_args=texts,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **{"learning_rate": 0.01, **arguments},
        )
        return Trainer(model=model, args=made).create_optimizer()

    expected.options.pop("lr", None) if "learning_rate" not in arguments else None
    return Attempt(
        (name, texts, arguments), build, model, expected, registered=lambda: [str(member) for member in OptimizerNames]
    )


FAIRSEQ_MODEL = str.split("""
    --task dummy_lm --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 --decoder-output-dim 16
    --decoder-input-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --dict-size 15 --dropout 0
    --tokens-per-sample 4 --batch-size 2 --cpu --data-buffer-size 0 --num-workers 0 --no-progress-bar --seed 1
""")


@functools.cache
def fairseq_base() -> Any:
    """The configuration that the model is built from."""
    from fairseq import options as parsing
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    line = [*FAIRSEQ_MODEL, "--lr", "0.1"]
    return convert_namespace_to_omegaconf(parsing.parse_args_and_arch(parsing.get_training_parser(), line))


@st.composite
def fairseq(draw: st.DrawFn) -> Attempt:
    """``--optimizer NAME --sing-...`` of fairseq's own parser, and its Trainer."""
    from fairseq import options as parsing
    from fairseq import tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.optim import OPTIMIZER_REGISTRY
    from fairseq.trainer import Trainer

    name, host = draw(named(any_case=False, strings=True))
    options = draw(options_of(host or "adamw", door="text")) if host or not is_muon(name) else {}
    if host == "adam":  # fairseq's own, which lacks some options of torch's
        options = {option: case for option, case in options.items() if option not in ("foreach", "maximize")}
    assume(name != "lamb")  # which wants Apex
    expected = expect(host or "adamw", options, door="text")
    line = ["--optimizer", name]
    if host is not None and draw(st.booleans()):
        line = ["--optimizer", "sing", "--sing-host", host]
    elif name == "sing" and draw(st.booleans()):
        line += ["--sing-host", draw(st.sampled_from(["sing", "lbfgs", "adamv", "3", "true"]))]
        expected.faults.append(Fault("sing_host", line[-1]))
    for option, case in options.items():
        own = option in ("lr", "weight_decay")
        line.append(f"--{'' if own else 'sing-'}{option.replace('_', '-')}={case.given}")
    for fault in expected.faults:
        if fault.argument in ("lr", "weight_decay", *TYPOS) or fault.argument not in FAIRSEQ_KNOWS:
            fault.whose = "theirs"
    if "lr" not in options:
        line += ["--lr", "0.01"]
    if host is None:
        expected.faults.append(Fault("optimizer", name, "ours" if is_muon(name) else "theirs"))
    torch.manual_seed(0)
    base = fairseq_base()
    task = tasks.setup_task(base.task)
    model = task.build_model(base.model)
    criterion = task.build_criterion(base.criterion)

    def build() -> Any:
        with redirect_stderr(StringIO()):
            args = parsing.parse_args_and_arch(parsing.get_training_parser(), [*FAIRSEQ_MODEL, *line])
        optimizer = Trainer(convert_namespace_to_omegaconf(args), task, model, criterion).optimizer
        if name in OTHERS:
            return optimizer
        return optimizer.optimizer

    if name in OTHERS and name in OPTIMIZER_REGISTRY:
        line, expected = ["--optimizer", name, "--lr", "0.01"], Expected(exactly=OPTIMIZER_REGISTRY[name])

    def backward() -> None:
        tokens = torch.randint(4, 15, (2, 4))
        model(tokens)[0].float().square().mean().backward()

    return Attempt(line, build, model, expected, backward, lambda: dict(OPTIMIZER_REGISTRY))


FAIRSEQ_KNOWS = {*NATIVE, *SOMEHOST, *WRAPPING, *GROUPING, *(option for table in FOREIGN.values() for option in table)}


def door(name: str, folder: Path) -> st.SearchStrategy[Attempt]:
    """The door of that name; imports its framework.

    Args:
        name: one of DOORS.
        folder: for what a framework writes.
    """
    if name in ("timm", "fairseq", "transformers"):
        import_module({"fairseq": "fairseq.trainer", "transformers": "transformers.trainer"}.get(name, name))
        sing_plugins.enable(name)
    if name == "accelerate":
        from accelerate import Accelerator

        return creation(Accelerator(cpu=True))
    return {
        "create_optimizer": creation,
        "SING": construction,
        "wrap": wrapping,
        "timm": timm,
        "transformers": lambda: trainer(str(folder)),
        "fairseq": fairseq,
    }[name]()


DOORS = ("create_optimizer", "SING", "wrap", "timm", "transformers", "fairseq", "accelerate")


def go_through(name: str, folder: Path, configurations: int, look: Callable[[Attempt], object] = check) -> None:
    """So many random configurations, the same ones every time."""
    made = 0

    @settings(
        max_examples=configurations,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate] if name == "fairseq" else [Phase.generate, Phase.shrink],  # a second for each
        suppress_health_check=list(HealthCheck),
    )
    @given(door(name, folder))
    def every_configuration(attempt: Attempt) -> None:
        nonlocal made
        made += 1
        look(attempt)

    every_configuration()
    assert made >= configurations
