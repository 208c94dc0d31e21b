"""A trained model: how a run's, or a converted one, is read back."""

import dataclasses
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError
from cnnjax.run_directory import read_json
from cnnjax.runs import read_config

# The folder of BatchNorm's statistics of the tested step, where a run measured them anew.
RECALIBRATED = "recalibrated"


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model read back from a run, ready to be applied.

    Attributes:
      model: the Linen module; of a run fine-tuned with adapters a `cnnjax.finetune.FineTuned`.
      variables: `params` (averaged ones where the run kept an average) and `batch_stats`.
      card: the content of `model.json`.
      step: the step of the checkpoint that was read.
    """

    model: Any
    variables: dict[str, Any]
    card: dict[str, Any]
    step: int

    def normalise(self, image: Any) -> Any:
        """Maps stored images to what the model expects."""
        from cnnjax.data import filters, normalise

        image = filters.filter_images(image, filters.make_filter(self.card.get("preprocess", "")))
        order = self.card.get("channel_order", "RGB")
        return normalise(image, self.card["mean"], self.card["std"], channel_order=order)


def load_trained(
    directory: str | Path, step: int | None = None, *, base: str | Path | None = None
) -> TrainedModel:
    """Reads the model of a run.

    Args:
      directory: the run directory.
      step: of the checkpoint to read; None for the one that the run's summary names, or else the
        newest good one.
      base: where the base of a fine-tuned run is now, if it is not where it was.

    Raises:
      UserError: no run, no readable checkpoint, one that does not fit the model, or another base.
    """
    from cnnjax import checkpoint, models

    directory = Path(directory)
    read_config(directory)
    card = read_json(directory / "model.json", f"{directory} has not trained a model yet")
    if step is None and (directory / "summary.json").exists():
        step = read_json(directory / "summary.json", f"{directory} is damaged")["step"]
    items = checkpoint.restore_items(
        directory / "checkpoints", ("params", "batch_stats", "ema"), step=step
    )
    fields = computation(card["model"], card["arguments"], precision=card.get("precision"))
    model = models.create(card["model"], num_classes=card["num_outputs"], **fields)
    params = items["ema"] or items["params"]
    if (step := items["step"]) in checkpoint.steps(directory / RECALIBRATED):
        items |= checkpoint.restore_items(directory / RECALIBRATED, ("batch_stats",), step=step)
    variables = {"params": params, "batch_stats": items["batch_stats"] or {}}
    if "finetune" in card:
        from cnnjax import finetune

        model, variables = finetune.read_back(model, card, variables, base=base)
    return TrainedModel(model, variables, card, items["step"])


def computation(
    model: str, arguments: dict[str, Any], *, precision: str | None = None, remat: bool = False
) -> dict[str, Any]:
    """Returns a model's arguments with those that say in which precision and memory it computes.

    Args:
      model: a name of `cnnjax.models.MODELS`.
      arguments: the model's fields that were set otherwise.
      precision: a name of `cnnjax.precision.DTYPES`; None is float32.
      remat: whether activations within blocks are computed again in the backward pass.

    Raises:
      UserError: an unknown precision, a model without blocks, or an argument that is set already.
    """
    from cnnjax import models
    from cnnjax.precision import compute_dtype

    dtype = compute_dtype(precision or "float32")
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
