"""Why a network answers as it does, and whether the pictures that say so can be believed.

    target = explain.class_score(label)
    map = explain.grad_cam(model, variables, image, target)
    maps = jax.vmap(lambda c: explain.grad_cam(model, variables, image, explain.class_score(c)))(
        jnp.arange(10)
    )

Every method is a pure function `(model, variables, image, target) -> map [batch, height, width]`,
fit for `jit`, `vmap` and meshes; those that draw at random take a key first. A target is a function
of the model's outputs to a number for each image: see `targets`. Maps are signed where the method
is. `checks` asks of a map whether it depends on the network at all, and whether the pixels that it
names are those that count.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        *("belief", "cam", "checks", "concepts", "gradients", "inside", "layers_of_program"),
        *("markup", "named", "page", "perturbation", "rectifiers", "relevance", "taps", "targets"),
        "worst",
    ),
    {
        "cam": ("grad_cam", "grad_cam_plus_plus", "layer_cam", "score_cam"),
        "checks": (
            "completeness",
            "deletion_curve",
            "infidelity",
            "insertion_curve",
            "pointing_game",
            "rank_correlation",
            "reinitialized_from_the_top",
            "sensitivity_n",
        ),
        "gradients": (
            "expected_gradients",
            "gradient",
            "gradient_times_input",
            "guided_backpropagation",
            "integrated_gradients",
            "smooth_grad",
        ),
        "perturbation": ("occlusion", "rise"),
        "relevance": ("lrp",),
        "taps": ("activations_and_gradients", "layer_shapes", "tap"),
        "targets": (
            "Target",
            "class_difference",
            "class_probability",
            "class_score",
            "pixel_score",
            "predicted_class",
        ),
    },
)

if TYPE_CHECKING:
    from cnnjax.explain import belief as belief
    from cnnjax.explain import cam as cam
    from cnnjax.explain import checks as checks
    from cnnjax.explain import concepts as concepts
    from cnnjax.explain import gradients as gradients
    from cnnjax.explain import inside as inside
    from cnnjax.explain import layers_of_program as layers_of_program
    from cnnjax.explain import markup as markup
    from cnnjax.explain import named as named
    from cnnjax.explain import page as page
    from cnnjax.explain import perturbation as perturbation
    from cnnjax.explain import rectifiers as rectifiers
    from cnnjax.explain import relevance as relevance
    from cnnjax.explain import taps as taps
    from cnnjax.explain import targets as targets
    from cnnjax.explain import worst as worst
    from cnnjax.explain.cam import grad_cam as grad_cam
    from cnnjax.explain.cam import grad_cam_plus_plus as grad_cam_plus_plus
    from cnnjax.explain.cam import layer_cam as layer_cam
    from cnnjax.explain.cam import score_cam as score_cam
    from cnnjax.explain.checks import completeness as completeness
    from cnnjax.explain.checks import deletion_curve as deletion_curve
    from cnnjax.explain.checks import infidelity as infidelity
    from cnnjax.explain.checks import insertion_curve as insertion_curve
    from cnnjax.explain.checks import pointing_game as pointing_game
    from cnnjax.explain.checks import rank_correlation as rank_correlation
    from cnnjax.explain.checks import reinitialized_from_the_top as reinitialized_from_the_top
    from cnnjax.explain.checks import sensitivity_n as sensitivity_n
    from cnnjax.explain.gradients import expected_gradients as expected_gradients
    from cnnjax.explain.gradients import gradient as gradient
    from cnnjax.explain.gradients import gradient_times_input as gradient_times_input
    from cnnjax.explain.gradients import guided_backpropagation as guided_backpropagation
    from cnnjax.explain.gradients import integrated_gradients as integrated_gradients
    from cnnjax.explain.gradients import smooth_grad as smooth_grad
    from cnnjax.explain.perturbation import occlusion as occlusion
    from cnnjax.explain.perturbation import rise as rise
    from cnnjax.explain.relevance import lrp as lrp
    from cnnjax.explain.taps import activations_and_gradients as activations_and_gradients
    from cnnjax.explain.taps import layer_shapes as layer_shapes
    from cnnjax.explain.taps import tap as tap
    from cnnjax.explain.targets import Target as Target
    from cnnjax.explain.targets import class_difference as class_difference
    from cnnjax.explain.targets import class_probability as class_probability
    from cnnjax.explain.targets import class_score as class_score
    from cnnjax.explain.targets import pixel_score as pixel_score
    from cnnjax.explain.targets import predicted_class as predicted_class
