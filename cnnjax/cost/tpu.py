"""TPUs without one: programs compiled ahead of time for a described slice, and lowered for export.

libtpu carries the compiler for every generation; it needs no TPU to compile for one.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from cnnjax.cost.roofline import Roofline
from cnnjax.errors import UserError

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
