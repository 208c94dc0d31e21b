"""ShuffleNet v2: the shuffle and the two units, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.models import shufflenet
from cnnjax.models.layers import Layers
from tests.models.quick import quick_apply, quick_init

KEY = jax.random.key(0)
LAYERS = Layers().factories(train=False)


def test_channel_shuffle_deals_the_groups_in_turn():
    x = jnp.arange(6)[None]
    np.testing.assert_array_equal(shufflenet.channel_shuffle(x), [[0, 3, 1, 4, 2, 5]])
    np.testing.assert_array_equal(shufflenet.channel_shuffle(x, 3), [[0, 2, 4, 1, 3, 5]])
    np.testing.assert_array_equal(shufflenet.channel_shuffle(shufflenet.channel_shuffle(x), 3), x)


def test_unit_at_stride_1_keeps_the_first_half_of_the_channels():
    x = jax.random.normal(KEY, (2, 4, 4, 8))
    unit = shufflenet.ShuffleUnit(8, 1, LAYERS)
    variables = quick_init(unit, x)
    output = quick_apply(unit, variables, x)
    np.testing.assert_array_equal(output[..., ::2], x[..., :4])
    assert set(variables["params"]) == {"pointwise1", "depthwise", "pointwise2"}


def test_unit_at_stride_2_makes_both_halves_from_all_channels():
    x = jax.random.normal(KEY, (1, 4, 4, 6))
    unit = shufflenet.ShuffleUnit(8, 2, LAYERS)
    variables = quick_init(unit, x)
    output = quick_apply(unit, variables, x)
    assert output.shape == (1, 2, 2, 8)
    kernels = {name: part["conv"]["kernel"].shape for name, part in variables["params"].items()}
    assert kernels == {
        "shortcut_depthwise": (3, 3, 1, 6),
        "shortcut_pointwise": (1, 1, 6, 4),
        "pointwise1": (1, 1, 6, 4),
        "depthwise": (3, 3, 1, 4),
        "pointwise2": (1, 1, 4, 4),
    }
