"""One grammar for small specs: what a setting names, `name(argument=value, ...)`.

    list      items separated by commas
    item      name, name(argument, ...) or, in short, name:value:value
    argument  value or name=value
    value     a Python literal, or a word, which stands for itself

A name is a key of a registry: name -> function. Its arguments are those of the function, checked
against the signature and the annotations before anything is computed.

>>> def crop(pixels: int, fill: float = 0.0):
...     return pixels, fill
>>> [call(item, {"crop": crop}, "change") for item in parse("crop:4, crop(2, fill=1)")]
[(4, 0.0), (2, 1.0)]
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.signatures import fitted, form, own_signature, read_value, written

Registry = Mapping[str, Callable[..., Any]]

# A quote opens a string only where no word precedes it: elsewhere it is an apostrophe.
_TOKENS = re.compile(r"""(?<![\w)\]])(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\\.|.""", re.DOTALL)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One item as it was read; `str` writes it so that `parse` reads the same.

    Attributes:
      name: before the bracket or colon.
      positional: values without a name.
      keyword: values by name, in the order given.
      text: what a person wrote, for messages.
    """

    name: str
    positional: tuple[Any, ...] = ()
    keyword: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        named = [f"{name}={written(value)}" for name, value in self.keyword.items()]
        inside = ", ".join([*map(written, self.positional), *named])
        return f"{self.name}({inside})" if inside else self.name


def parse(text: str, kind: str = "spec") -> list[Spec]:
    """Reads items separated by commas, such as `crop:4,flip(0.3)`; none from blank text.

    Args:
      text: the items.
      kind: what they are called in messages, such as `augmentation`.

    Raises:
      UserError: brackets that do not match, or arguments that cannot be read.
    """
    return [_item(part.strip(), kind) for part in split(text, ",", kind)] if text.strip() else []


def parse_one(text: str, kind: str = "spec", *, short: bool = True) -> Spec:
    """Reads one item. Raises as `parse`, and a UserError for several.

    Without `short`, a colon is part of the name.
    """
    found = split(text, ",", kind)
    if len(found) > 1:
        raise UserError(f"{kind} {text!r}: give one, not {len(found)}")
    return _item(text.strip(), kind, short=short)


def arguments(words: Iterable[str], kind: str = "arguments") -> dict[str, Any]:
    """Reads arguments alone, such as `activation=tanh` and `widths=(32, 64)`, by name."""
    text = ",".join(words)
    positional, keyword = _arguments(text, text, kind)
    if positional:
        raise UserError(f"{kind} {text!r}: {positional[0]!r} has no name: write it as name=value")
    return keyword


def extend(item: Spec, more: Mapping[str, Any], kind: str = "spec") -> Spec:
    """Returns the item with more arguments; a UserError for one that it has already."""
    for name in more:
        if name in item.keyword:
            raise UserError(f"{kind} {str(item)!r}: {name} is given twice: drop one")
    return Spec(item.name, item.positional, {**item.keyword, **more}) if more else item


def filled(item: Spec, values: Mapping[str, Any]) -> Spec:
    """Returns the item with a value in place of each argument that is one of these words."""

    def value(argument: Any) -> Any:
        return values.get(argument, argument) if isinstance(argument, str) else argument

    positional = tuple(map(value, item.positional))
    keyword = {name: value(argument) for name, argument in item.keyword.items()}
    return dataclasses.replace(item, positional=positional, keyword=keyword)


def split(text: str, separator: str, kind: str = "spec") -> list[str]:
    """Splits at the separators that are outside of brackets and of quotes."""
    parts, open_brackets = [""], list[str]()
    for token in _TOKENS.findall(text):
        if token == separator and not open_brackets:
            parts.append("")
            continue
        if token in _CLOSING:
            open_brackets.append(_CLOSING[token])
        elif token in _CLOSING.values() and (not open_brackets or open_brackets.pop() != token):
            raise UserError(f"{kind} {text!r}: {token!r} closes no bracket: drop it")
        parts[-1] += token
    if open_brackets:
        raise UserError(f"{kind} {text!r}: a bracket is not closed: add {open_brackets[-1]!r}")
    return parts


def bind(
    item: Spec, registry: Registry, kind: str, *, supplied: Iterable[str] = ()
) -> functools.partial:
    """Returns the function that an item names, with the item's arguments.

    Args:
      item: what `parse` returned.
      registry: name -> function. Values are checked against its annotations, or where there are
        none against the kind of the default.
      kind: what the names are called in messages.
      supplied: parameters that the program passes, not the item.

    Raises:
      UserError: an unknown name or argument, or one that is missing, too much or of another type.
    """
    if item.name not in registry:
        raise unknown_name(kind, item.name, registry)
    signature = own_signature(registry[item.name], supplied)
    values = checked(item, signature, kind)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    rest = [name for name in values if kinds[name] is inspect.Parameter.VAR_POSITIONAL]
    positional = values.pop(rest[0]) if rest else ()
    return functools.partial(registry[item.name], *positional, **values)


def checked(item: Spec, signature: inspect.Signature, kind: str) -> dict[str, Any]:
    """Returns an item's arguments by name, converted as a signature says. Raises as `bind`."""
    try:
        return fitted(signature, item.positional, item.keyword)
    except (TypeError, UserError) as error:
        problem = str(error) if str(error)[-1] in ".?" else f"{error}."
        text = f"{kind} {item.text or str(item)!r}: {problem} Write it as "
        raise UserError(text + form(item.name, signature)) from None


def call(item: Spec, registry: Registry, kind: str, **supplied: Any) -> Any:
    """Calls the function that an item names; what it refuses is said of the item.

    Raises:
      UserError: as for `bind`, and those of the function.
    """
    function = bind(item, registry, kind, supplied=supplied)
    try:
        return function(**supplied)
    except UserError as error:
        raise UserError(f"{kind} {item.text or str(item)!r}: {error}") from None


def check(text: str, registry: Registry, kind: str, *, supplied: Iterable[str] = ()) -> None:
    """Binds each item and calls nothing. Raises as `parse` and `bind`."""
    for item in parse(text, kind):
        bind(item, registry, kind, supplied=supplied)


def describe(registry: Registry, *, supplied: Iterable[str] = ()) -> str:
    """Returns how each name is written, on one line: for help."""
    return ", ".join(form(name, own_signature(registry[name], supplied)) for name in registry)


def _item(text: str, kind: str, *, short: bool = True) -> Spec:
    name, *words = split(text, ":", kind) if short else [text]
    if words:
        return Spec(name.strip(), tuple(map(read_value, words)), text=text)
    name, bracket, inside = text.partition("(")
    if not (bracket and inside.endswith(")")):
        return Spec(text, text=text)
    return Spec(name.strip(), *_arguments(inside[:-1], text, kind), text)


def _arguments(inside: str, text: str, kind: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional values and those by name of what stands between the brackets."""
    positional: list[Any] = []
    keyword: dict[str, Any] = {}
    parts = split(inside, ",", kind)
    for part in parts if parts[-1].strip() else parts[:-1]:
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (equals and name.isidentifier()):
            positional.append(read_value(part))
        elif name in keyword:
            raise UserError(f"{kind} {text!r}: {name} is given twice: drop one")
        else:
            keyword[name] = read_value(value)
    return tuple(positional), keyword
