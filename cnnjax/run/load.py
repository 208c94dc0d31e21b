"""Load a trained or converted model from its run directory."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjax import notebook
from cnnjax.errors import UserError
from cnnjax.paths import expand
from cnnjax.run.files import read_json
from cnnjax.run.record import read_config

if TYPE_CHECKING:
    from cnnjax.finetune import Base

# The folder of BatchNorm's statistics of the tested step, where a run recomputed them.
RECALIBRATED = "recalibrated"
# What Orbax calls the file that describes the arrays of a directory.
ORBAX_METADATA = "_METADATA"
# Datasets whose images are photographs of digits, made so.
MNIST = ("mnist", "tfds:mnist")
# Classes that a notebook names of a model.
SHOWN_CLASSES = 10
Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedModel:
    """A model read back from a run, ready to be applied.

    Attributes:
      model: the Linen module; of a run fine-tuned with adapters a `cnnjax.finetune.FineTuned`, of a
        quantized one a `cnnjax.compress.Quantized`.
      variables: `params` (averaged ones where the run kept an average) and `batch_stats`.
      card: the content of `model.json`.
      step: the step of the checkpoint that was read.
    """

    model: Any
    variables: dict[str, Any]
    card: dict[str, Any]
    step: int

    def prepare(self, image: Any) -> Any:
        """Brings an image of any size to the one that the run was trained on, as its images were.

        Args:
          image: uint8 `[height, width, 1 or 3 or 4]`, as `cnnjax.data.read_image` returns it.

        Returns:
          uint8 of the shape `card["image_shape"]`.
        """
        from cnnjax.data.image_files import image_to_shape

        shape, fit = tuple(self.card["image_shape"]), self.card.get("fit", "pad")
        return image_to_shape(image, shape, fit=fit)

    def normalize(self, image: Any) -> Any:
        """Maps stored images to what the model expects."""
        from cnnjax.augment import filters, normalize
        from cnnjax.train.predict import as_float

        if "mean" not in self.card:
            return as_float(image)
        image = filters.filter_images(image, filters.make_filter(self.card.get("preprocess", "")))
        order = self.card.get("channel_order", "RGB")
        return normalize(image, self.card["mean"], self.card["std"], channel_order=order)

    def features(self, image: Any) -> Any:
        """Returns what enters the model's head, of stored images."""
        from cnnjax.models import with_fields

        model = with_fields(self.model, num_classes=None)
        return model.apply(self.variables, self.normalize(image), train=False)

    def __repr__(self) -> str:
        return f"TrainedModel({self.card['model']} at step {self.step})"

    def _repr_html_(self) -> str:
        from cnnjax.trees import count_parameters

        card = self.card
        facts: dict[str, Any] = {"parameters": count_parameters(self.variables["params"])}
        if "image_shape" in card:
            facts["takes images of"] = " x ".join(map(str, card["image_shape"]))
        if names := card.get("class_names"):
            more = ", ..." if len(names) > SHOWN_CLASSES else ""
            facts["classes"] = f"{len(names)}: {', '.join(map(str, names[:SHOWN_CLASSES]))}{more}"
        return notebook.card(f"{card['model']} at step {self.step:,}", facts)


def load_trained(
    directory: str | Path, step: int | None = None, *, base: str | Path | None = None
) -> TrainedModel:
    """Reads the model of a run.

    Of a run whose `model.json` names a `part`, such as the encoder of contrastive learning, it is
    the part that is read.

    Args:
      directory: the run directory.
      step: of the checkpoint to read; None for the one that the run's summary names, or else the
        newest good one.
      base: where the base of a fine-tuned run is now, if it is not where it was.

    Raises:
      UserError: no run, no readable checkpoint, one that does not fit the model, another base, or a
        base for a run that has none.
    """
    from cnnjax import models

    directory = Path(expand(directory))
    card = _card(directory)
    if base and "finetune" not in card:
        raise UserError(
            f"--base {base}: {directory} was not fine-tuned, and has no base; leave it out."
        )
    if "num_outputs" not in card:
        raise UserError(
            f"{directory} is a run of {card['model']}, which has no name in cnnjax.models: build "
            "the model as its experiment does, and read cnnjax.run.load.load_variables."
        )
    variables, step = load_variables(directory, step)
    if "part" in card:
        variables = {name: tree.get(card["part"], {}) for name, tree in variables.items()}
    if "distill" in card:
        from cnnjax import distill

        # What projected its layers to the teacher's has done its work.
        variables = distill.student_variables(variables)
    fields = computation(card["model"], card["arguments"], precision=card.get("precision"))
    model = models.create(card["model"], num_classes=card["num_outputs"], **fields)
    if "finetune" in card:
        from cnnjax import finetune

        found = None
        if finetune.needs_base(card):
            found = read_base(base or card["finetune"]["base"])
        model, variables = finetune.read_back(model, card, variables, found)
    if "quantize" in card:
        from cnnjax.compress.quantization.card import read_back

        return TrainedModel(read_back(model, card), variables, card, step)
    return TrainedModel(model, variables, card, step)


def task_of(directory: str | Path) -> str:
    """Returns the task that a run was trained for, such as `segmentation`."""
    # Earlier versions knew no other task, and did not name it.
    return _card(Path(expand(directory))).get("task", "classification")


def base_if_tuned(directory: str | Path, base: str) -> str | None:
    """Returns where the base of a run is, for one of several runs that share the setting: None for
    a run that was not fine-tuned, and where the setting is ""."""
    return base if base and "finetune" in _card(Path(expand(directory))) else None


def _card(directory: Path) -> dict[str, Any]:
    read_config(directory)
    return read_json(directory / "model.json", f"{directory} has not trained a model yet")


def load_classifier(
    directory: str | Path, step: int | None = None, *, base: str | Path | None = None
) -> TrainedModel:
    """Reads the model of a run as `load_trained` does; a UserError unless it is a classifier."""
    if (task := task_of(directory)) != "classification":
        raise UserError(
            f"{directory} is a run of the task {task or 'of its experiment'}, and this is for "
            "classifiers: cnnjax evaluate reports on any task."
        )
    trained = load_trained(directory, step, base=base)
    if not {"image_shape", "class_names"} <= trained.card.keys():
        raise UserError(
            f"the model.json of {directory} does not say how its images were prepared, as of "
            "cnnjax.run.train with a `normalize` of one's own: read it by "
            "cnnjax.run.load.load_trained."
        )
    return trained


def preparation(trained: TrainedModel, kind: str = "auto") -> tuple[Callable, str]:
    """Returns what makes a network's input of an image file's pixels, and says what it does.

    Args:
      trained: the model, whose metadata say what it was trained on.
      kind: `image`, `digit` or `auto`.
    """
    from cnnjax import data

    height, width, channels = trained.card["image_shape"]
    if kind == "auto":
        kind = "digit" if trained.card.get("dataset") in MNIST else "image"
    if kind == "image":
        fit, color = trained.card.get("fit", "pad"), "gray" if channels == 1 else "color"
        how = f"as the training images were: {color}, {fit} to {height}x{width}"
        return trained.prepare, how
    how = "as MNIST was made: ink found, cropped, scaled and centered; --prepare image does not"
    return lambda image: trained.prepare(data.digit_from_image(image)), how


def load_variables(directory: str | Path, step: int | None = None) -> tuple[dict[str, Any], int]:
    """Returns the `params` and `batch_stats` that a run trained, and the step they are of.

    Arguments and errors as for `load_trained`; of a fine-tuned run only what was trained.
    """
    from cnnjax import checkpoint
    from cnnjax.devices import backend

    # Without a device every checkpoint would be taken for a damaged one.
    backend.check_platform()
    directory = Path(expand(directory))
    if step is None and (directory / "summary.json").exists():
        step = read_json(directory / "summary.json", f"{directory} is damaged")["step"]
    items = checkpoint.restore_items(
        directory / "checkpoints", ("params", "batch_stats", "ema"), step=step
    )
    params = items["ema"] or items["params"]
    if (step := items["step"]) in checkpoint.steps(directory / RECALIBRATED):
        items |= checkpoint.restore_items(directory / RECALIBRATED, ("batch_stats",), step=step)
    return {"params": params, "batch_stats": items["batch_stats"] or {}}, items["step"]


def computation(
    model: str, arguments: dict[str, Any], *, precision: str | None = None, remat: bool = False
) -> dict[str, Any]:
    """Returns a model's arguments with those that say in which precision and memory it computes.

    Args:
      model: a name of `cnnjax.models.MODELS`.
      arguments: the model's fields that were set otherwise.
      precision: a name of `cnnjax.train.precision.DTYPES`, or auto; None is float32.
      remat: whether activations within blocks are computed again in the backward pass.

    Raises:
      UserError: an unknown precision, a model without blocks, or an argument that is set already.
    """
    from cnnjax import models
    from cnnjax.train.precision import compute_dtype

    dtype = compute_dtype(precision_of(model, arguments, precision))
    added = ({} if dtype is None else {"dtype": dtype}) | ({"remat": True} if remat else {})
    if remat and "remat" not in models.model_fields(model):
        raise UserError(
            f"--remat: {model} has no blocks whose activations could be computed again; leave it "
            "out, or save memory by --accumulate."
        )
    for name in added.keys() & arguments.keys():
        flag = "--precision" if name == "dtype" else "--remat"
        raise UserError(f"{flag} and the model argument {name} contradict each other: give one.")
    return arguments | added


def precision_of(
    model: str, arguments: dict[str, Any], precision: str | None, *, platform: str = ""
) -> Any:
    """Returns in which precision a network computes: see `computation`.

    `auto` is that of the platform (by default of JAX's devices, which are started), for a network
    that has such a field which is not set otherwise.
    """
    from cnnjax import models
    from cnnjax.train.precision import AUTO, of_platform

    if precision == AUTO and ("dtype" in arguments or "dtype" not in models.model_fields(model)):
        return "float32"
    return of_platform(precision or "float32", platform)


def read_base(source: str | Path) -> "Base":
    """Reads the variables of a run or checkpoint; no device takes part, and nothing else is read.

    Args:
      source: a directory: a run (trained here, fine-tuned here, or made by `python -m
        cnnjax.convert`), the `checkpoints` of a run, one step of them, or what Orbax saved of a
        tree with `params` and perhaps `batch_stats` (or of parameters alone). Where a run kept an
        average of the parameters, that is taken. A run gives the step that its summary names, other
        directories the newest that is undamaged.

    Raises:
      UserError: there is no such directory, or no variables in it.
    """
    from cnnjax.checkpoint import directories, manifest
    from cnnjax.devices import backend
    from cnnjax.finetune import Base, variables_checksum

    directory = Path(expand(source))
    if not directory.is_dir():
        raise UserError(
            f"there is no directory {directory} to fine-tune from: name a run or a checkpoint "
            "directory; a file of weights is first made into a run by cnnjax convert."
        )
    backend.check_platform()
    card: dict[str, Any] = {}
    if (directory / "model.json").exists():
        trained = load_trained(directory)
        if not _is_plain(trained.variables):
            raise UserError(
                f"{directory} is a model with adapters: fine-tune from the base of its own, "
                f"{trained.card['finetune']['base']}."
            )
        if "quantize" in trained.card:
            raise UserError(
                f"{directory} is a quantized model, whose codes cannot be trained: start from what "
                f"it was made from, {trained.card['quantize']['source']}."
            )
        variables, card = trained.variables, trained.card
    elif directories.listed(directory):
        variables = _saved_variables(directory, None)
    elif (directory / manifest.NAME).exists():
        variables = _saved_variables(directory.parent, int(directory.name.partition(".")[0]))
    elif (directory / ORBAX_METADATA).exists():
        variables = _orbax_variables(directory)
    else:
        raise UserError(
            f"{directory} is no run (it has no model.json), no directory of checkpoints, and no "
            f"Orbax checkpoint (it has no {ORBAX_METADATA})."
        )
    return Base(str(directory), variables, card, variables_checksum(variables))


def _is_plain(variables: Variables) -> bool:
    return "frozen" not in variables


def _saved_variables(directory: Path, step: int | None) -> Variables:
    """Reads one of our checkpoints: the average where there is one, else the parameters."""
    from cnnjax import checkpoint

    names = checkpoint.item_names(directory, step=step)
    if "params" not in names:
        raise UserError(f"the checkpoints in {directory} hold no params, but {', '.join(names)}.")
    wanted = [name for name in ("params", "batch_stats", "ema") if name in names]
    items = checkpoint.restore_items(directory, wanted, step=step)
    return {
        "params": items.get("ema") or items["params"],
        "batch_stats": items.get("batch_stats") or {},
    }


def _orbax_variables(directory: Path) -> Variables:
    """Reads `params` and `batch_stats` of a tree that Orbax saved, on whatever devices."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    try:
        with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader:
            tree = reader.metadata(directory.absolute()).item_metadata.tree
            wanted = {name: tree[name] for name in ("params", "batch_stats") if name in tree}
            wanted = wanted if "params" in wanted else tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            arguments = ocp.args.PyTreeRestore(
                item=wanted, restore_args=as_numpy, partial_restore=True
            )
            found = reader.restore(directory.absolute(), args=arguments)
    except Exception as error:  # Of many types, none of them documented.
        text = str(error).partition("\n")[0]
        raise UserError(
            f"Orbax cannot read {directory} ({type(error).__name__}: {text}): name a directory "
            "that holds a tree with params."
        ) from None
    if "params" not in wanted:
        found = {"params": found}
    return {"params": found["params"], "batch_stats": found.get("batch_stats", {})}
