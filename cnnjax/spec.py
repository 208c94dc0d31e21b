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

import ast
import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cnnjax.errors import UserError, unknown_name

Registry = Mapping[str, Callable[..., Any]]

# A quote opens a string only where no word precedes it: elsewhere it is an apostrophe.
_TOKENS = re.compile(r"""(?<![\w)\]])(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\\.|.""", re.DOTALL)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_LITERALS = (bool, int, float, str, tuple, list, type(None))
_SEQUENCES = (tuple, list, collections.abc.Sequence)
_EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a word",
    tuple: "a tuple",
    type(None): "None",
}


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
        named = [f"{name}={_written(value)}" for name, value in self.keyword.items()]
        inside = ", ".join([*map(_written, self.positional), *named])
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
    signature = _signature(registry[item.name], supplied)
    values = checked(item, signature, kind)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    rest = [name for name in values if kinds[name] is inspect.Parameter.VAR_POSITIONAL]
    positional = values.pop(rest[0]) if rest else ()
    return functools.partial(registry[item.name], *positional, **values)


def checked(item: Spec, signature: inspect.Signature, kind: str) -> dict[str, Any]:
    """Returns an item's arguments by name, converted as a signature says. Raises as `bind`."""
    try:
        if not signature.parameters and (item.positional or item.keyword):
            raise UserError("it takes no arguments")
        for name in item.keyword:
            if name not in signature.parameters:
                raise unknown_name("argument", name, signature.parameters)
        bound = signature.bind(*item.positional, **item.keyword)
        return {
            name: _converted(name, value, signature.parameters[name])
            for name, value in bound.arguments.items()
        }
    except (TypeError, UserError) as error:
        problem = str(error) if str(error)[-1] in ".?" else f"{error}."
        form = _form(item.name, signature)
        text = f"{kind} {item.text or str(item)!r}: {problem} Write it as {form}"
        raise UserError(text) from None


def keywords(defaults: Mapping[str, Any]) -> inspect.Signature:
    """Returns the signature of arguments by name, each of the kind of its default."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in defaults.items()
    ]
    return inspect.Signature([each.replace(annotation=_annotation(each)) for each in parameters])


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
    return ", ".join(_form(name, _signature(registry[name], supplied)) for name in registry)


def convert(value: Any, annotation: Any) -> Any:
    """Returns the value as its annotation says: whole numbers as floats, lists as tuples.

    Values that no text can be, such as functions and arrays, are returned as they are.

    Raises:
      TypeError: another type; its text says what to give.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    kind = type(value)
    if annotation is Any or kind not in _LITERALS:
        return value
    if origin in (typing.Union, types.UnionType):
        for each in inner:
            with contextlib.suppress(TypeError):
                return convert(value, each)
    elif origin is typing.Literal and value in inner:
        return value
    elif annotation is float:
        if kind in (int, float) and math.isfinite(value):
            return float(value)
    elif kind is annotation or (value is None and annotation is None):
        return value if kind is not list else tuple(value)
    elif origin is collections.abc.Callable and kind is str:
        return value
    elif kind in (tuple, list) and (origin or annotation) in _SEQUENCES:
        types_ = inner[:1] * len(value) if ... in inner or len(inner) == 1 else inner
        if not inner:
            return tuple(value)
        if len(types_) == len(value):
            return tuple(map(convert, value, types_))
    raise TypeError(_expected(annotation))


def _item(text: str, kind: str, *, short: bool = True) -> Spec:
    name, *words = split(text, ":", kind) if short else [text]
    if words:
        return Spec(name.strip(), tuple(map(_value, words)), text=text)
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
            positional.append(_value(part))
        elif name in keyword:
            raise UserError(f"{kind} {text!r}: {name} is given twice: drop one")
        else:
            keyword[name] = _value(value)
    return tuple(positional), keyword


def _value(text: str) -> Any:
    """Returns a literal's value; of anything else the text."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text.strip()
    return value if type(value) in _LITERALS else text.strip()


def _written(value: Any) -> str:
    """Returns what `_value` reads as the value: a word where that is enough."""
    if type(value) not in _LITERALS:
        return getattr(value, "__name__", repr(value))
    word = isinstance(value, str) and re.fullmatch(r"[\w.+/-]+", value)
    return value if word and _value(value) == value else repr(value)


def _signature(function: Callable[..., Any], supplied: Iterable[str]) -> inspect.Signature:
    """Returns the signature without the supplied parameters, with an annotation for each."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # A name that only type checkers import.
        signature = inspect.signature(function)
    own = [
        each.replace(annotation=_annotation(each))
        for each in signature.parameters.values()
        if each.name not in supplied
    ]
    return signature.replace(parameters=own)


def _annotation(parameter: inspect.Parameter) -> Any:
    known = parameter.annotation
    if known is not parameter.empty and not isinstance(known, str):
        return known
    default = parameter.default
    return type(default) if default is not None and type(default) in _LITERALS else Any


def _converted(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    try:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return tuple(convert(each, parameter.annotation) for each in value)
        return convert(value, parameter.annotation)
    except TypeError as error:
        raise TypeError(f"{name}={value!r}: give {error}") from None


def _expected(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(map(_written, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(_expected, inner))))
    if (origin or annotation) in _SEQUENCES and inner:
        return f"({', '.join('...' if each is ... else _expected(each) for each in inner)})"
    return "a name" if origin is collections.abc.Callable else _EXPECTED.get(annotation, "")


def _form(name: str, signature: inspect.Signature) -> str:
    words = []
    for each in signature.parameters.values():
        star = "*" if each.kind is each.VAR_POSITIONAL else ""
        default = "" if each.default is each.empty else f"={_written(each.default)}"
        words.append(f"{star}{each.name}{default}")
    return f"{name}({', '.join(words)})" if words else name
