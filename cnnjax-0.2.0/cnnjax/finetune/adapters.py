"""Residual adapters behind the stages of a model.

    x + (leaky_relu(x @ down + bias) @ up + bias)

at each position, with few units in between: Houlsby et al. 2019, "Parameter-Efficient Transfer
Learning for NLP" (arXiv 1902.00751), section 2, as 1x1 convolutions behind the stages of a
convolutional network (Rebuffi et al. 2017, "Learning multiple visual domains with residual
adapters", arXiv 1705.08045, put theirs within the blocks). `up` starts at zero: the adapted model
is at first the model itself. Parameters are `adapters/STAGE/down/kernel [features, width]` and so
on, together with the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.errors import UserError
from cnnjax.models.stages import changed_stages
from cnnjax.rng import stream_key

PyTree = Any
NAME = "adapters"
# What comes out of a stage is mostly positive, so that behind a plain ReLU a unit whose weights are
# mostly negative would be silent for every image, and never learn.
NEGATIVE_SLOPE = 0.1


def init_adapters(features: Mapping[str, int], width: int, key: jax.Array) -> dict[str, Any]:
    """Draws an adapter for each stage.

    Args:
      features: what `cnnjax.models.features.stage_features` returned.
      width: units between the two matrices.
      key: typed key; each adapter's draw depends on its stage's name alone.

    Raises:
      UserError: `width` is not positive, or there are no stages.
    """
    if width < 1:
        raise UserError(f"adapter width {width}: use at least one unit.")
    if not features:
        raise UserError(
            "the model has no stages to put adapters behind: end them with "
            "cnnjax.models.stage_output, as the models here do."
        )
    init = nn.initializers.he_normal()
    return {
        stage: {
            "down": {
                "kernel": init(stream_key(key, f"adapter {stage}", 0), (size, width)),
                "bias": jnp.zeros(width),
            },
            "up": {"kernel": jnp.zeros((width, size)), "bias": jnp.zeros(size)},
        }
        for stage, size in features.items()
    }


def adapted(params: PyTree) -> AbstractContextManager[None]:
    """Within the context, models have these adapters behind their stages; `{}` are none."""

    def change(stage: str, x: jax.Array) -> jax.Array:
        if stage not in params:
            return x
        hidden = nn.leaky_relu(_dense(params[stage]["down"], x), NEGATIVE_SLOPE)
        return x + _dense(params[stage]["up"], hidden)

    return changed_stages(change)


def _dense(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)
