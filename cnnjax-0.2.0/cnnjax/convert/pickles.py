"""Runs a pickle without running anything of it: what it would call becomes a placeholder.

A pickle is a program: it names functions and classes of Python, and calls them. `Machine` carries
out its instructions on containers, numbers and texts. A name stays a name (`Global`), and a call of
it gives a `Placeholder` that keeps the arguments. Containers alone are built (`KNOWN`). So a file's
tensors are found among objects whose classes are not here, and a hostile file builds nothing but
placeholders.

Time and memory are bounded: instructions are counted, and what they copy; keys are such that
hashing them takes a few steps; and nothing walks through what was built.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Sized
from typing import Any

from cnnjax.errors import UserError

# A network of ten thousand tensors takes about half a million.
MOST_INSTRUCTIONS = 2_000_000
# What calls of known names may copy, in elements: of a long list, one instruction copies all.
MOST_COPIED = 2**28
# Of a tuple that is a key: hashing and comparing recurse, into what its members share too.
DEEPEST_KEY = 2
LONGEST_KEY = 16
# Larger numbers could be chosen so that all have one hash.
LARGEST_KEY = 2**60


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the pickle refers to; never the thing itself."""

    name: str


@dataclasses.dataclass(eq=False, slots=True)
class Placeholder:
    """What calling `name` would have given.

    Attributes:
      name: of the function or class.
      arguments: of the call.
      state: that it would have been set to.
      items: that would have been appended or added.
      pairs: that would have been set in it.
    """

    name: str
    arguments: tuple = ()
    state: Any = None
    items: list[Any] = dataclasses.field(default_factory=list)
    pairs: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def attributes(self) -> dict[Any, Any]:
        """Returns the attributes by name; `{}` where they are not known."""
        parts = self.state if isinstance(self.state, tuple) else (self.state, *self.arguments[:1])
        return next((part for part in parts if isinstance(part, dict)), {})


class Machine:
    """Carries out the instructions of one pickle.

    Attributes:
      unknown: the names that it refers to and that are not known, in order, as keys.
    """

    def __init__(self, persistent: Callable[[Any], Any]) -> None:
        """`persistent` gives, for an identity, what the pickle keeps outside of itself."""
        self.unknown: dict[str, None] = {}
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def run(self, file: Any) -> Any:
        """Returns what the pickle at the file's position builds.

        Raises:
          UserError: it is damaged, cut short, or too long.
        """
        count = 0
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._do(opcode.name, argument)
                count += 1
                if count > MOST_INSTRUCTIONS:
                    raise UserError(f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions.")
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise UserError(f"its pickle is damaged or cut short ({error}).") from None
        raise UserError("its pickle is cut short.")

    def _do(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[name])]
            self._stack.append(tuple(reversed(items)))
        elif name in _CONTAINERS:
            self._stack.append(_CONTAINERS[name](self._since_mark()))
        else:
            method = _METHODS.get(name)
            if method is None:
                raise UserError(f"it holds the pickle instruction {name}, which is refused.")
            method(self, argument)

    def _pop(self) -> Any:
        # Else it would take what is below a mark, as no pickle does.
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise UserError("its pickle is damaged: it takes more than it has put down.")
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _mark(self, argument: Any) -> None:
        self._marks.append(len(self._stack))

    def _drop(self, argument: Any) -> None:
        # On a mark it takes the mark.
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _drop_to_mark(self, argument: Any) -> None:
        self._since_mark()

    def _duplicate(self, argument: Any) -> None:
        self._stack.append(self._stack[-1])

    def _remember(self, argument: Any) -> None:
        self._memo[key(len(self._memo) if argument is None else argument)] = self._stack[-1]

    def _recall(self, argument: Any) -> None:
        self._stack.append(self._memo[argument])

    def _append(self, argument: Any) -> None:
        self._extend([self._pop()])

    def _appends(self, argument: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if isinstance(into, Placeholder):
            into.items.extend(items)
        elif isinstance(into, list):
            into.extend(items)
        else:
            raise UserError("its pickle is damaged: it appends to what is no list.")

    def _add_items(self, argument: Any) -> None:
        items = self._since_mark()
        if isinstance(self._stack[-1], set):
            self._stack[-1].update(map(key, items))
        else:
            self._extend(items)

    def _set_item(self, argument: Any) -> None:
        value, name = self._pop(), self._pop()
        self._update([name, value])

    def _set_items(self, argument: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        into = self._stack[-1]
        into = into.pairs if isinstance(into, Placeholder) else into
        if not isinstance(into, dict):
            raise UserError("its pickle is damaged: it sets items of what is no dictionary.")
        into.update(pairs(items))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _stack_global(self, argument: Any) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UserError("its pickle is damaged: it refers to what is no name.")
        full = f"{module}.{name}"
        if full not in KNOWN:
            self.unknown[full] = None
        self._stack.append(Global(full))

    def _extension(self, argument: Any) -> None:
        self._name("copyreg", f"extension {argument}")

    def _persistent_id(self, argument: Any) -> None:
        self._stack.append(self._persistent(self._pop()))

    def _persistent_text(self, argument: Any) -> None:
        self._stack.append(self._persistent(argument))

    def _reduce(self, argument: Any) -> None:
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments)

    def _new(self, argument: Any) -> None:
        self._reduce(argument)

    def _new_with_keywords(self, argument: Any) -> None:
        keywords = self._pop()
        arguments, function = self._pop(), self._pop()
        self._stack.append(Placeholder(name_of(function), (*arguments, keywords)))

    def _instance(self, argument: str) -> None:
        arguments = self._since_mark()
        self._global(argument)
        self._call(self._pop(), tuple(arguments))

    def _object(self, argument: Any) -> None:
        function, *arguments = self._since_mark()
        self._call(function, tuple(arguments))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise UserError("its pickle is damaged: it calls without arguments.")
        known = KNOWN.get(function.name) if isinstance(function, Global) else None
        if known:
            self._copied += sum(len(part) for part in arguments if isinstance(part, Sized))
            if self._copied > MOST_COPIED:
                raise UserError("its pickle copies more than any file of weights: it is refused.")
        made = known(*arguments) if known else Placeholder(name_of(function), arguments)
        self._stack.append(made)

    def _build(self, argument: Any) -> None:
        state = self._pop()
        thing = self._stack[-1]
        if isinstance(thing, Placeholder):
            thing.state = state
        elif not isinstance(thing, (dict, list, set)):
            # Of these, only attributes, such as the versions next to a state dict.
            raise UserError("its pickle is damaged: it sets the state of what has none.")


def name_of(thing: Any) -> str:
    """Returns a name for what the pickle calls."""
    return thing.name if isinstance(thing, Global | Placeholder) else type(thing).__name__


def key(thing: Any, depth: int = 0) -> Any:
    """Returns the thing, as a key or a member of a set.

    Raises:
      UserError: it is none that a file needs; hashing it might take time or recursion without end.
    """
    if isinstance(thing, tuple) and depth < DEEPEST_KEY and len(thing) <= LONGEST_KEY:
        for part in thing:
            key(part, depth + 1)
        return thing
    if thing is None or isinstance(thing, (str, bytes, float, bool, Global, Placeholder)):
        return thing
    if isinstance(thing, int) and abs(thing) < LARGEST_KEY:
        return thing
    raise UserError(
        "its pickle has a key that is refused (too deep, too long, too large, or changeable)."
    )


def pairs(items: list[Any]) -> dict[Any, Any]:
    """Returns the dictionary of key, value, key, value and so on."""
    return {key(name): value for name, value in zip(items[::2], items[1::2], strict=True)}


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    return {key(name): value for name, value in items}


def _set(items: Any = ()) -> set[Any]:
    return set(map(key, items))


def _encoded(text: str, encoding: str = "latin1") -> Any:
    """Bytes, as protocol 2 writes them."""
    if encoding.replace("-", "") != "latin1":
        return Placeholder("_codecs.encode", (text, encoding))
    return text.encode("latin1")


def _bytes(content: Any = b"", encoding: str = "latin1") -> Any:
    if isinstance(content, str):
        return _encoded(content, encoding)
    return content if isinstance(content, bytes) else Placeholder("bytes", (content,))


def _blank(made: Any, *arguments: Any) -> Placeholder:
    return Placeholder(name_of(made), arguments)


# What is built is a container, or bytes: name -> function of the call's arguments.
KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda factory=None, items=(): _dictionary(items),
    "_codecs.encode": _encoded,
    "torch.Size": lambda items=(): tuple(items),
    **{
        f"{module}.{name}": function
        for module in ("builtins", "__builtin__")
        for name, function in {
            "dict": _dictionary,
            "set": _set,
            "frozenset": lambda items=(): frozenset(_set(items)),
            "bytearray": _bytes,
            "bytes": _bytes,
        }.items()
    },
    **{
        f"{module}.{name}": _blank
        for module in ("copyreg", "copy_reg")
        for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
    },
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": pairs,
    "FROZENSET": lambda items: frozenset(map(key, items)),
}
_METHODS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": Machine._mark,
    "POP": Machine._drop,
    "POP_MARK": Machine._drop_to_mark,
    "DUP": Machine._duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine._remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine._recall),
    "APPEND": Machine._append,
    "APPENDS": Machine._appends,
    "ADDITEMS": Machine._add_items,
    "SETITEM": Machine._set_item,
    "SETITEMS": Machine._set_items,
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), Machine._extension),
    "PERSID": Machine._persistent_text,
    "BINPERSID": Machine._persistent_id,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._new,
    "NEWOBJ_EX": Machine._new_with_keywords,
    "INST": Machine._instance,
    "OBJ": Machine._object,
    "BUILD": Machine._build,
}
