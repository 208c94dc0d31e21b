"""A network with every kind of layer that fine-tuning treats apart, and its fine-tuned forms."""

import jax
import jax.numpy as jnp

from cnnjax import finetune
from cnnjax.models.layers import Layers
from cnnjax.models.simple import SimpleCNN
from tests.models.quick import quick_jit

SHAPE = (28, 28, 1)
METHODS = ["full", "head", "last:1", "bitfit", "norm", "lora:2", "adapter:2"]


def small(num_classes=10):
    """Two convolutions with BatchNorm, each a stage, and a head."""
    return SimpleCNN(num_classes, widths=(4, 6), layers=Layers(norm="batch"))


def tuned(text, model=None, **options):
    """The model as the method of that name trains it."""
    model = model or small()
    return finetune.FineTuned(model, finetune.make_method(text, model, SHAPE, **options))


def initialized(model, seed=0):
    """Variables, compiled as one program."""
    return quick_jit(lambda key: model.init(key, jnp.zeros((1, *SHAPE)), train=False))(
        jax.random.key(seed)
    )
