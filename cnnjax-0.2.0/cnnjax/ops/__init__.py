"""Convolution and pooling, fast on every platform, with Flax's parameters.

`conv2d`, `max_pool` and `avg_pool` each have one mathematical meaning; how they are compiled is
chosen by platform and shape (see `cnnjax.ops.choice`) and can be set by argument or context:

    with ops.lowering("lax"):
        logits = model.apply(variables, image)

Models use the layers `Conv`, `ConvPool`, `ConvTranspose` and, where it computes much, `Dense`;
their parameters are those of Flax's layers.
"""

from cnnjax.ops.choice import LOWERINGS, lowering, outside_loops
from cnnjax.ops.convolution import conv2d, conv_general_dilated
from cnnjax.ops.fused import conv2d_activation_max_pool
from cnnjax.ops.layers import Conv, ConvPool, Dense
from cnnjax.ops.once import computed_once, computed_once_both_ways
from cnnjax.ops.pooling import avg_pool, max_pool
from cnnjax.ops.transposed import ConvTranspose, conv_transpose2d

__all__ = [
    "LOWERINGS",
    "Conv",
    "ConvPool",
    "ConvTranspose",
    "Dense",
    "avg_pool",
    "computed_once",
    "computed_once_both_ways",
    "conv2d",
    "conv2d_activation_max_pool",
    "conv_general_dilated",
    "conv_transpose2d",
    "lowering",
    "max_pool",
    "outside_loops",
]
