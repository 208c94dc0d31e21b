"""One function, one figure: each draws a PNG at `path` and returns the path.

`attempt(draw, path)` draws one that may fail without harm.
"""

from cnnjax.plots.canvas import attempt
from cnnjax.plots.comparison import accuracy_by_labels, best_so_far, corruption_errors
from cnnjax.plots.curves import interval_chart, learning_curves
from cnnjax.plots.embedding import embedding, point_maps
from cnnjax.plots.fields import effective_fields
from cnnjax.plots.images import (
    filters,
    image_grid,
    image_sheet,
    prediction,
    worst_classified,
    worst_explained,
    worst_indices,
)
from cnnjax.plots.overlays import class_maps
from cnnjax.plots.scores import confusion_matrix, reliability_diagram, roc_curves
from cnnjax.plots.sensitivity import sensitivity

__all__ = [
    "accuracy_by_labels",
    "attempt",
    "best_so_far",
    "class_maps",
    "confusion_matrix",
    "corruption_errors",
    "effective_fields",
    "embedding",
    "filters",
    "image_grid",
    "image_sheet",
    "interval_chart",
    "learning_curves",
    "point_maps",
    "prediction",
    "reliability_diagram",
    "roc_curves",
    "sensitivity",
    "worst_classified",
    "worst_explained",
    "worst_indices",
]
