"""A student with its teacher, with the contract of any other model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.devices import backend
from cnnjax.distill import layers
from cnnjax.distill.named import LOGITS, Term
from cnnjax.errors import UserError
from cnnjax.models.fields import fields, with_fields
from cnnjax.models.summary import abstract_variables
from cnnjax.rng import stream_key

Variables = dict[str, Any]
PROJECTIONS = "projections"
TEACHER = "teacher"
MOST_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network without its variables, which travel in the training state.

    Attributes:
      model: a Linen module, or a `cnnjax.finetune.FineTuned`.
      class_names: of its outputs, in their order.
      image_shape: `[height, width, channels]` of what it expects.
    """

    model: Any
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]


def teacher_of(trained: Any) -> Teacher:
    """Returns the teacher that a trained classifier is: `cnnjax.run.load.TrainedModel`."""
    height, width, channels = trained.card["image_shape"]
    model = trained.model
    if fields(model).get("remat"):
        # It has no backward pass.
        model = with_fields(model, remat=False)
    return Teacher(model, tuple(trained.card["class_names"]), (height, width, channels))


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A student and its teacher; `init` and `apply` are those of a Linen module.

    In evaluation mode it is the student. In training mode it returns what `distillation` compares:
    `{"outputs": the student's outputs, "compared": {loss: [(student's, teacher's), ...]}}`, where
    the teacher, in evaluation mode, has seen the same images.

    Its variables are those of the student under their own paths, `params/projections` where layers
    are compared as hints, and `frozen/teacher`, all variables of the teacher: arguments of the
    compiled step which nothing trains, averages or saves.

    Attributes:
      student: a Linen module with the contract of `cnnjax.models`.
      teacher: see `Teacher`.
      terms: the losses, with their layers chosen; see `make`.
    """

    student: nn.Module
    teacher: Teacher
    terms: tuple[Term, ...]

    def init(self, key: jax.Array, image: jax.Array, *, train: bool = False) -> Variables:
        """Initializes the student as without a teacher; of the teacher there is nothing yet."""
        return dict(self.student.init(key, image, train=train))

    def init_with_output(
        self, key: jax.Array, image: jax.Array, *, train: bool = False
    ) -> tuple[Any, Variables]:
        """Likewise; also returns the student's outputs."""
        outputs, variables = self.student.init_with_output(key, image, train=train)
        return outputs, dict(variables)

    def start(self, key: jax.Array, teacher: Variables) -> Variables:
        """Returns the variables with which training starts.

        Args:
          key: typed key of the student's initialization.
          teacher: the teacher's variables.
        """
        image = jnp.zeros((1, *self.teacher.image_shape), jnp.float32)
        variables = dict(
            backend.jit_once(lambda key: self.student.init(key, image, train=False))(key)
        )
        drawn = layers.init_projections(
            self.terms, *self.outlines(teacher), stream_key(key, "distill", 0)
        )
        if drawn:
            variables["params"] = {**variables["params"], PROJECTIONS: drawn}
        return {**variables, "frozen": {TEACHER: teacher}}

    def outlines(self, teacher: Variables) -> tuple[layers.Outline, layers.Outline]:
        """Returns the layers of student and teacher."""
        shape = self.teacher.image_shape
        student = layers.outline(self.student, abstract_variables(self.student, shape), shape)
        return student, layers.outline(self.teacher.model, teacher, shape)

    def apply(
        self,
        variables: Mapping[str, Any],
        image: jax.Array,
        *,
        train: bool = False,
        mutable: Any = False,
        **options: Any,
    ) -> Any:
        """As `flax.linen.Module.apply`."""
        own = student_variables(variables)
        if not train:
            return self.student.apply(own, image, train=False, mutable=mutable, **options)
        names = {a: b for term in self.terms for a, b in term.pairs}
        result, found = layers.tapped(
            self.student, own, image, names, train=True, mutable=mutable, **options
        )
        outputs, updated = (result, None) if mutable is False else result
        teacher = jax.lax.stop_gradient(
            layers.tapped(
                self.teacher.model,
                variables["frozen"][TEACHER],
                jax.lax.stop_gradient(image),
                {b for term in self.terms for _, b in term.pairs},
            )
        )
        projections = variables["params"].get(PROJECTIONS, {})
        compared = {
            term.name: _compared(term, outputs, found, teacher, projections) for term in self.terms
        }
        returned = {"outputs": outputs, "compared": compared}
        return returned if mutable is False else (returned, updated)


def make(
    student: nn.Module, teacher: Teacher, teacher_variables: Variables, terms: tuple[Term, ...]
) -> Distilled:
    """Returns a student with its teacher, of whose losses the layers are chosen and checked.

    Args:
      student: a Linen module with the contract of `cnnjax.models`.
      teacher: the teacher.
      teacher_variables: its variables, or their `jax.ShapeDtypeStruct`s.
      terms: what `named.read` returned.

    Raises:
      UserError: outputs that are not as many, a layer that is not there, two that cannot be
        compared, or a student that would compute its layers again in the backward pass.
    """
    distilled = Distilled(student, teacher, terms)
    outlines = distilled.outlines(teacher_variables)
    if any(term.name == LOGITS for term in terms):
        _check_outputs(distilled, teacher_variables)
    chosen = tuple(layers.chosen(term, *outlines) for term in terms)
    inner = [name for term in chosen for name, _ in term.pairs if name != layers.BEFORE_HEAD]
    if inner and fields(student).get("remat"):
        raise UserError(
            f"--remat computes the blocks of {outlines[0].name} again in the backward pass, and "
            f"{inner[0]} is compared with the teacher's: leave one of both out."
        )
    clashing = PROJECTIONS in abstract_variables(student, teacher.image_shape)["params"]
    if clashing and any(term.of == "hints" for term in chosen):
        raise UserError(
            f"{outlines[0].name} has a layer named {PROJECTIONS}, as the projections of hints are: "
            "rename it."
        )
    return dataclasses.replace(distilled, terms=chosen)


def check_data(
    teacher: Teacher,
    terms: tuple[Term, ...],
    image_shape: tuple[int, ...],
    class_names: Sequence[str],
) -> None:
    """Raises a UserError unless the teacher can teach with these images and classes."""
    if tuple(image_shape) != teacher.image_shape:
        raise UserError(
            f"the images are {'x'.join(map(str, image_shape))}, and the teacher's are "
            f"{'x'.join(map(str, teacher.image_shape))}: take the teacher's --image-size, or a "
            "teacher of such images."
        )
    if tuple(class_names) != teacher.class_names and any(term.name == LOGITS for term in terms):
        raise UserError(
            f"the classes are {_some(class_names)}, and the teacher's are "
            f"{_some(teacher.class_names)}: the loss logits needs the same in the same order; take "
            "the teacher's --classes, or --losses of its layers."
        )


def normalization(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `model.json` says of a student's pixels, which are normalized as the teacher's.

    Args:
      card: the teacher's `model.json`.
    """
    channels = card["image_shape"][-1]
    plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    names = ("mean", "std", "channel_order")
    return plain | {name: card[name] for name in names if name in card}


def student_variables(variables: Mapping[str, Any]) -> Variables:
    """Returns the variables of the student alone, with which it computes the same."""
    params = {name: tree for name, tree in variables["params"].items() if name != PROJECTIONS}
    others = {name: tree for name, tree in variables.items() if name not in ("params", "frozen")}
    return {"params": params, **others}


def _compared(
    term: Term, outputs: Any, student: Any, teacher: tuple[Any, Any], projections: Any
) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the pairs of arrays that a term compares."""
    if term.of == "outputs":
        return [(outputs, teacher[0])]
    pairs = []
    for pair in term.pairs:
        found = student[pair[0]], teacher[1][pair[1]]
        if term.of == "hints":
            found = layers.projected(projections[layers.projection_name(pair)], *found)
        pairs.append(found)
    return pairs


def _check_outputs(distilled: Distilled, teacher_variables: Variables) -> None:
    image = jax.ShapeDtypeStruct((1, *distilled.teacher.image_shape), jnp.float32)

    def outputs(model: Any, variables: Variables) -> Any:
        return jax.eval_shape(lambda *args: model.apply(*args, train=False), variables, image)

    own = abstract_variables(distilled.student, distilled.teacher.image_shape)
    found = outputs(distilled.student, own), outputs(distilled.teacher.model, teacher_variables)
    shapes = [getattr(each, "shape", None) for each in found]
    if None in shapes or shapes[0] != shapes[1]:
        raise UserError(
            f"the student's outputs are {_shape(shapes[0])}, the teacher's {_shape(shapes[1])}: "
            "the loss logits needs one shape, leave it out or take another teacher."
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return f"{len(names)} ({shown}{', ...' if len(names) > MOST_NAMED else ''})"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not one array" if shape is None else f"[{', '.join(map(str, shape[1:]))}]"
