"""Activations and gradients of a network's layers, by the names that `models.features` has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax.errors import UserError, unknown_name
from cnnjax.explain.targets import Target
from cnnjax.models.interceptors import intercept_methods
from cnnjax.models.stages import changed_stages

Arrays = dict[str, jax.Array]


def tap(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    names: Iterable[str],
    offsets: Mapping[str, jax.Array] | None = None,
    *,
    train: bool = False,
    **options: Any,
) -> tuple[Any, Arrays]:
    """Returns a model's outputs and its named activations, of one pass.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      image: `[batch, height, width, channels]`, as the model expects it.
      names: of stages (`models.stage_names`) or paths of layers such as `stage1/block2/conv1`.
      offsets: name -> what is added to that activation before the network goes on; the gradient
        of anything with respect to an offset is its gradient with respect to the activation.
      train, **options: of `model.apply`, which is in evaluation mode where nobody says.

    Raises:
      UserError: a name that is neither a stage nor a layer that returns an array.
    """
    wanted, offsets = list(names), offsets or {}
    found: Arrays = {}
    seen: dict[str, None] = {}

    def change(name: str, x: jax.Array) -> jax.Array:
        seen[name] = None
        # A stage that is a module has been changed within, where it sows its output.
        if name not in wanted or name in found:
            return x
        found[name] = x + offsets[name] if name in offsets else x
        return found[name]

    with _changed_layers(change), changed_stages(change):
        outputs = outputs_of(model, variables, image, train=train, **options)
    for name in wanted:
        if name not in found:
            raise unknown_name("stage or layer", name, seen)
    return outputs, found


def _changed_layers(change: Callable[[str, jax.Array], jax.Array]) -> Any:
    """Within the context, `change` is called with path and output of each layer that ends."""

    def record(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        output = call(*args, **kwargs)
        path = "/".join(context.module.path)
        is_layer = context.method_name == "__call__" and path and isinstance(output, jax.Array)
        return change(path, output) if is_layer else output

    return intercept_methods(record)


def all_layers(model: nn.Module, variables: Any, image: jax.Array) -> Arrays:
    """Returns the activations of all stages and layers, in the order of computation.

    Arguments as for `tap`; where a layer is called more than once it is its first activation.
    """
    found: Arrays = {}

    def note(name: str, x: jax.Array) -> jax.Array:
        found.setdefault(name, x)
        return x

    with _changed_layers(note), changed_stages(note):
        model.apply(variables, image, train=False)
    return found


def activations_and_gradients(
    model: nn.Module, variables: Any, image: jax.Array, target: Target, names: Iterable[str]
) -> tuple[Arrays, Arrays]:
    """Returns the named activations, and the target's gradients with respect to them.

    Arguments as for `tap`; the target gives a number for each image, whose activations do not
    depend on the other images.

    Raises:
      UserError: as `tap` and the target do.
    """
    names = list(names)
    _, shapes = jax.eval_shape(lambda image: tap(model, variables, image, names), image)
    offsets = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def total(offsets: Arrays) -> tuple[jax.Array, Arrays]:
        outputs, found = tap(model, variables, image, names, offsets)
        return jnp.sum(scores(target, outputs, image)), found

    gradients, activations = jax.grad(total, has_aux=True)(offsets)
    return activations, gradients


def layer_shapes(model: nn.Module, variables: Any, image: jax.Array) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each stage's and layer's activation, in the order of computation.

    Nothing is computed; `image` may be a `jax.ShapeDtypeStruct`.
    """
    return layers_and_stages(model, variables, image)[0]


def layers_and_stages(
    model: nn.Module, variables: Any, image: Any
) -> tuple[dict[str, tuple[int, ...]], dict[str, None]]:
    """Returns the shapes of all layers and stages, and the names of the stages.

    Arguments as for `layer_shapes`; variables, too, may be `jax.ShapeDtypeStruct`s.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    stages: dict[str, None] = {}

    def note(name: str, x: jax.Array) -> jax.Array:
        shapes.setdefault(name, tuple(x.shape))
        return x

    def note_stage(name: str, x: jax.Array) -> jax.Array:
        stages[name] = None
        return note(name, x)

    with _changed_layers(note), changed_stages(note_stage):
        jax.eval_shape(lambda *args: outputs_of(model, *args), variables, image)
    return shapes, stages


def maps(model: nn.Module, variables: Any, image: jax.Array) -> list[str]:
    """Returns the stages whose output is an image of several pixels, or the last such layer.

    A stage goes before the layer that computes it: it is behind the activation.

    Raises:
      UserError: there is none; the network has no convolution.
    """
    shapes, stages = layers_and_stages(model, variables, image)
    images = [name for name, shape in shapes.items() if len(shape) == 4 and shape[1] * shape[2] > 1]
    if not images:
        raise UserError(
            f"{type(model).__name__} has no layer whose output is an image: a class activation map "
            "needs a network with convolutions. The gradient methods take any."
        )
    return [name for name in images if name in stages] or images[-1:]


def image_layers(
    model: nn.Module, variables: Any, image: Any, names: Iterable[str] = ()
) -> list[str]:
    """Returns the named layers or, without names, those of `maps`; none of a network without any.

    Nothing is computed; `image` may be a `jax.ShapeDtypeStruct`.

    Raises:
      UserError: a name that is no stage or layer, or whose output is no image.
    """
    names = list(dict.fromkeys(names))
    shapes = layer_shapes(model, variables, image)
    check_layers(shapes, names)
    if names or not any(len(shape) == 4 for shape in shapes.values()):
        return names
    try:
        return maps(model, variables, image)
    except UserError:
        return []


def check_layers(
    shapes: Mapping[str, tuple[int, ...]], names: Iterable[str], *, image: bool = True
) -> None:
    """Raises UserError for a layer that is not there, or (`image`) whose output is no image."""
    for name in names:
        if name not in shapes:
            raise unknown_name("stage or layer", name, shapes)
        if image and len(shapes[name]) != 4:
            raise UserError(
                f"the output of {name} is no image but of shape {shapes[name]}: choose a layer "
                "before the features are pooled or flattened."
            )


def score(model: nn.Module, variables: Any, image: jax.Array, target: Target) -> jax.Array:
    """Returns what a target says of each image in evaluation mode, `[batch]`: see `scores`."""
    return scores(target, outputs_of(model, variables, image), image)


def outputs_of(
    model: nn.Module, variables: Any, image: jax.Array, *, train: bool = False, **options: Any
) -> Any:
    """Returns a model's outputs, in evaluation mode where nobody says.

    Arguments as for `model.apply`.

    Raises:
      UserError: an image of a size or number of channels that the model was not made for.
    """
    try:
        return model.apply(variables, image, train=train, **options)
    except flax.errors.ScopeParamShapeError as error:
        layer = str(error).partition(' in "/')[2].partition('"')[0]
        size = " x ".join(map(str, image.shape[1:]))
        raise UserError(
            f"{type(model).__name__} does not take images of {size}: its layer "
            f"{layer or 'parameters'} is of another size. Bring them to the height, width and "
            "channels that the network was trained on."
        ) from None


def scores(target: Target, outputs: Any, image: jax.Array) -> jax.Array:
    """Returns what a target says of outputs, `[batch]`.

    Raises:
      UserError: it is of another shape.
    """
    result = target(outputs)
    if result.shape != image.shape[:1]:
        raise UserError(
            f"the target gives shape {result.shape} for {image.shape[0]} images: it must give one "
            "number for each."
        )
    return result


def check_image(image: jax.Array) -> None:
    """Raises UserError unless it is a float `[batch, height, width, channels]`."""
    if image.ndim != 4 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise UserError(
            f"an image to explain is float [batch, height, width, channels], as the model expects "
            f"it, not {image.dtype} {tuple(image.shape)}."
        )
    if 0 in image.shape:
        raise UserError(f"there is nothing to explain in images of shape {tuple(image.shape)}.")
