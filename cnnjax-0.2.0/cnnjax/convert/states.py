"""Finds the weights among what a training program saved: which dictionary, under which key.

A file holds dictionaries, lists and objects (placeholders, see `pickles`) in each other, and may
refer to itself or to one thing many times. A state is a dictionary whose values are tensors, or an
object that is a module of PyTorch: its parameters and buffers by name, dots between modules.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cnnjax.convert.pickles import Placeholder, name_of
from cnnjax.convert.torch_files import Reader, is_tensor, refused
from cnnjax.errors import UserError

Note = Callable[[str], None]

# Where training programs put the weights in a dictionary of other things, the first first: the
# weights that were trained go before averages of them.
ENTRIES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("weights", "params", "backbone", "encoder"),
    *("state_dict_ema", "model_ema", "model_ema_state_dict", "ema_state_dict", "ema", "params_ema"),
)
# What holds arrays by name that are no weights: an optimizer's moments, the state of a schedule.
NO_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|rng|hyper|config|args|metric", re.I)
# Of what is looked at for states, and of the modules in one.
DEEPEST, MOST_THINGS, MOST_MODULES, MOST_IN_LIST, MOST_INNER = 6, 10_000, 100_000, 16, 16
MOST_NAMED = 6
# What a saved module refers to, besides its own class.
OF_MODULES = ("torch.nn.", "torch.jit.", "__torch__.")


def choose(reader: Reader, entry: str, note: Note) -> dict[str, np.ndarray]:
    """Returns the arrays of the state that `entry` names, or of the one that is found.

    Args:
      reader: of the file.
      entry: keys with dots between them; "" takes the content itself where it is a state, or the
        first found of `ENTRIES`, or the only one found.
      note: called with a line of text for each choice, and for all that is left out.

    Raises:
      UserError: there is no such state, or several and none of them usual, or one of its tensors
        takes code to make.
    """
    chosen = reader.content
    if entry:
        chosen = _within(chosen, entry)
    elif not _is_state(chosen):
        chosen = _found(chosen, note)
    tensors = _tensors(chosen, reader, note)
    _note_unknown(reader, note)
    return {name: _array(reader, tensor, name) for name, tensor in tensors.items()}


def _found(content: Any, note: Note) -> Any:
    found = dict(_states(content))
    if not found:
        raise _no_state(content)
    usual = sorted((key for key in found if _rank(key) < len(ENTRIES)), key=_rank)
    if not usual and len(found) > 1:
        raise UserError(
            f"it holds weights under {' and '.join(found)}: choose one as entry (--entry)."
        )
    chosen = usual[0] if usual else next(iter(found))
    others = ", ".join(key for key in found if key != chosen)
    rest = f", not {others} (--entry takes another)." if others else "."
    note(f"taking the weights under {chosen!r}{rest}")
    return found[chosen]


def _rank(key: str) -> int:
    """The place among `ENTRIES` of the key's first part that is there; else their number."""
    places = [ENTRIES.index(part) for part in key.split(".") if part in ENTRIES]
    return min(places, default=len(ENTRIES))


def _within(content: Any, entry: str) -> Any:
    chosen = content
    for key in entry.split("."):
        children = dict(_children(chosen))
        if key not in children:
            keys = ", ".join(children) or "none"
            raise UserError(f"it has no entry {entry!r}; its keys are {keys}.")
        chosen = children[key]
    return chosen


def _states(content: Any) -> Iterator[tuple[str, Any]]:
    """Yields what may be weights, each with its keys, dots between those of nested things."""
    seen: dict[int, bool] = {}
    waiting = [("", content, 0)]
    while waiting and len(seen) < MOST_THINGS:
        prefix, thing, depth = waiting.pop()
        first = id(thing) not in seen
        if first:
            seen[id(thing)] = _is_state(thing)
        if seen[id(thing)]:
            yield prefix.removesuffix("."), thing
        if seen[id(thing)] or not first or depth == DEEPEST:
            continue
        children = [
            (f"{prefix}{key}.", child, depth + 1)
            for key, child in _children(thing)
            if not NO_WEIGHTS.search(key) and isinstance(child, dict | list | tuple | Placeholder)
        ]
        waiting += reversed(children)


def _children(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yields what a thing holds, by key, attribute or place in a short list."""
    if isinstance(thing, Placeholder):
        yield from ((str(k), v) for k, v in thing.attributes().items() if isinstance(k, str))
        thing = thing.pairs
    if isinstance(thing, dict):
        yield from ((key, value) for key, value in thing.items() if isinstance(key, str))
    elif isinstance(thing, list | tuple) and len(thing) <= MOST_IN_LIST:
        yield from ((str(place), value) for place, value in enumerate(thing))


def _is_state(thing: Any) -> bool:
    if isinstance(thing, Placeholder):
        return _is_module(thing)
    return (
        isinstance(thing, dict)
        and any(map(_is_array, thing.values()))
        and all(isinstance(key, str) for key in thing)
        and not _holds_state(thing)
    )


def _holds_state(thing: Any, depth: int = 3) -> bool:
    """Whether a state is within, so that tensors next to it are a history, a best score, ..."""
    inner = (
        value
        for key, value in _children(thing)
        if isinstance(value, dict | Placeholder) and not NO_WEIGHTS.search(key)
    )
    for value in itertools.islice(inner, MOST_INNER):
        if isinstance(value, dict) and any(map(_is_array, value.values())):
            return True
        if isinstance(value, Placeholder) and not is_tensor(value) and _is_module(value):
            return True
        if depth > 1 and not is_tensor(value) and _holds_state(value, depth - 1):
            return True
    return False


def _is_array(thing: Any) -> bool:
    return is_tensor(thing) or isinstance(thing, np.ndarray)


def _is_module(thing: Placeholder) -> bool:
    attributes = thing.attributes()
    scripted = thing.name.startswith("__torch__.") and bool(attributes)
    return scripted or isinstance(attributes.get("_modules"), dict)


def _tensors(state: Any, reader: Reader, note: Note) -> dict[str, Any]:
    """Returns the tensors of a state; what is none is left out, and noted."""
    if isinstance(state, Placeholder) and _is_module(state):
        note(f"taking the parameters and buffers of the saved object {state.name}.")
        return dict(_module_tensors(state, reader))
    if isinstance(state, Placeholder):
        state = dict(_children(state))
    if not isinstance(state, dict) or not any(map(_is_array, state.values())):
        raise _no_state(state)
    left_out = [str(key) for key, value in state.items() if not _is_array(value)]
    for key in left_out:
        if _holds_tensor(state.get(key)):
            raise UserError(f"its tensor {key}: {refused(state[key])}")
    if left_out:
        note(f"leaving out what is no tensor: {_listed(left_out)}.")
    return {str(key): value for key, value in state.items() if _is_array(value)}


def _module_tensors(module: Placeholder, reader: Reader) -> Iterator[tuple[str, Any]]:
    """Yields a saved module's parameters and buffers, as its state_dict() has them."""
    count = 0
    waiting: list[tuple[str, Any]] = [("", module)]
    while waiting:
        prefix, thing = waiting.pop()
        count += 1
        reader.read_without.add(thing.name)
        if count > MOST_MODULES or prefix.count(".") > 100:
            raise UserError("its modules hold each other without end.")
        attributes = thing.attributes()
        # A module of TorchScript has all as attributes.
        own = attributes if "_modules" not in attributes else {}
        passing = attributes.get("_non_persistent_buffers_set", ())
        for group in (attributes.get("_parameters"), attributes.get("_buffers"), own):
            for name, value in group.items() if isinstance(group, dict) else ():
                hidden = group is attributes.get("_buffers") and _among(name, passing)
                if _is_array(value) and not hidden:
                    yield f"{prefix}{name}", value
                elif _holds_tensor(value):
                    raise UserError(f"its tensor {prefix}{name}: {refused(value)}")
        modules = attributes.get("_modules", own)
        children = [
            (f"{prefix}{name}.", child)
            for name, child in (modules.items() if isinstance(modules, dict) else ())
            if isinstance(child, Placeholder) and _is_module(child)
        ]
        waiting += reversed(children)


def _among(name: Any, names: Any) -> bool:
    return isinstance(names, set | frozenset | list | tuple) and name in names


def _holds_tensor(thing: Any) -> bool:
    """Whether an object is made of a tensor, so that it is likely one of another class."""
    if not isinstance(thing, Placeholder) or _is_module(thing):
        return False
    parts = [*thing.arguments, thing.state]
    inner = [part for each in parts if isinstance(each, tuple | list) for part in each]
    return any(map(_is_array, (*parts, *inner)))


def _array(reader: Reader, tensor: Any, name: str) -> np.ndarray:
    return tensor if isinstance(tensor, np.ndarray) else reader.array(tensor, name)


def _note_unknown(reader: Reader, note: Note) -> None:
    unknown = set(reader.unknown) - reader.read_without
    names = sorted(name for name in unknown if not name.startswith(OF_MODULES))
    if names:
        note(f"leaving out what takes code that is not run: {_listed(names)}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _no_state(content: Any) -> UserError:
    children = dict(_children(content))
    called = next((value.name for value in children.values() if isinstance(value, Placeholder)), "")
    if isinstance(content, dict):
        keys = f"its keys are {_listed([key for key in content if isinstance(key, str)])}"
    else:
        keys = f"it is of {name_of(content)}"
    why = f"; {called} is refused, because nothing in a file is run" if called else ""
    return UserError(
        f"it is no dictionary of arrays ({keys}{why}): name the one that is as entry (--entry), or "
        "save model.state_dict()."
    )
