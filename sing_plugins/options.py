"""THE table of options: how each is read from a string, which values are accepted, and the words for them."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from torch import Tensor

# "default" is layernorm, but for layers that were left trainable on purpose (see groups.py).
FREEZE = ("layernorm", "norm", "none", "default")
DEFAULT_FREEZE = "default"

NONFINITE = PROPAGATE, SKIP, RAISE = ("propagate", "skip", "raise")  # what a NaN or infinite gradient does
IMPLEMENTATIONS = FUSED, FOREACH, LOOP, AUTO = ("fused", "foreach", "loop", "auto")  # see kernels/

_LONG = 200  # letters of a value in a message

Accepts = Callable[[Any], bool]
Parse = Callable[[object], Any]


@dataclass(frozen=True)
class Option:
    """An option of an optimizer.

    Attributes:
        name: as in a constructor and in a param group.
        parse: from a string or a Python value; raises TypeError or ValueError for what it cannot read.
        accepts: whether a value that was read is accepted.
        words: the values that are accepted, in words.
    """

    name: str
    parse: Parse
    accepts: Accepts
    words: str

    def read(self, value: object, whose: str) -> Any:
        """The value, typed and accepted.

        Args:
            value: a string, as from a command line, or a Python value.
            whose: the name of the optimizer, for the message.

        Raises:
            ValueError: names the option, its value and what is accepted.
        """
        try:
            typed = self.parse(plain(value))
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # tensors and huge numbers have others
            raise ValueError(f"Invalid {self.name}: {shown(value)} for {whose}. Accepted: {self.words}.") from error
        self.check(typed, f" for {whose}")
        return typed

    def check(self, value: Any, whose: str = "") -> None:
        """Raise for a typed value that is not accepted.

        Args:
            value: the value.
            whose: follows it in the message.

        Raises:
            ValueError: names the option, its value and what is accepted.
        """
        if not self.accepts(value):
            raise ValueError(f"Invalid {self.name}: {shown(value)}{whose}. Accepted: {self.words}.")


def shown(value: Any) -> str:
    """A value as a message has it: what is long in short, of tensors and arrays the shape."""
    if getattr(value, "shape", None) and not isinstance(value, type):
        what = "tensor" if isinstance(value, Tensor) else "array"
        return f"'a{'n' * (what == 'array')} {what} of shape {tuple(value.shape)}'"
    words = repr(value)
    return words if len(words) <= _LONG else f"{words[:_LONG]}…"


def plain(value: Any) -> Any:
    """NumPy's scalars and fractions as Python's numbers, which state dicts can hold; lists as tuples; else as it is."""
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    if isinstance(value, Fraction):
        with suppress(OverflowError):
            return float(value)
    is_scalar = not isinstance(value, Tensor) and getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value


def _real(low: float = 0.0, high: float = math.inf, *, open_low: bool = False, closed_high: bool = False) -> Accepts:
    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        try:
            number = float(value)
        except OverflowError:
            return False
        above = low < number if open_low else low <= number
        return above and (number < high or (closed_high and number == high))

    return accepts


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_real(0.0, 1.0), value))


def _rate(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_meta and _real()(value.item())
    return _real()(value)


def _one_of(words: tuple[str, ...]) -> Accepts:
    return lambda value: isinstance(value, str) and value in words


def _or_none(accepts: Accepts) -> Accepts:
    return lambda value: value is None or accepts(value)


def _anything(value: Any) -> bool:
    return True


def parse_flag(value: object) -> bool:
    """``"False"`` is False."""
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def parse_pair(value: object) -> tuple[float, float]:
    """``(0.9, 0.98)``, ``[0.9, 0.98]``, or ``0.9:0.98`` where a comma separates options."""
    parts = value.strip("()[] ").replace(":", ",").split(",") if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    first, second = parts
    return float(first), float(second)


def parse_whole(value: object) -> int:
    """``"5"`` and ``5``, but not ``5.5``."""
    if isinstance(value, bool):
        raise ValueError
    return int(value) if isinstance(value, (str, int)) else int(str(value))


def parse_real(value: object) -> float:
    """``"1e-3"`` and numbers."""
    if isinstance(value, bool):
        raise ValueError
    return float(value)  # type: ignore[arg-type]


def parse_rate(value: object) -> float | Tensor:
    """A number, or a tensor as it is."""
    return value if isinstance(value, Tensor) else parse_real(value)


def parse_word(value: object) -> str:
    """A word in any case."""
    return str(value).lower()


def parse_literal(value: object) -> Any:
    """A Python literal in a string, its words in any case; other strings and values as they are."""
    words = {"true": "True", "false": "False", "none": "None", "null": "None"}
    try:
        return ast.literal_eval(words.get(value.lower(), value)) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def parse_number(value: object) -> int | float:
    """``"5"`` is a whole number, ``"0.9"`` is not."""
    number = parse_literal(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError
    return number


def optional(parse: Parse) -> Parse:
    """``none`` and ``null`` are None."""
    return lambda value: None if value is None or str(value).lower() in ("none", "null") else parse(value)


_POSITIVE, _NOT_NEGATIVE, _EITHER = "a finite number > 0", "a finite number >= 0", "True or False"

OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option("lr", parse_rate, _rate, f"{_NOT_NEGATIVE}, or such a tensor (Tensor lr must be 1-element)"),
        Option("betas", parse_pair, _pair, "two numbers in [0, 1)"),
        Option("eps", parse_real, _real(open_low=True), _POSITIVE),
        Option("norm_eps", parse_real, _real(open_low=True), _POSITIVE),
        Option("weight_decay", parse_real, _real(), _NOT_NEGATIVE),
        Option("momentum", parse_real, _real(0.0, 1.0), "a number in [0, 1)"),
        Option("nesterov", parse_flag, _flag, _EITHER),
        Option("decay_rate", parse_real, _real(open_low=True), _POSITIVE),
        Option("clip_threshold", parse_real, _real(open_low=True), _POSITIVE),
        Option(
            "softplus_beta",
            optional(parse_real),
            _or_none(_real(open_low=True)),
            f"{_POSITIVE}, or None to switch softplus off",
        ),
        Option(
            "softplus_relative",
            optional(parse_real),
            _or_none(_real(open_low=True)),
            f"{_POSITIVE}, or None for one softplus_beta whatever the tensor's size",
        ),
        Option("centralize", parse_flag, _flag, _EITHER),
        Option("normalize", parse_flag, _flag, _EITHER),
        Option("centralize_rows_of_one", parse_flag, _flag, _EITHER),
        Option("decay_all", parse_flag, _flag, _EITHER),
        Option(
            "lookahead_k",
            optional(parse_whole),
            _or_none(_count),
            "a whole number of steps >= 1, or None to switch Lookahead off",
        ),
        Option("lookahead_alpha", parse_real, _real(0.0, 1.0, open_low=True, closed_high=True), "a number in (0, 1]"),
        Option("maximize", parse_flag, _flag, _EITHER),
        Option("capturable", parse_flag, _flag, _EITHER),
        Option("foreach", optional(parse_flag), _or_none(_flag), "True, False or None (choose the faster)"),
        Option("nonfinite", parse_word, _one_of(NONFINITE), ", ".join(NONFINITE)),
        Option("kahan_sum", parse_flag, _flag, _EITHER),
        Option("implementation", parse_word, _one_of(IMPLEMENTATIONS), ", ".join(IMPLEMENTATIONS)),
        Option("freeze", parse_word, _one_of(FREEZE), ", ".join(FREEZE)),
    )
}


def check_options(options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise for the first option with a value that is not accepted; names that are not in the table pass.

    Args:
        options: option to typed value, such as a param group.
        prefix: what the options' names begin with in it.

    Raises:
        ValueError: as :meth:`Option.check`.
    """
    for name, option in OPTIONS.items():
        if prefix + name in options:
            option.check(options[prefix + name])


def signature_options(factory: Callable[..., object]) -> dict[str, Option]:
    """The options of an optimizer that is not ours, typed by the defaults in its signature; it checks them itself.

    Where it has ``**kwargs``, what it passes on cannot be seen: ``lr``, ``weight_decay``, ``betas`` and ``eps`` are
    among its options then, and whether it has them is for it to say.

    Args:
        factory: a class or a function that takes params first.
    """
    found: dict[str, Option] = {}
    for name, parameter in list(inspect.signature(factory).parameters.items()):
        if parameter.kind is parameter.VAR_KEYWORD:
            for usual in ("lr", "weight_decay", "betas", "eps"):
                found.setdefault(usual, Option(usual, OPTIONS[usual].parse, _anything, OPTIONS[usual].words))
        elif name != "params" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            words = OPTIONS[name].words if name in OPTIONS else "a value of its type"
            found[name] = Option(name, _parser_for(parameter), _anything, words)
    return found


_FLAG_OR_NONE = ("bool | None", "None | bool", "Optional[bool]", "typing.Optional[bool]")


def _parser_for(parameter: inspect.Parameter) -> Parse:
    if isinstance(parameter.default, bool):
        return parse_flag
    if parameter.default is None and str(parameter.annotation) in _FLAG_OR_NONE:
        return optional(parse_flag)
    if isinstance(parameter.default, float):
        return parse_rate
    if isinstance(parameter.default, int):  # 0 for a momentum that may well be 0.9
        return parse_number
    if isinstance(parameter.default, tuple) and len(parameter.default) == 2:
        return parse_pair
    return parse_literal


_CLOSING = {"(": ")", "[": "]"}


def split_options(text: str | None) -> dict[str, str]:
    """Split ``"softplus_beta=none,lookahead_k=5"`` at the commas that are outside of brackets.

    Raises:
        ValueError: brackets that do not match, a part without ``=``, or an option that is given twice.
    """
    options: dict[str, str] = {}
    text = text or ""
    for part in _parts(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not (key and equals):
            raise ValueError(f"Invalid option string: {text!r}. Expected key=value,key=value, got {part.strip()!r}.")
        if key in options:
            raise ValueError(f"Invalid option string: {text!r} gives {key!r} twice.")
        options[key] = value
    return options


def _parts(text: str) -> list[str]:
    parts, expected = [""], ""
    for character in text:
        if character == "," and not expected:
            parts.append("")
            continue
        if character in _CLOSING:
            expected = _CLOSING[character] + expected
        elif character in _CLOSING.values():
            if not expected.startswith(character):
                raise ValueError(f"Invalid option string: {text!r}. Its {character!r} closes no bracket.")
            expected = expected[1:]
        parts[-1] += character
    if expected:
        raise ValueError(f"Invalid option string: {text!r}. It has a bracket without its {expected[0]!r}.")
    return parts
