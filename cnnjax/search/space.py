"""What a search chooses: settings of an experiment, and where each may lie.

learning_rate=log(1e-4, 1e-1)          between, evenly in the logarithm
weight_decay=uniform(0, 0.1)           between, evenly
batch_size=int(32, 256, step=32)       a whole number; logint for its logarithm
optimizer=choice(adam, sgd)            one of these
momentum[optimizer=sgd]=uniform(0.8, 0.99)       only where optimizer is sgd
model_arguments.activation=choice(relu, tanh)    one word of a setting that takes several
angle=uniform(0, 20)                   with --augment 'rotate:{angle}' among the settings
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cnnjax import spec
from cnnjax.errors import UserError, unknown_name
from cnnjax.search import constraints

Value = bool | int | float | str
Assignment = Mapping[str, Value]
KIND = "space"
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
_HEAD = re.compile(r"(?P<name>[A-Za-z_][\w.]*)(\[(?P<condition>[^\]]*)\])?$")
# What one or several words are put together of: `--model-arguments activation=tanh`.
_WORDS = "arguments"
# Settings that are the search's own, or that all trials must share.
_HELD = ("seed", "run_dir", "resume", "test", "smoke", "stop_after_epochs", "monitor", "plan")
# Draws, one after another, before a constraint is said to leave nothing.
MOST_DRAWS = 10_000


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both of which count.

    Attributes:
      low, high: the bounds.
      is_log: whether the logarithm is drawn evenly.
      is_whole: whether they are whole numbers.
      step: between two of them; None for any.
    """

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise UserError(f"from {self.low:g} to {self.high:g} there is nothing")
        if self.is_log and self.low <= 0:
            raise UserError(f"{self.low:g} has no logarithm: start above 0")
        if self.step is not None and self.step <= 0:
            raise UserError(f"step is {self.step:g}: give more than 0")

    def nearest(self, value: float) -> int | float:
        """Returns the nearest number that lies in the range."""
        if self.step is not None:
            last = math.floor((self.high - self.low) / self.step + 1e-9)
            steps = min(max(round((value - self.low) / self.step), 0), last)
            value = self.low + steps * self.step
        value = min(max(value, self.low), self.high)
        return round(value) if self.is_whole else float(value)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < len(self.values) or len(self.values) < 2:
            raise UserError("give two different values or more")


Domain = Range | Choice


def log(low: float, high: float) -> Range:
    """Numbers whose logarithm is drawn evenly."""
    return Range(low, high, is_log=True)


def uniform(low: float, high: float, step: float | None = None) -> Range:
    """Numbers drawn evenly."""
    return Range(low, high, step=step)


def whole(low: int, high: int, step: int = 1) -> Range:
    """Whole numbers drawn evenly."""
    return Range(low, high, is_whole=True, step=step)


def log_whole(low: int, high: int) -> Range:
    """Whole numbers whose logarithm is drawn evenly."""
    return Range(low, high, is_log=True, is_whole=True)


def choice(*values: bool | int | float | str) -> Choice:
    """One of these."""
    return Choice(tuple(values))


DOMAINS: spec.Registry = {
    "log": log,
    "uniform": uniform,
    "int": whole,
    "logint": log_whole,
    "choice": choice,
}


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One thing that is chosen.

    Attributes:
      name: a setting, `SETTING.WORD`, or a name that a setting's text has in braces.
      domain: where it lies.
      condition: (name, value) of another dimension without which it is not chosen at all.
    """

    name: str
    domain: Domain
    condition: tuple[str, Value] | None = None


@dataclasses.dataclass(frozen=True)
class Space:
    """What is chosen, in an order in which conditions come before what hangs on them.

    Attributes:
      dimensions: what is chosen.
      constraints: as text, such as `batch_size * accumulate <= 512`.
    """

    dimensions: tuple[Dimension, ...]
    constraints: tuple[str, ...] = ()

    def allows(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings keep all constraints."""
        return all(constraints.holds(text, settings) for text in self.constraints)

    def allows_choice(self, settings: Mapping[str, Any], chosen: Assignment) -> bool:
        """Whether an experiment's settings with what was chosen keep all constraints."""
        return not self.constraints or self.allows({**applied(settings, chosen), **chosen})


def read_space(
    texts: Sequence[str], config_type: type, settings: Mapping[str, Any], where: Sequence[str] = ()
) -> Space:
    """Reads dimensions and constraints, and checks them against an experiment's settings.

    Args:
      texts: one a dimension, as above.
      config_type: the experiment's dataclass.
      settings: its settings without the search: what is fixed.
      where: constraints: comparisons and arithmetic of settings and dimensions.

    Raises:
      UserError: a setting that does not exist, a domain of another type than the setting, a
        condition on what is not chosen, a name that no setting has in braces.
    """
    if not texts:
        raise UserError("--space is empty: give what to choose, such as learning_rate=log(1e-4, 1)")
    found = [_dimension(text) for text in texts]
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--space has {name} twice: drop one")
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    places = {name for value in settings.values() for name in _places(value)}
    for each in found:
        _check_name(each, fields, places, settings)
    for name in places - set(names):
        raise UserError(f"{{{name}}} stands in a setting, but --space does not choose {name}")
    space = Space(tuple(_ordered(found)), tuple(where))
    known = {**settings, **{each.name: 1.0 for each in found}}
    for text in where:
        constraints.check(text, known)
    return space


def _dimension(text: str) -> Dimension:
    head, equals, domain = _partition(text)
    matched = _HEAD.match(head)
    if not equals or matched is None:
        raise UserError(
            f"--space {text!r}: write it as SETTING=DOMAIN, of {spec.describe(DOMAINS)}; with "
            "SETTING[OTHER=VALUE] for one that is chosen only there"
        )
    condition = None
    if matched["condition"] is not None:
        name, _, value = matched["condition"].partition("=")
        values = spec.parse_one(f"x({value.strip()})", KIND).positional
        if not name.strip() or len(values) != 1:
            raise UserError(f"--space {text!r}: write the condition as [OTHER=VALUE]")
        condition = (name.strip(), values[0])
    item = spec.parse_one(domain, KIND)
    return Dimension(matched["name"], spec.call(item, DOMAINS, KIND), condition)


def _partition(text: str) -> tuple[str, str, str]:
    """Splits at the first = that is outside of brackets."""
    head, *rest = spec.split(text.strip(), "=", KIND)
    return head.strip(), "=" if rest else "", "=".join(rest).strip()


def _check_name(
    dimension: Dimension, fields: Mapping[str, Any], places: set[str], settings: Mapping[str, Any]
) -> None:
    name = dimension.name
    setting, dot, word = name.partition(".")
    if name in places:
        return
    if setting not in fields:
        raise unknown_name("setting", setting, [*fields, *places])
    if dot:
        if not setting.endswith(_WORDS) or not word.isidentifier():
            raise UserError(
                f"--space {name}: only settings of words, such as model_arguments, have parts"
            )
        return
    if setting in _HELD:
        raise UserError(f"--space {name}: the search itself sets it, the same in all trials")
    kind = type(settings[setting])
    if isinstance(dimension.domain, Range):
        values: tuple[Value, ...] = (dimension.domain.low, dimension.domain.high)
        if kind is int and not dimension.domain.is_whole:
            raise UserError(f"--space {name}: it is a whole number: use int or logint")
    else:
        values = dimension.domain.values
    if kind not in (bool, int, float, str):
        raise UserError(f"--space {name}: a setting of several values: choose it by {name}.WORD")
    for value in values:
        if not _fits(value, kind):
            raise UserError(f"--space {name}: {value!r} is no {kind.__name__}, which {name} is")
    _check_literal(name, fields[setting], values)


def _fits(value: Value, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, int) if kind is int else True


def _check_literal(name: str, field: Any, values: Sequence[Value]) -> None:
    allowed = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
    for value in values:
        if allowed and value not in allowed:
            raise unknown_name(name, str(value), allowed)


def _ordered(found: Sequence[Dimension]) -> list[Dimension]:
    """Conditions before what hangs on them."""
    names = {each.name: each for each in found}
    ordered: list[Dimension] = []

    def put(each: Dimension, below: tuple[str, ...]) -> None:
        if each in ordered:
            return
        if each.condition is not None:
            other, value = each.condition
            if other not in names:
                raise UserError(f"--space {each.name} hangs on {other}, which is not chosen")
            domain = names[other].domain
            if not isinstance(domain, Choice) or value not in domain.values:
                raise UserError(f"--space {each.name} hangs on {other}={value}, which is no choice")
            if other in below:
                raise UserError(f"--space {each.name} and {other} hang on each other")
            put(names[other], (*below, each.name))
        ordered.append(each)

    for each in found:
        put(each, ())
    return ordered


def suggest(space: Space, ask: Callable[[Dimension], Value]) -> dict[str, Value]:
    """Asks for the value of each dimension whose condition holds."""
    chosen: dict[str, Value] = {}
    for each in space.dimensions:
        if each.condition is None or chosen.get(each.condition[0]) == each.condition[1]:
            chosen[each.name] = ask(each)
    return chosen


def drawn_value(dimension: Dimension, generator: np.random.Generator) -> Value:
    """Returns a value of a dimension, drawn."""
    domain = dimension.domain
    if isinstance(domain, Choice):
        return domain.values[int(generator.integers(len(domain.values)))]
    if domain.is_log:
        value = math.exp(generator.uniform(math.log(domain.low), math.log(domain.high)))
    else:
        value = generator.uniform(domain.low, domain.high)
    return domain.nearest(value)


def draw_allowed(
    space: Space, settings: Mapping[str, Any], generator: np.random.Generator
) -> dict[str, Value]:
    """Returns a value of each dimension, drawn until the constraints hold.

    Raises:
      UserError: no draw keeps them.
    """
    for _ in range(MOST_DRAWS):
        chosen = suggest(space, lambda each: drawn_value(each, generator))
        if space.allows_choice(settings, chosen):
            return chosen
    raise no_allowed(space)


def no_allowed(space: Space) -> UserError:
    """Returns what to say where no settings of a space keep its constraints."""
    where = " and ".join(space.constraints)
    return UserError(f"--where {where}: nothing that --space draws keeps it: widen one of them")


def applied(settings: Mapping[str, Any], chosen: Assignment) -> dict[str, Any]:
    """Returns an experiment's settings with what was chosen, for constraints and the command."""
    changed = {name: _filled(value, chosen) for name, value in settings.items()}
    for name, value in chosen.items():
        setting, dot, word = name.partition(".")
        if dot:
            kept = [each for each in changed[setting] if not each.startswith(f"{word}=")]
            changed[setting] = (*kept, f"{word}={value}")
        elif setting in settings:
            changed[setting] = value
    return changed


def _filled(value: Any, chosen: Assignment) -> Any:
    """A setting's text with the chosen values in its braces."""
    if isinstance(value, tuple):
        return tuple(_filled(each, chosen) for each in value)
    if not isinstance(value, str):
        return value
    return _PLACE.sub(lambda match: f"{chosen.get(match[1], match[0])}", value)


def _places(value: Any) -> set[str]:
    texts = value if isinstance(value, tuple) else (value,)
    return {name for text in texts if isinstance(text, str) for name in _PLACE.findall(text)}
