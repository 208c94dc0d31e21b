"""Where the time of training steps went: a recorded trace, its operations, and their layers.

A trace knows operations by the names that the compiler gave them; the compiled program says of
each which JAX operation it was made of, and within which layer. Calls of libraries, such as
oneDNN's convolutions on a CPU, are operations of the program like any other.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cnnjax import aligned
from cnnjax.cost.scopes import layer_of
from cnnjax.errors import UserError

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w-]*)\(")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_OPERANDS = re.compile(r"%([\w.-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# They last as long as what they call, which is listed for itself.
_CONTAINERS = ("while", "call", "conditional")
REST = "(loss, optimizer, metrics)"


class Operation(NamedTuple):
    """An operation of a compiled program: layer, pass, the JAX operation it is of, its kind."""

    layer: str
    backward: bool
    source: str
    opcode: str

    @property
    def place(self) -> str:
        """Layer and pass in words."""
        if not self.layer:
            return REST
        return f"{self.layer} {'backward' if self.backward else 'forward'}"


@dataclasses.dataclass(frozen=True)
class Spent:
    """What an operation took: seconds of all its calls, over all devices and threads."""

    name: str
    operation: Operation
    seconds: float
    calls: int


def operations(program: str, root: str = "") -> dict[str, Operation]:
    """Returns the operations of a compiled program by their names, which traces use.

    What carries no scope of its own has that of what it calls, or else of what it takes.

    Args:
      program: `compiled.as_text()`: optimized HLO.
      root: the network's class, see `layer_of`.
    """
    found: dict[str, Operation] = {}
    members: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if begins := _COMPUTATION.match(line):
            computation = begins[1]
        elif instruction := _INSTRUCTION.match(line):
            name, text = instruction.groups()
            texts[name] = text
            members.setdefault(computation, []).append(name)
    for name, text in texts.items():
        opcode = _OPCODE.search(text)
        kind = opcode[1] if opcode else ""
        if target := _TARGET.search(text):
            kind = target[1]
        scope = _scope(text) or _scope_of_called(text, members, texts) or _of_operands(text, texts)
        path, _, source = scope.rpartition("/")
        layer, backward = layer_of(path, root)
        found[name] = Operation(layer, backward, source, kind)
    return found


def _scope(text: str) -> str:
    found = _SCOPE.search(text)
    return found[1] if found and "/" in found[1] else ""


def _scope_of_called(
    text: str, members: Mapping[str, Sequence[str]], texts: Mapping[str, str]
) -> str:
    """Returns the commonest scope in what an operation calls."""
    scopes = [
        _scope(texts[member])
        for called in _CALLED.findall(text)
        for member in members.get(called, ())
    ]
    counted = Counter(filter(None, scopes))
    return counted.most_common(1)[0][0] if counted else ""


def _of_operands(text: str, texts: Mapping[str, str]) -> str:
    """Returns the scope of the first operand that has one."""
    names = _OPERANDS.findall(text.partition("metadata=")[0])
    return next(filter(None, (_scope(texts.get(name, "")) for name in names)), "")


def trace_file(directory: Path) -> Path:
    """Returns the newest trace of a profiler's directory; a UserError if there is none."""
    files = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{directory} holds no trace: record one with --profile steps=10:20.")
    return files[-1]


def spent(trace: Path, known: Mapping[str, Operation]) -> list[Spent]:
    """Returns what each operation of a trace took, the dearest first.

    Args:
      trace: an `.xplane.pb` file of `jax.profiler`.
      known: `operations` of the program that was traced; others in the trace are left out.
    """
    import jax

    seconds: dict[str, float] = {}
    calls: Counter[str] = Counter()
    for event in _events(jax.profiler.ProfileData.from_file(str(trace))):
        name = dict(event.stats).get("hlo_op")
        # The end of an operation on another thread is an event too.
        if name is None or not isinstance(name, str) or event.name.startswith("end: "):
            continue
        if name in known and known[name].opcode not in _CONTAINERS:
            seconds[name] = seconds.get(name, 0.0) + event.duration_ns / 1e9
            calls[name] += 1
    ordered = sorted(seconds.items(), key=lambda pair: -pair[1])
    return [Spent(name, known[name], secs, calls[name]) for name, secs in ordered]


def _events(data: Any) -> Iterable[Any]:
    for plane in data.planes:
        # Of an accelerator some lines hold the same time once more, by module and by step.
        lines = list(plane.lines)
        operations = [line for line in lines if line.name == "XLA Ops"]
        for line in operations or lines:
            yield from line.events


def by_layer(found: Iterable[Spent]) -> dict[str, float]:
    """Returns layer and pass -> seconds, the dearest first."""
    seconds: dict[str, float] = {}
    for each in found:
        place = each.operation.place
        seconds[place] = seconds.get(place, 0.0) + each.seconds
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def table(found: Sequence[Spent], steps: int, *, most: int = 10) -> str:
    """Returns the dearest operations as text: fraction of the time, ms and calls per step."""
    whole = sum(each.seconds for each in found)
    rows = [("time", "ms/step", "calls/step", "layer", "operation", "kind", "in the trace")]
    for each in found[:most]:
        rows.append(
            (
                f"{each.seconds / whole:.1%}",
                f"{1e3 * each.seconds / steps:.3f}",
                f"{each.calls / steps:g}",
                each.operation.place,
                each.operation.source or "-",
                each.operation.opcode,
                each.name,
            )
        )
    lines = aligned.lines(rows, "rrrl")
    rest = sum(each.seconds for each in found[most:])
    if rest:
        width = max(len(row[0]) for row in rows)
        lines.append(f"{rest / whole:.1%} in {len(found) - most} others".rjust(width))
    return "\n".join(lines)


def as_json(found: Sequence[Spent], steps: int) -> dict[str, Any]:
    """Returns all operations and layers, with seconds per step."""
    return {
        "steps": steps,
        "layers": {place: seconds / steps for place, seconds in by_layer(found).items()},
        "operations": [
            {
                "name": each.name,
                **each.operation._asdict(),
                "seconds_per_step": each.seconds / steps,
                "calls_per_step": each.calls / steps,
            }
            for each in found
        ],
    }


def report(directory: Path, program: str, steps: int, root: str = "") -> str:
    """Writes `operations.json` beside a trace; returns the dearest operations and where all is.

    Args:
      directory: of the profiler.
      program: the compiled program that was traced: `compiled.as_text()`.
      steps: the number of steps in the trace.
      root: the network's class.
    """
    trace = trace_file(directory)
    found = spent(trace, operations(program, root))
    if not found:
        return f"the trace {trace} holds no operation of the step"
    path = directory / "operations.json"
    path.write_text(json.dumps(as_json(found, steps), indent=2) + "\n")
    perfetto = next(iter(sorted(trace.parent.glob("perfetto_trace.json.gz"))), trace)
    return (
        f"{table(found, steps)}\n"
        f"all of them: {path}\n"
        f"the trace:   open {perfetto} at ui.perfetto.dev, or xprof --logdir {directory}"
    )
