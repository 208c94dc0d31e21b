"""Arguments as texts and as a signature takes them: read, written, converted, refused."""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cnnjax.errors import unknown_name

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


def read_value(text: str) -> Any:
    """Returns a literal's value; of anything else the text."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text.strip()
    return value if type(value) in _LITERALS else text.strip()


def written(value: Any) -> str:
    """Returns what `read_value` reads as the value: a word where that is enough."""
    if type(value) not in _LITERALS:
        return getattr(value, "__name__", repr(value))
    word = isinstance(value, str) and re.fullmatch(r"[\w.+/-]+", value)
    return value if word and read_value(value) == value else repr(value)


def own_signature(function: Callable[..., Any], supplied: Iterable[str]) -> inspect.Signature:
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


def keywords(defaults: Mapping[str, Any]) -> inspect.Signature:
    """Returns the signature of arguments by name, each of the kind of its default."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in defaults.items()
    ]
    return inspect.Signature([each.replace(annotation=_annotation(each)) for each in parameters])


def fitted(
    signature: inspect.Signature, positional: Iterable[Any], keyword: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments by name, converted as the annotations say.

    Raises:
      ValueError, TypeError: an argument that is unknown, missing, too much or of another type.
    """
    if not signature.parameters and (positional or keyword):
        raise TypeError("it takes no arguments")
    for name in keyword:
        if name not in signature.parameters:
            raise unknown_name("argument", name, signature.parameters)
    bound = signature.bind(*positional, **keyword)
    return {
        name: _converted(name, value, signature.parameters[name])
        for name, value in bound.arguments.items()
    }


def form(name: str, signature: inspect.Signature) -> str:
    words = []
    for each in signature.parameters.values():
        star = "*" if each.kind is each.VAR_POSITIONAL else ""
        default = "" if each.default is each.empty else f"={written(each.default)}"
        words.append(f"{star}{each.name}{default}")
    return f"{name}({', '.join(words)})" if words else name


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
        return " or ".join(map(written, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(_expected, inner))))
    if (origin or annotation) in _SEQUENCES and inner:
        return f"({', '.join('...' if each is ... else _expected(each) for each in inner)})"
    return "a name" if origin is collections.abc.Callable else _EXPECTED.get(annotation, "")
