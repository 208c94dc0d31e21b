"""The methods by name, with one signature: `(key, model, variables, image, target, layer)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.explain import cam, gradients, perturbation, relevance
from cnnjax.explain.targets import Target

SUPPLIED = ("key", "model", "variables", "image", "target", "references")
REGISTRY: Mapping[str, Callable[..., Any]] = {
    "gradient": gradients.gradient,
    "gradient_times_input": gradients.gradient_times_input,
    "smooth_grad": gradients.smooth_grad,
    "integrated_gradients": gradients.integrated_gradients,
    "expected_gradients": gradients.expected_gradients,
    "guided_backpropagation": gradients.guided_backpropagation,
    "lrp": relevance.lrp,
    "grad_cam": cam.grad_cam,
    "grad_cam_plus_plus": cam.grad_cam_plus_plus,
    "layer_cam": cam.layer_cam,
    "score_cam": cam.score_cam,
    "occlusion": perturbation.occlusion,
    "rise": perturbation.rise,
}
# They change the derivative of ReLUs, and so need some.
OF_RELUS = ("guided_backpropagation",)
# They have rules for some layers, and none for others.
OF_RULES = ("lrp",)
OF_LAYERS = ("grad_cam", "grad_cam_plus_plus", "layer_cam", "score_cam")
DRAWN = ("smooth_grad", "expected_gradients", "rise")
# They compare with other images, such as those of training.
OF_REFERENCES = ("expected_gradients",)
DEFAULT = (
    *("gradient", "smooth_grad", "integrated_gradients", "guided_backpropagation"),
    *("grad_cam", "layer_cam", "occlusion"),
)


class Method(NamedTuple):
    """A method with its options.

    Attributes:
      text: how it was written, such as `occlusion(window=4)`.
      name: of `REGISTRY`.
      function: of `SUPPLIED`, as far as it takes them.
    """

    text: str
    name: str
    function: Callable[..., jax.Array]

    @property
    def options(self) -> Mapping[str, Any]:
        """The arguments that were written."""
        return getattr(self.function, "keywords", {})

    @property
    def of_layer(self) -> bool:
        """Whether it is of a layer that can be chosen, and none was written."""
        return self.name in OF_LAYERS and not self.options.get("layer")

    def __call__(
        self,
        key: jax.Array,
        model: nn.Module,
        variables: Any,
        image: jax.Array,
        target: Target,
        layer: str = "",
    ) -> jax.Array:
        """Returns the map `[batch, height, width]`."""
        first = (key,) if self.name in DRAWN else ()
        options = {"layer": layer} if self.of_layer else {}
        return self.function(*first, model, variables, image, target, **options)


def with_references(methods: Sequence[Method], references: Any) -> list[Method]:
    """Returns the methods, of which those that compare with other images have these.

    Args:
      methods: of `read`.
      references: `[number, height, width, channels]`, as the model expects them.
    """
    return [
        method._replace(function=functools.partial(method.function, references=references))
        if method.name in OF_REFERENCES
        else method
        for method in methods
    ]


def read(text: str) -> list[Method]:
    """Returns the methods that a text such as `grad_cam,occlusion(window=4)` names.

    Raises:
      UserError: an unknown method or option, or none.
    """
    items = spec.parse(text, "method")
    if not items:
        raise UserError(f"no method given: name some of {', '.join(REGISTRY)}.")
    methods = [
        Method(
            item.text or item.name,
            item.name,
            functools.partial(spec.bind(item, REGISTRY, "method", supplied=SUPPLIED)),
        )
        for item in {str(item): item for item in items}.values()
    ]
    for method in methods:
        for option, needed in (("channels", ("sum", "max")), ("resize", (True,))):
            if method.options.get(option, needed[0]) not in needed:
                raise UserError(
                    f"method {method.text!r}: a map is of the image's pixels: give {option} as "
                    f"{' or '.join(map(str, needed))}, or call the function from Python."
                )
    return methods
