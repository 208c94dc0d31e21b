"""TPUs without one: programs compiled ahead of time for a described slice, and lowered for export.

libtpu carries the compiler for every generation; it needs no TPU to compile for one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from cnnjax.cost.operations import LayerCost
from cnnjax.cost.roofline import Roofline
from cnnjax.errors import UserError
from cnnjax.trees import named_leaves

# By JAX's name of a chip: operations (bfloat16) and bytes per second of one, as Google states them:
# https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e.
PEAKS = {
    "TPU v4": (275e12, 1200e9),
    "TPU v5 lite": (197e12, 819e9),
    "TPU v5": (459e12, 2765e9),
    "TPU v6 lite": (918e12, 1640e9),
}
# Else libtpu asks the metadata server of a machine in Google's cloud, and waits for it.
VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# Columns of the matrix unit, and of a tile in the memory of every generation but v6e, which has 256
# columns: https://cloud.google.com/tpu/docs/performance-guide
LANES = 128
# Layers that are named on one line.
MOST_NAMED = 8


class Padded(NamedTuple):
    """A layer that fills less than half of the lanes: its path, its channels, its operations as a
    fraction of all."""

    layer: str
    channels: int
    fraction: float


def described(topology: str) -> list[Any]:
    """Returns the devices of a slice that is described, such as `v5e:2x2`; none need be there.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--tpu needs the compiler of TPUs: pip install 'cnnjax[tpu]'")
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # Of libtpu, without documented types.
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"--tpu {topology}: libtpu has no such slice ({text}): write GENERATION:SHAPE, such as "
            "v5e:2x2 or v4:2x2x1."
        ) from None


def peaks(device: Any) -> Roofline:
    """Returns what a chip can do, as it is published; a UserError for one that is not known."""
    if device.device_kind not in PEAKS:
        raise UserError(
            f"the peaks of {device.device_kind} are not known: give --device flops=...,"
            "bandwidth=... per second."
        )
    return Roofline(*PEAKS[device.device_kind], f"published, {device.device_kind}, bfloat16")


def on(tree: Any, device: Any) -> Any:
    """Returns the forms of a tree's arrays, as they lie on a device that is described."""
    place = SingleDeviceSharding(device)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
    )


def padded_layers(params: Any, costs: Sequence[LayerCost]) -> list[Padded]:
    """Returns the layers of which padding to whole tiles takes more than half, dearest first.

    Args:
      params: of a network, arrays or their forms; channels are the last dimension of a kernel.
      costs: of its layers.
    """
    whole = sum(each.products for each in costs) or 1
    products = {each.layer: each.products for each in costs}
    kernels = {
        path.removesuffix("/kernel"): leaf.shape[-1]
        for path, leaf in named_leaves(params).items()
        if path.endswith("/kernel")
    }
    found = [
        Padded(layer, channels, products.get(layer, 0) / whole)
        for layer, channels in kernels.items()
        if 2 * channels < -(-channels // LANES) * LANES
    ]
    return sorted(found, key=lambda each: -each.fraction)


def describe_padded(layers: Sequence[Padded]) -> str:
    """Returns one line: which layers leave most lanes of a TPU idle, and how much they compute."""
    if not layers:
        return f"every layer fills half or more of the {LANES} lanes"
    named = ", ".join(f"{each.layer} ({each.channels})" for each in layers[:MOST_NAMED])
    more = len(layers) - MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    fraction = sum(each.fraction for each in layers)
    return (
        f"less than half of the {LANES} are filled by the channels of {named}{rest}: "
        f"{fraction:.0%} of the multiply-accumulates"
    )
