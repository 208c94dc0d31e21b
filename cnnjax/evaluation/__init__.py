"""Analysis of predictions and features: ensembles, calibration, label quality, linear probes."""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "calibration",
        "comparison",
        "corruption_error",
        "ensemble",
        "extrapolation",
        "imagenet",
        "label_quality",
        "probe",
    ),
)

if TYPE_CHECKING:
    from cnnjax.evaluation import calibration as calibration
    from cnnjax.evaluation import comparison as comparison
    from cnnjax.evaluation import corruption_error as corruption_error
    from cnnjax.evaluation import ensemble as ensemble
    from cnnjax.evaluation import extrapolation as extrapolation
    from cnnjax.evaluation import imagenet as imagenet
    from cnnjax.evaluation import label_quality as label_quality
    from cnnjax.evaluation import probe as probe
