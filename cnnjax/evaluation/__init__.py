"""Analysis of predictions: ensembles, calibration, label quality."""

from typing import TYPE_CHECKING

from cnnjax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    (
        "calibration",
        "ensemble",
        "label_quality",
    ),
)

if TYPE_CHECKING:
    from cnnjax.evaluation import calibration as calibration
    from cnnjax.evaluation import ensemble as ensemble
    from cnnjax.evaluation import label_quality as label_quality
