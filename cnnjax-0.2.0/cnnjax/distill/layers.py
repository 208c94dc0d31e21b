"""Which layers of two networks are compared, and the projections that make their shapes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.distill.losses import of_one_size
from cnnjax.distill.named import Pairs, Term
from cnnjax.errors import UserError, unknown_name
from cnnjax.explain import taps
from cnnjax.models.interceptors import intercept_methods
from cnnjax.rng import stream_key

PyTree = Any
Shapes = dict[str, tuple[int, ...]]
# What enters the layer named `head`: the embedding of an image.
BEFORE_HEAD = "before_head"


@dataclasses.dataclass(frozen=True)
class Outline:
    """The layers of a network with the shapes of their outputs `[batch, ...]`, and its stages."""

    name: str
    shapes: Shapes
    stages: tuple[str, ...]

    @property
    def images(self) -> list[str]:
        """The stages whose output is an image of several pixels."""
        return [name for name in self.stages if _is_image(self.shapes[name])]


def outline(model: Any, variables: PyTree, image_shape: tuple[int, int, int]) -> Outline:
    """Returns the layers of a network; computes nothing.

    Args:
      model: with the contract of `cnnjax.models`.
      variables: its variables, or their `jax.ShapeDtypeStruct`s.
      image_shape: `[height, width, channels]`.
    """
    of_head: Shapes = {}
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with _head_input(lambda name, x: of_head.setdefault(name, tuple(x.shape))):
        shapes, stages = taps.layers_and_stages(model, variables, image)
    return Outline(type(model).__name__, shapes | of_head, tuple(stages))


def tapped(
    model: Any, variables: PyTree, image: jax.Array, names: Iterable[str], **options: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """Returns what `model.apply` does, and the named outputs: those of `taps.tap`, `before_head`.

    Args:
      options: of `model.apply`, such as `train` and `mutable`.
    """
    found: dict[str, jax.Array] = {}
    wanted = list(names)
    with _head_input(found.__setitem__):
        result, layers = taps.tap(
            model, variables, image, [name for name in wanted if name != BEFORE_HEAD], **options
        )
    return result, {name: found[name] if name == BEFORE_HEAD else layers[name] for name in wanted}


def _head_input(note: Callable[[str, jax.Array], Any]) -> Any:
    """Within the context, `note` is called with `before_head` and what the head is given."""

    def record(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name == "__call__" and context.module.path == ("head",) and args:
            note(BEFORE_HEAD, args[0])
        return call(*args, **kwargs)

    return intercept_methods(record)


def chosen(term: Term, student: Outline, teacher: Outline) -> Term:
    """Returns the term with the layers that it compares: those that it names, or by default

    - of `attention`: the last stages of each size of image that both networks have, or their last;
    - of `features`: the middle one of these, or where a network has no images what enters its head;
    - of relations: what enters the head.

    Raises:
      UserError: a layer that a network does not have, or two that cannot be compared.
    """
    if term.of == "outputs":
        return term
    pairs = term.pairs or _default_pairs(term, student, teacher)
    for pair in pairs:
        for who, network, name in (("student", student, pair[0]), ("teacher", teacher, pair[1])):
            if name not in network.shapes:
                raise unknown_name(f"layer of the {who} {network.name}", name, network.shapes)
        _check_comparable(term, pair, student.shapes[pair[0]], teacher.shapes[pair[1]])
    return dataclasses.replace(term, pairs=tuple(pairs))


def _default_pairs(term: Term, *networks: Outline) -> Pairs:
    student, teacher = networks
    if term.of == "embeddings":
        return ((BEFORE_HEAD, BEFORE_HEAD),)
    if not (student.images and teacher.images):
        if term.of == "hints":
            return ((BEFORE_HEAD, BEFORE_HEAD),)
        without = teacher if student.images else student
        raise UserError(
            f"{term.name} compares images of several pixels, and no stage of {without.name} is "
            "one: leave it out, or name layers that are."
        )
    # The last stage of each size.
    own, others = ({each.shapes[name][1:3]: name for name in each.images} for each in networks)
    pairs = [(name, others[size]) for size, name in own.items() if size in others]
    pairs = pairs or [(student.images[-1], teacher.images[-1])]
    return tuple(pairs) if term.of == "images" else (pairs[len(pairs) // 2],)


def _check_comparable(
    term: Term, pair: tuple[str, str], student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    given = (
        f"{term.name} was given the layers {pair[0]} {_text(student)} of the student and {pair[1]} "
        f"{_text(teacher)} of the teacher"
    )
    if term.of == "images" and not (_is_image(student) and _is_image(teacher)):
        raise UserError(f"{given}: it compares images of several pixels, name layers that are.")
    if term.of == "hints":
        if len(student) != len(teacher):
            raise UserError(
                f"{given}: an image cannot be compared with a vector, name two layers of one kind."
            )
        if len(student) == 3 and student[1] != teacher[1]:
            raise UserError(f"{given}: they have not as many tokens, name two that have.")


def init_projections(
    terms: Iterable[Term], student: Outline, teacher: Outline, key: jax.Array
) -> dict[str, Any]:
    """Draws a projection for each pair of hint layers: the student's channels to the teacher's.

    A 1x1 convolution or dense layer; FitNets take larger kernels where the student's image is the
    larger one, which here is averaged to the teacher's size.
    """
    init = nn.initializers.lecun_normal()
    return {
        projection_name(pair): {
            "kernel": init(
                stream_key(key, f"projection {pair}", 0),
                (student.shapes[pair[0]][-1], teacher.shapes[pair[1]][-1]),
            ),
            "bias": jnp.zeros(teacher.shapes[pair[1]][-1]),
        }
        for term in terms
        if term.of == "hints"
        for pair in term.pairs
    }


def projected(
    params: PyTree, student: jax.Array, teacher: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the two outputs in one shape, the student's projected to the teacher's channels."""
    student, teacher = of_one_size(student, teacher)
    kernel, bias = (params[name].astype(student.dtype) for name in ("kernel", "bias"))
    return student @ kernel + bias, teacher


def projection_name(pair: tuple[str, str]) -> str:
    """Returns the name of a pair's projection among the parameters."""
    return "-".join(name.replace("/", ".") for name in pair)


def described(terms: Iterable[Term], student: Outline, teacher: Outline) -> str:
    """Returns a line a loss: its weight, and the layers that it compares with their shapes."""
    lines = []
    for term in terms:
        compared = [
            f"{a} {_text(student.shapes[a])} : {b} {_text(teacher.shapes[b])}"
            for a, b in term.pairs
        ]
        lines.append(f"{term.name:<13}weight {term.weight:g}  {', '.join(compared)}".rstrip())
    return "\n".join(lines)


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[1] * shape[2] > 1


def _text(shape: tuple[int, ...]) -> str:
    return f"[{'x'.join(map(str, shape[1:]))}]"
