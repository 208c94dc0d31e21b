"""Trained networks as files for other programs: ONNX, StableHLO, LiteRT, TensorFlow.

    forward = export.forward_of(model)
    signature = export.Signature((28, 28, 1))
    export.write(Path("model.onnx"), "onnx", forward, variables, signature)
    run = export.opened(Path("model.onnx"), "onnx")
    logits = run(images)

`cnnjax export` does this for a run, with its preprocessing, and compares the answers.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "comparison",
        "formats",
        "lite",
        "onnx_model",
        "packages",
        "preprocessing",
        "program",
        "runtimes",
        "saved_model",
        "stablehlo",
        "web",
    ),
    {
        "comparison": ("Comparison", "compare", "limits_for"),
        "formats": ("Options", "write"),
        "program": ("Signature", "forward_of"),
        "runtimes": ("opened",),
    },
)

if TYPE_CHECKING:
    from cnnjax.export import comparison as comparison
    from cnnjax.export import formats as formats
    from cnnjax.export import lite as lite
    from cnnjax.export import onnx_model as onnx_model
    from cnnjax.export import packages as packages
    from cnnjax.export import preprocessing as preprocessing
    from cnnjax.export import program as program
    from cnnjax.export import runtimes as runtimes
    from cnnjax.export import saved_model as saved_model
    from cnnjax.export import stablehlo as stablehlo
    from cnnjax.export import web as web
    from cnnjax.export.comparison import Comparison as Comparison
    from cnnjax.export.comparison import compare as compare
    from cnnjax.export.comparison import limits_for as limits_for
    from cnnjax.export.formats import Options as Options
    from cnnjax.export.formats import write as write
    from cnnjax.export.program import Signature as Signature
    from cnnjax.export.program import forward_of as forward_of
    from cnnjax.export.runtimes import opened as opened
