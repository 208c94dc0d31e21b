"""What a network costs: operations, bytes and memory by layer, and the time that a device takes.

`operations` counts in the traced program, `compiled` asks the compiler, `roofline` bounds the time
by what the device can do, `profile` reads where a training step spent it, `budget` holds limits.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    ("budget", "compiled", "operations", "profile", "roofline", "scopes", "table", "tpu"),
    {"operations": ("layer_costs",), "roofline": ("measure",)},
)

if TYPE_CHECKING:
    from cnnjax.cost import budget as budget
    from cnnjax.cost import compiled as compiled
    from cnnjax.cost import operations as operations
    from cnnjax.cost import profile as profile
    from cnnjax.cost import roofline as roofline
    from cnnjax.cost import scopes as scopes
    from cnnjax.cost import table as table
    from cnnjax.cost import tpu as tpu
    from cnnjax.cost.operations import layer_costs as layer_costs
    from cnnjax.cost.roofline import measure as measure
