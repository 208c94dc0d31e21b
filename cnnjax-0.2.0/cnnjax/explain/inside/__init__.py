"""What a network sees: its fields of view, filters, features, and what its neurons respond to.

    fields = inside.receptive_fields(model, variables, (224, 224, 3))
    mask = inside.influence(model, variables, (224, 224, 3), "stage3", [(0, 0)])
    best = inside.maximal_images(model, variables, batches, ["stage2", "stage3"], count=9)
    images, values = inside.maximize(key, model, variables, (28, 28, 1), range(10))
    neurons = inside.neuron_statistics(model, variables, batches, ["stage1", "stage2"])

Pure functions of a model, its variables and images, for every network here; layers go by the names
of `models.features`. Feature maps are `explain.tap`, several layers in one pass. `cnnjax
show-network` writes all of it on one page.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        *("embedding", "filters", "influence_of_pixels", "looks", "maximal", "maximization"),
        "neurons",
        *("page", "passes", "program", "reach", "receptive", "views"),
    ),
    {
        "embedding": ("embed", "pooled_features"),
        "filters": ("Kernel", "kernels"),
        "influence_of_pixels": ("effective_field", "effective_size", "influence"),
        "maximal": ("Maximal", "crop", "maximal_images"),
        "maximization": ("maximize",),
        "neurons": ("Neurons", "neuron_statistics"),
        "receptive": ("ReceptiveField", "receptive_fields"),
    },
)

if TYPE_CHECKING:
    from cnnjax.explain.inside import embedding as embedding
    from cnnjax.explain.inside import filters as filters
    from cnnjax.explain.inside import influence_of_pixels as influence_of_pixels
    from cnnjax.explain.inside import looks as looks
    from cnnjax.explain.inside import maximal as maximal
    from cnnjax.explain.inside import maximization as maximization
    from cnnjax.explain.inside import neurons as neurons
    from cnnjax.explain.inside import page as page
    from cnnjax.explain.inside import passes as passes
    from cnnjax.explain.inside import program as program
    from cnnjax.explain.inside import reach as reach
    from cnnjax.explain.inside import receptive as receptive
    from cnnjax.explain.inside import views as views
    from cnnjax.explain.inside.embedding import embed as embed
    from cnnjax.explain.inside.embedding import pooled_features as pooled_features
    from cnnjax.explain.inside.filters import Kernel as Kernel
    from cnnjax.explain.inside.filters import kernels as kernels
    from cnnjax.explain.inside.influence_of_pixels import effective_field as effective_field
    from cnnjax.explain.inside.influence_of_pixels import effective_size as effective_size
    from cnnjax.explain.inside.influence_of_pixels import influence as influence
    from cnnjax.explain.inside.maximal import Maximal as Maximal
    from cnnjax.explain.inside.maximal import crop as crop
    from cnnjax.explain.inside.maximal import maximal_images as maximal_images
    from cnnjax.explain.inside.maximization import maximize as maximize
    from cnnjax.explain.inside.neurons import Neurons as Neurons
    from cnnjax.explain.inside.neurons import neuron_statistics as neuron_statistics
    from cnnjax.explain.inside.receptive import ReceptiveField as ReceptiveField
    from cnnjax.explain.inside.receptive import receptive_fields as receptive_fields
