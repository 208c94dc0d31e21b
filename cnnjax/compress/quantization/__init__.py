"""Weights and activations of few bits, after training and while training.

    scheme = compress.read_scheme("int8(calibration=percentile)")
    result = compress.quantize(model, variables, (28, 28, 1), scheme, images=batches)
    print(compress.report_table(result.rows))

`network` does it: norms are folded (`folding`), ranges equalized and biases corrected
(`equalization`), activations calibrated (`calibration`), weights rounded (`integers`). `quantized`
computes with the integers, `lsq` trains through the rounding, `mixed` chooses bits for each layer,
`report` tells what each layer costs, `card` what a run and another runtime need to know. How it is
all to be done is one value of `schemes`.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        *("calibration", "card", "equalization", "folding", "integers", "lsq", "mixed", "network"),
        *("quantized", "report", "schemes", "simulated", "traced"),
    ),
)

if TYPE_CHECKING:
    from cnnjax.compress.quantization import calibration as calibration
    from cnnjax.compress.quantization import card as card
    from cnnjax.compress.quantization import equalization as equalization
    from cnnjax.compress.quantization import folding as folding
    from cnnjax.compress.quantization import integers as integers
    from cnnjax.compress.quantization import lsq as lsq
    from cnnjax.compress.quantization import mixed as mixed
    from cnnjax.compress.quantization import network as network
    from cnnjax.compress.quantization import quantized as quantized
    from cnnjax.compress.quantization import report as report
    from cnnjax.compress.quantization import schemes as schemes
    from cnnjax.compress.quantization import simulated as simulated
    from cnnjax.compress.quantization import traced as traced
