"""What may differ between the members of one program: seeds, data, and numbers that it computes
with.

A setting that is a float becomes an argument of the compiled program, traced in the place of its
value: the experiment's own functions build the step of it, so that any number may vary on which no
shape, no loop and no Python condition hangs. `check_leaves` finds out which.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator
from cnnjax.search.space import (
    MOST_DRAWS,
    Choice,
    Dimension,
    Range,
    Space,
    Value,
    applied,
    drawn_value,
    no_allowed,
)

PyTree = Any
# They choose the images that a member has, and are in no program.
OF_DATA = ("data_seed", "label_noise", "fold")
# A 0 leaves these out of the program, instead of computing with 0.
SWITCHES = ("clip_norm", "max_norm", "ema_decay")
ELSEWHERE = "cnnjax search takes any setting"
MOST_MEMBERS = 10_000


@dataclasses.dataclass(frozen=True)
class Member:
    """One member, as it is drawn.

    Attributes:
      number: counted from 0.
      seed: of its run.
      chosen: what the space says of it.
    """

    number: int
    seed: int
    chosen: Mapping[str, Value]


def draw_members(
    space: Space | None,
    *,
    seeds: Sequence[int],
    draws: int = 1,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> list[Member]:
    """Returns the members: each choice with each other, each draw of the ranges, each seed.

    Args:
      space: what varies besides the seed; None for nothing.
      seeds: of the runs of each setting.
      draws: how many settings are drawn of ranges.
      seed: of the draws.
      settings: what the experiment's settings are otherwise, for the constraints.

    Raises:
      UserError: a dimension that hangs on another, constraints that nothing keeps, or more members
        than `MOST_MEMBERS`.
    """
    dimensions = () if space is None else space.dimensions
    check_alone(dimensions)
    ranges = [each for each in dimensions if isinstance(each.domain, Range)]
    choices = [each for each in dimensions if isinstance(each.domain, Choice)]
    draws = draws if ranges else 1
    crossings = 1
    for each in choices:
        crossings *= len(each.domain.values)  # type: ignore[union-attr]
    if crossings * draws * len(seeds) > MOST_MEMBERS:
        raise UserError(
            f"{crossings * draws * len(seeds):,} members: one population has at most "
            f"{MOST_MEMBERS:,}; give fewer seeds, settings or --members."
        )
    generator = numpy_generator(seed, "population")
    names = [each.name for each in choices]
    crossed = list(itertools.product(*(each.domain.values for each in choices)))  # type: ignore[union-attr]

    def of_draw(drawn: Mapping[str, Value]) -> list[dict[str, Value] | None]:
        found = [{**drawn, **dict(zip(names, values, strict=True))} for values in crossed]
        kept = [space is None or space.allows_choice(settings or {}, each) for each in found]
        return [each if allowed else None for each, allowed in zip(found, kept, strict=True)]

    columns = []
    for _ in range(draws):
        for _ in range(MOST_DRAWS if ranges else 1):
            column = of_draw({each.name: drawn_value(each, generator) for each in ranges})
            if any(each is not None for each in column):
                break
        else:
            assert space is not None
            raise no_allowed(space)
        columns.append(column)
    rows = itertools.chain.from_iterable(zip(*columns, strict=True))
    pairs = itertools.product([each for each in rows if each is not None], seeds)
    return [Member(number, own, chosen) for number, (chosen, own) in enumerate(pairs)]


def check_alone(dimensions: Sequence[Dimension]) -> None:
    """Raises UserError for a dimension that hangs on another."""
    for each in dimensions:
        if each.condition is not None:
            raise UserError(
                f"--space {each.name}: what hangs on {each.condition[0]} cannot vary within one "
                f"program; {ELSEWHERE}."
            )


def leaves_of(names: Sequence[str], config: Any) -> tuple[str, ...]:
    """Returns those of the varied settings that are arguments of the program.

    Args:
      names: what varies.
      config: the experiment's settings, texts with their braces.

    Raises:
      UserError: a setting that is no number of the program.
    """
    found = []
    for name in names:
        if name in OF_DATA:
            continue
        if hasattr(config, name):
            value = getattr(config, name)
            if not isinstance(value, float):
                kind = "a whole number" if type(value) is int else f"of type {type(value).__name__}"
                raise UserError(
                    f"--space {name}: it is {kind}, on which the program itself depends, and "
                    f"cannot vary within one. Floats can, such as learning_rate, weight_decay and "
                    f"numbers of --augment, and {', '.join(OF_DATA)}; {ELSEWHERE}."
                )
        elif f"{{{name}}}" not in getattr(config, "augment", ""):
            raise UserError(
                f"--space {name}: within one program only --augment may have {{{name}}} in its "
                f"text; {ELSEWHERE}."
            )
        found.append(name)
    return tuple(found)


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Returns the settings with numbers, which may be traced, in their fields and in `augment`."""
    from cnnjax.augment.policy import parse_policy

    fields = {name: value for name, value in values.items() if hasattr(config, name)}
    words = {f"{{{name}}}": value for name, value in values.items() if name not in fields}
    if words:
        fields["augment"] = parse_policy(config.augment, words)
    return dataclasses.replace(config, **fields)


def config_of(config: Any, member: Member) -> Any:
    """Returns the settings of a member's own run."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own = applied(settings, member.chosen) | {"seed": member.seed}
    return dataclasses.replace(config, **own)


def check_switches(configs: Sequence[Any]) -> None:
    """Raises a UserError where a setting is 0 in one member, which leaves its term out, only."""
    for name in SWITCHES:
        values = [getattr(each, name, 0) for each in configs]
        if any(values) and not all(values):
            raise UserError(
                f"--space {name}: 0 leaves it out of the program, which members share: give "
                "numbers above 0, or leave it out of all."
            )


def check_leaves(step: Callable[..., Any], values: Mapping[str, Any], *others: Any) -> None:
    """Traces a member's step, once, and raises a UserError for a number that cannot vary.

    Args:
      step: `(values, *others) -> anything`.
      values: name -> number of one member.
      others: what else it takes: arrays or `jax.ShapeDtypeStruct`s.
    """

    def traced(names: Sequence[str]) -> Any:
        kept = {name: float(value) for name, value in values.items() if name not in names}
        given = {name: np.asarray(values[name]) for name in names}
        return jax.make_jaxpr(lambda given, *others: step({**kept, **given}, *others))(
            given, *others
        )

    try:
        program = traced(list(values)).jaxpr
    except (TypeError, ValueError) as error:
        for name in values:
            try:
                traced([name])
            except (TypeError, ValueError):
                raise UserError(
                    f"--space {name}: the program itself depends on its value, such as by a "
                    f"shape, so that it cannot vary within one; {ELSEWHERE}."
                ) from error
        raise
    used = {id(atom) for equation in program.eqns for atom in equation.invars}
    # The arguments come by name.
    for name, variable in zip(sorted(values), program.invars, strict=False):
        if id(variable) not in used:
            raise UserError(
                f"--space {name}: what members compute does not depend on it with these settings; "
                "leave it out."
            )
