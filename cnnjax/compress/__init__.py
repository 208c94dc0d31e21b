"""A trained network made smaller: norms folded, weights and activations of few bits.

    scheme = compress.read_scheme("int8(calibration=percentile)")
    result = compress.quantize(model, variables, (28, 28, 1), scheme, images=batches)
    print(compress.report_table(result.rows))

Every function takes a model with the contract of `cnnjax.models` and its variables, and returns
such. `cnnjax compress` does it to a run.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        *("calibration", "equalization", "folding", "integers", "lsq", "quantize_bits"),
        *("quantize_card", "quantize_network", "quantize_report", "quantized", "schemes", "traced"),
    ),
    {
        "calibration": ("CALIBRATIONS", "make_calibration", "observe"),
        "equalization": ("correct_biases", "equalize"),
        "folding": ("Folded", "fold_batch_norm"),
        "quantize_network": ("Quantization", "prepare", "quantize"),
        "quantize_bits": ("mixed_precision", "one_at_a_time", "simulate"),
        "quantize_card": ("dequantized", "quantization_parameters"),
        "quantize_report": ("Row", "report_table"),
        "quantized": ("FakeQuantized", "LayerPlan", "Quantized", "stored_bytes"),
        "schemes": ("SCHEMES", "Scheme", "read_scheme"),
    },
)

if TYPE_CHECKING:
    from cnnjax.compress import calibration as calibration
    from cnnjax.compress import equalization as equalization
    from cnnjax.compress import folding as folding
    from cnnjax.compress import integers as integers
    from cnnjax.compress import lsq as lsq
    from cnnjax.compress import quantize_bits as quantize_bits
    from cnnjax.compress import quantize_card as quantize_card
    from cnnjax.compress import quantize_network as quantize_network
    from cnnjax.compress import quantize_report as quantize_report
    from cnnjax.compress import quantized as quantized
    from cnnjax.compress import schemes as schemes
    from cnnjax.compress import traced as traced
    from cnnjax.compress.quantization.calibration import CALIBRATIONS as CALIBRATIONS
    from cnnjax.compress.quantization.calibration import make_calibration as make_calibration
    from cnnjax.compress.quantization.calibration import observe as observe
    from cnnjax.compress.quantization.equalization import correct_biases as correct_biases
    from cnnjax.compress.quantization.equalization import equalize as equalize
    from cnnjax.compress.quantization.folding import Folded as Folded
    from cnnjax.compress.quantization.folding import fold_batch_norm as fold_batch_norm
    from cnnjax.compress.quantization.mixed import mixed_precision as mixed_precision
    from cnnjax.compress.quantization.mixed import one_at_a_time as one_at_a_time
    from cnnjax.compress.quantization.mixed import simulate as simulate
    from cnnjax.compress.quantization.card import dequantized as dequantized
    from cnnjax.compress.quantization.card import quantization_parameters as quantization_parameters
    from cnnjax.compress.quantization.network import Quantization as Quantization
    from cnnjax.compress.quantization.network import prepare as prepare
    from cnnjax.compress.quantization.network import quantize as quantize
    from cnnjax.compress.quantization.report import Row as Row
    from cnnjax.compress.quantization.report import report_table as report_table
    from cnnjax.compress.quantization.quantized import FakeQuantized as FakeQuantized
    from cnnjax.compress.quantization.quantized import LayerPlan as LayerPlan
    from cnnjax.compress.quantization.quantized import Quantized as Quantized
    from cnnjax.compress.quantization.quantized import stored_bytes as stored_bytes
    from cnnjax.compress.quantization.schemes import SCHEMES as SCHEMES
    from cnnjax.compress.quantization.schemes import Scheme as Scheme
    from cnnjax.compress.quantization.schemes import read_scheme as read_scheme
