"""What was done to each layer of a network, and the error that it adds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import aligned
from cnnjax.compress.quantization.calibration import average_over, inputs_of
from cnnjax.compress.quantization.quantized import leaves_of, linear_output
from cnnjax.trees import named_leaves

if TYPE_CHECKING:
    from cnnjax.compress.quantization.network import Prepared

Variables = dict[str, Any]
Normalize = Callable[[Any], jax.Array]
# Decibels of an error of a 10^-30th of the signal: none at all would be infinite.
EXACT = 300.0


@dataclasses.dataclass(frozen=True)
class Row:
    """What was done to one layer.

    Attributes:
      path, kind: of the layer; kind is its class.
      weights, activations: such as `int8`; `float32` where they are left alone.
      note: why it was skipped, or what was done besides.
      bytes_before, bytes_after: of its parameters.
      sqnr: signal to quantization noise of its sums, in decibels, where this layer alone is
        quantized; None where nothing was quantized or measured.
      accuracy: of the network with this layer alone quantized; None where it was not measured.
    """

    path: str
    kind: str
    weights: str = "float32"
    activations: str = "float32"
    note: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr: float | None = None
    accuracy: float | None = None


def rows_of(
    prepared: Prepared,
    variables: Variables,
    noise: Mapping[str, float],
    accuracies: Mapping[str, float] | None = None,
) -> tuple[Row, ...]:
    """Returns a row for each layer with parameters, in the order of computation.

    Args:
      prepared: the network before its weights became codes.
      variables: after that.
      noise: what `signal_to_noise` returned.
      accuracies: what `mixed.one_at_a_time` returned.
    """
    before, after = (
        {path: int(jnp.dtype(leaf.dtype).itemsize * leaf.size) for path, leaf in tree.items()}
        for tree in (
            named_leaves(prepared.variables["params"]),
            named_leaves(variables["params"]),
        )
    )
    rows = []
    for path, layer in prepared.program.layers.items():
        plan = prepared.plans.get(path)
        weights = activations = "float32"
        if plan is not None:
            weights = plan.weights if isinstance(plan.weights, str) else f"int{plan.weights}"
            activations = f"int{plan.activations}" if plan.activations else "float32"
        rows.append(
            Row(
                path,
                layer.kind,
                weights,
                activations,
                prepared.skipped.get(path, prepared.notes.get(path, "")),
                _own_bytes(before, path),
                _own_bytes(after, path),
                noise.get(path),
                (accuracies or {}).get(path),
            )
        )
    return tuple(rows)


def signal_to_noise(
    prepared: Prepared, variables: Variables, images: Sequence[Any], normalize: Normalize
) -> dict[str, float]:
    """Returns, in decibels, each layer's sums over the error that quantizing it alone adds.

    Args:
      prepared: the network before its weights became codes.
      variables: after that.
      images: batches `[batch, height, width, channels]`.
      normalize: images -> what the model expects.
    """
    plans = prepared.plans

    def powers(floats: Variables, stored: Variables, x: jax.Array) -> Any:
        def measure(path: str, module: nn.Module, x: jax.Array) -> jax.Array:
            plain = linear_output(module, x, leaves_of(floats["params"], path))
            own = leaves_of(stored["params"], path)
            error = linear_output(module, x, own, plans[path]) - plain
            return jnp.stack([jnp.mean(jnp.square(plain)), jnp.mean(jnp.square(error))])

        return inputs_of(prepared.model, floats, x, plans, measure)

    compiled = jax.jit(powers)
    average = average_over(lambda stored, x: compiled(prepared.variables, stored, x))
    return {
        path: 10 * math.log10(max(signal, 1e-30) / noise) if noise else EXACT
        for path, (signal, noise) in average(variables, images, normalize).items()
    }


def report_table(rows: Sequence[Row]) -> str:
    """Returns the rows as a table in text, and a line for each kind of layer that was skipped."""
    measured = any(row.accuracy is not None for row in rows)
    header = ["layer", "kind", "weights", "inputs", "bytes", "SQNR dB"]
    header += ["alone %"] if measured else []
    cells = [[*header, "note"]]
    for row in rows:
        line = [row.path, row.kind, row.weights, row.activations]
        line += [f"{row.bytes_after:,}", "" if row.sqnr is None else f"{row.sqnr:.1f}"]
        if measured:
            line.append("" if row.accuracy is None else f"{100 * row.accuracy:.2f}")
        cells.append([*line, row.note])
    lines = aligned.lines(cells, "llll" + "r" * (len(cells[0]) - 5) + "l", ruled=True)
    quantized = [row for row in rows if row.weights != "float32"]
    lines.append(f"{len(quantized)} of {len(rows)} layers with parameters are quantized.")
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the rows as a file holds them."""
    return [dataclasses.asdict(row) for row in rows]


def _own_bytes(sizes: Mapping[str, int], path: str) -> int:
    return sum(size for name, size in sizes.items() if name.rpartition("/")[0] == path)
