"""Smaller networks: pruned, sparse on disk, of low rank, of few bits.

    coupled = compress.trace(model, (28, 28, 1))
    scores = compress.norm_scores(coupled, variables, 2)
    budget = compress.Budget(model, (28, 28, 1), coupled)
    removed = compress.choose(coupled, budget, scores, macs=0.5)
    smaller = compress.remove(model, variables, (28, 28, 1), coupled, removed)
    smaller.model.apply(smaller.variables, image, train=False)

`couplings` reads from the traced program which channels belong together; `channels` and `blocks`
take them out, `low_rank` factors layers, `masks` and `gradual` prune single weights, at once or
while training; `quantization` folds norms and gives weights and activations few bits. What comes
out is a model and its variables, as any other. `cnnjax compress` does all this to a run, and leaves
a run.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        *("blocks", "channels", "couplings", "gradual", "labels", "low_rank", "masks", "named"),
        *("program", "quantization", "sensitivity", "speed"),
    ),
    {
        "channels": (
            "Budget",
            "choose",
            "norm_scores",
            "random_scores",
            "remove",
            "scale_scores",
            "taylor_scores",
        ),
        "couplings": ("Couplings", "masked", "trace"),
        "gradual": ("Pruning", "at_once", "masked_step", "prune_while_training"),
        "low_rank": ("decompose",),
        "quantization.card": ("dequantized", "quantization_parameters"),
        "quantization.equalization": ("correct_biases", "equalize"),
        "quantization.folding": ("Folded", "fold_batch_norm"),
        "quantization.mixed": ("mixed_precision", "one_at_a_time", "simulate"),
        "quantization.network": ("Quantization", "prepare", "quantize"),
        "quantization.quantized": ("FakeQuantized", "LayerPlan", "Quantized", "stored_bytes"),
        "quantization.report": ("Row", "report_table"),
        "quantization.schemes": ("SCHEMES", "Scheme", "read_scheme"),
    },
)

if TYPE_CHECKING:
    from cnnjax.compress import blocks as blocks
    from cnnjax.compress import channels as channels
    from cnnjax.compress import couplings as couplings
    from cnnjax.compress import gradual as gradual
    from cnnjax.compress import labels as labels
    from cnnjax.compress import low_rank as low_rank
    from cnnjax.compress import masks as masks
    from cnnjax.compress import named as named
    from cnnjax.compress import program as program
    from cnnjax.compress import quantization as quantization
    from cnnjax.compress import sensitivity as sensitivity
    from cnnjax.compress import speed as speed
    from cnnjax.compress.channels import Budget as Budget
    from cnnjax.compress.channels import choose as choose
    from cnnjax.compress.channels import norm_scores as norm_scores
    from cnnjax.compress.channels import random_scores as random_scores
    from cnnjax.compress.channels import remove as remove
    from cnnjax.compress.channels import scale_scores as scale_scores
    from cnnjax.compress.channels import taylor_scores as taylor_scores
    from cnnjax.compress.couplings import Couplings as Couplings
    from cnnjax.compress.couplings import masked as masked
    from cnnjax.compress.couplings import trace as trace
    from cnnjax.compress.gradual import Pruning as Pruning
    from cnnjax.compress.gradual import at_once as at_once
    from cnnjax.compress.gradual import masked_step as masked_step
    from cnnjax.compress.gradual import prune_while_training as prune_while_training
    from cnnjax.compress.low_rank import decompose as decompose
    from cnnjax.compress.quantization.card import dequantized as dequantized
    from cnnjax.compress.quantization.card import quantization_parameters as quantization_parameters
    from cnnjax.compress.quantization.equalization import correct_biases as correct_biases
    from cnnjax.compress.quantization.equalization import equalize as equalize
    from cnnjax.compress.quantization.folding import Folded as Folded
    from cnnjax.compress.quantization.folding import fold_batch_norm as fold_batch_norm
    from cnnjax.compress.quantization.mixed import mixed_precision as mixed_precision
    from cnnjax.compress.quantization.mixed import one_at_a_time as one_at_a_time
    from cnnjax.compress.quantization.mixed import simulate as simulate
    from cnnjax.compress.quantization.network import Quantization as Quantization
    from cnnjax.compress.quantization.network import prepare as prepare
    from cnnjax.compress.quantization.network import quantize as quantize
    from cnnjax.compress.quantization.quantized import FakeQuantized as FakeQuantized
    from cnnjax.compress.quantization.quantized import LayerPlan as LayerPlan
    from cnnjax.compress.quantization.quantized import Quantized as Quantized
    from cnnjax.compress.quantization.quantized import stored_bytes as stored_bytes
    from cnnjax.compress.quantization.report import Row as Row
    from cnnjax.compress.quantization.report import report_table as report_table
    from cnnjax.compress.quantization.schemes import SCHEMES as SCHEMES
    from cnnjax.compress.quantization.schemes import Scheme as Scheme
    from cnnjax.compress.quantization.schemes import read_scheme as read_scheme
