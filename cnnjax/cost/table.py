"""Costs by layer as a text table."""

from __future__ import annotations

from collections.abc import Sequence

from cnnjax import aligned
from cnnjax.cost.operations import LayerCost, total
from cnnjax.cost.roofline import Roofline


def table(costs: Sequence[LayerCost], roofline: Roofline) -> str:
    """Returns a row for each layer, and one of all: operations, bytes, intensity, least time."""
    header = ("layer", "MFLOP", "MB", "FLOP/byte", "bound by", "least us", "time")
    whole = sum(roofline.seconds(each) for each in costs)
    rows = [header] + [
        (
            each.layer or "(the network itself)",
            f"{each.operations / 1e6:,.3f}",
            f"{each.bytes / 1e6:,.3f}",
            f"{each.intensity:,.2f}",
            roofline.bound(each),
            f"{1e6 * roofline.seconds(each):,.1f}",
            f"{roofline.seconds(each) / whole:.1%}" if whole else "",
        )
        for each in costs
    ]
    operations, moved = total(costs)
    rows.append(
        (
            "all",
            f"{operations / 1e6:,.3f}",
            f"{moved / 1e6:,.3f}",
            f"{operations / moved:,.2f}" if moved else "",
            "",
            f"{1e6 * whole:,.1f}",
            "100.0%",
        )
    )
    head, rule, *layers, whole_network = aligned.lines(rows, "lr", ruled=True)
    return "\n".join([head, rule, *layers, rule, whole_network])
