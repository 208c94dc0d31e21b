"""One call that trains: what an experiment does from the shell, from Python and notebooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cnnjax import models, notebook
from cnnjax.data.fields import Label
from cnnjax.data.streamed import AnyDataset, example_forms
from cnnjax.errors import UserError, unknown_name
from cnnjax.paths import expand
from cnnjax.run import files, load, record, trainer
from cnnjax.run.files import read_json, writing_errors
from cnnjax.run.groups import Training
from cnnjax.run.logs import KINDS, read_metrics
from cnnjax.run.recipe import Recipe, make_recipe
from cnnjax.run.report import score_text
from cnnjax.run.state import model_input
from cnnjax.schedules import Schedule
from cnnjax.tasks.task import Task
from cnnjax.train.precision import AUTO
from cnnjax.train.predict import as_float
from cnnjax.train.step import TrainStep, make_step

PyTree = Any
# What the record says of an Optax transformation, which does not say what it is.
OWN_OPTIMIZER = "of the caller"


@dataclasses.dataclass(frozen=True)
class Called(Training):
    """The settings of a run that `train` was called for."""

    experiment: ClassVar[str] = "cnnjax.run.train"

    model: str = ""
    """The network, as its module writes itself."""

    task: str = ""
    """The task: its name, what it is of, and what is monitored."""

    normalize: str = ""
    """The function's name."""


@dataclasses.dataclass(frozen=True, repr=False)
class Trained:
    """What `train` leaves.

    Attributes:
      directory: of the run.
      summary: the content of `summary.json`: final scores, or {} for a run that was stopped.
      model: the Linen module.
      variables: what `model.apply` takes: of the best step where early stopping chose one, averaged
        parameters where the run kept an average.
    """

    directory: Path
    summary: dict[str, Any]
    model: nn.Module
    variables: PyTree

    def metrics(self, kind: str = "validation") -> Any:
        """Returns the metrics of the run's validations, a row each: a DataFrame if pandas is there.

        Args:
          kind: `train`, `validation` or `test`.

        Raises:
          UserError: another kind, or the run's metrics are gone.
        """
        if kind not in KINDS:
            raise unknown_name("kind of metrics", kind, KINDS)
        records = read_metrics(self.directory)
        return notebook.table(
            {name: value for name, value in record.items() if name != "kind"}
            for record in records
            if record["kind"] == kind
        )

    def figure(self, name: str) -> Path:
        """Returns the path of one of the run's figures, such as `learning_curves`.

        Raises:
          UserError: the run has no figure of that name.
        """
        paths = {path.stem: path for path in files.figures(self.directory)}
        if name not in paths:
            raise unknown_name(f"figure of {self.directory}", name, sorted(paths))
        return paths[name]

    def __repr__(self) -> str:
        return f"Trained({self.directory}: {self._score()})"

    def _repr_html_(self) -> str:
        shown = ("model", "dataset", "test_accuracy", "test_loss", "parameters", "step", "seconds")
        facts = {name: self.summary[name] for name in shown if name in self.summary}
        return notebook.card(
            f"{self.directory.name}: {self._score()}",
            facts | {"directory": self.directory},
            [self.directory / "figures" / "learning_curves.png"],
        )

    def _score(self) -> str:
        return score_text(self.summary) if self.summary else "stopped, not tested yet"


def train(
    model: str | nn.Module,
    task: Task,
    data: AnyDataset,
    optimizer: str | optax.GradientTransformation = "adam",
    *,
    schedule: Schedule | None = None,
    normalize: Callable[[jax.Array], jax.Array] = as_float,
    augment: Callable[..., Any] | None = None,
    variables: PyTree | None = None,
    step_factory: Callable[..., TrainStep] = make_step,
    metadata: Mapping[str, Any] | None = None,
    resume: bool = False,
    **options: Any,
) -> Trained:
    """Trains, validates after each epoch, tests at the end, and fills a run directory.

        mnist = cnnjax.data.load("mnist")
        trained = cnnjax.run.train(
            "lenet5", classification(10), mnist, "adam", epochs=2, learning_rate=1e-3
        )
        trained.summary["test_accuracy"]

    The same settings and seed give the same bits as an experiment with them.

    Args:
      model: a name of `cnnjax.models`, for the task's number of classes, or a Linen module.
      task: what it is to find, see `cnnjax.tasks`.
      data: what `cnnjax.data.open_dataset` returned, or a `cnnjax.data.ArrayDataset`.
      optimizer: a name of `cnnjax.optim`, with the settings beside it (`learning_rate`, `schedule`
        as a name, `weight_decay`, ...), or an Optax transformation, which has its own.
      schedule: step -> learning rate of an Optax transformation, for the metrics.
      normalize: stored images -> what the model expects.
      augment: `(key, batch, first_index) -> batch`, such as `cnnjax.augment.make_augment` returns.
      variables: what training starts from; None initializes the model.
      step_factory: what takes the arguments of `cnnjax.train.step.make_step` in its place.
      metadata: what else `model.json` is to record.
      resume: go on in `run_dir` where a run was stopped there, with the same settings; a finished
        one is read. What an Optax transformation or a function does is not compared.
      **options: settings by name: `epochs`, `batch_size`, `seed`, `run_dir`, `devices`,
        `precision`, `patience`, ...: the fields of `cnnjax.run.groups.Training`.

    Raises:
      UserError: whatever is wrong, before training starts.
    """
    known = [field.name for field in dataclasses.fields(Training)]
    for name in options:
        if name not in known:
            raise unknown_name("setting", name, known)
    module = _module(model, task)
    if optimizer is None or not isinstance(task, Task):
        raise UserError("give a task of cnnjax.tasks, and an optimizer's name or an Optax one.")
    options["optimizer"] = optimizer if isinstance(optimizer, str) else OWN_OPTIMIZER
    if "run_dir" in options:
        options["run_dir"] = expand(options["run_dir"])
    _check_fields(task, data)
    config = Called(
        model=str(model) if isinstance(model, str) else repr(module),
        task=repr((task.name, dict(task.inputs), task.monitor)),
        normalize=getattr(normalize, "__qualname__", type(normalize).__name__),
        **options,
    )
    if config.resume:
        raise UserError("resume is True or False: give the directory as run_dir.")
    directory = Path(config.run_dir)
    if resume and not config.run_dir:
        raise UserError("resume=True needs run_dir, the directory to go on in.")
    if config.run_dir and (directory / "config.json").exists():
        if not resume:
            raise UserError(
                f"{directory} holds a run already: give resume=True to go on with it, or another "
                "run_dir."
            )
        decided = record.filled_in(config, record.read_settings(directory))
        config = dataclasses.replace(config, **decided)
        _check_same(directory, config, data)
        config = dataclasses.replace(config, resume=config.run_dir)
        if record.is_finished(config):
            return _trained(directory, _module(model, task, config))
    trainer.start(config)
    module = _module(model, task, config)
    config = dataclasses.replace(config, precision=_precision(model, config))
    own_optimizer = None if isinstance(optimizer, str) else optimizer
    if own_optimizer is not None and schedule is None:
        # What it uses is not known here.
        schedule = lambda step: jnp.float32(jnp.nan)  # noqa: E731
    # The named one is not used then.
    named = config if own_optimizer is None else dataclasses.replace(config, optimizer="sgd")
    recipe = make_recipe(
        named,
        data,
        task,
        module,
        metadata=lambda: {
            **_metadata(model, module),
            **(_images(data) if normalize is as_float else {}),
            **(metadata or {}),
        },
        normalize=normalize,
        augment=augment,
        variables=variables,
        wrap_optimizer=lambda named, total_steps: own_optimizer or named,
        schedule=schedule,
        step_factory=step_factory,
    )
    _check_outputs(recipe)
    config = record.place(config, Called.experiment)
    with writing_errors(Path(config.run_dir)):
        trainer.train(config, recipe)
    return _trained(Path(config.run_dir), module)


def _module(model: str | nn.Module, task: Task, config: Called | None = None) -> nn.Module:
    """Returns the network; with settings, one that computes as they say, when JAX has started."""
    if not isinstance(model, str):
        return model
    label = task.inputs.get("label")
    num_classes = getattr(label, "num_classes", None)
    if num_classes is None:
        raise UserError(
            f"{model!r} is a classifier's name, but the task has no classes: give a Linen module."
        )
    name, fields = models.read_model(model)
    if config is not None:
        fields = load.computation(name, fields, precision=config.precision, remat=config.remat)
    return models.create(name, num_classes=1 if num_classes == 2 else num_classes, **fields)


def _precision(model: str | nn.Module, config: Called) -> Any:
    """Returns the precision to record; a module of the caller's own computes as it was made."""
    if isinstance(model, str):
        return load.precision_of(*models.read_model(model), config.precision)
    return "float32" if config.precision == AUTO else config.precision


def _metadata(model: str | nn.Module, module: nn.Module) -> dict[str, Any]:
    if isinstance(model, str):
        return {"model": model, "num_outputs": module.num_classes, "arguments": {}}  # type: ignore[attr-defined]
    return {"model": f"{type(module).__module__}.{type(module).__qualname__}"}


def _images(data: AnyDataset) -> dict[str, Any]:
    """Returns what commands need to prepare images of their own, where there are labeled ones."""
    label = data.fields.get("label")
    if "image" not in data.fields or not isinstance(label, Label):
        return {}
    names = getattr(data, "class_names", None) or map(str, range(label.num_classes))
    return {"image_shape": example_forms(data)["image"][0], "class_names": tuple(names)}


def _check_fields(task: Task, data: AnyDataset) -> None:
    """Raises a UserError unless the data have what the task is of."""
    for name, field in task.inputs.items():
        if name not in data.fields:
            raise unknown_name(f"key of {data.name}, of which the task is,", name, data.fields)
        if data.fields[name] != field:
            raise UserError(
                f"{name} is {data.fields[name]} in {data.name} and {field} in the task: give one."
            )


def _check_outputs(recipe: Recipe) -> None:
    """Raises a UserError for a model with more or fewer outputs than the task has classes."""
    if recipe.task.name not in ("classification", "segmentation"):
        return  # Others may have labels that no output is for.
    counts = [getattr(field, "num_classes", None) for field in recipe.task.inputs.values()]
    found = jax.eval_shape(
        lambda key: recipe.model.init_with_output(key, model_input(recipe), train=False)[0],
        jax.random.key(0),
    )
    outputs = getattr(found, "shape", (None,))[-1]
    for count in counts:
        if count is not None and outputs != count and (outputs, count) != (1, 2):
            raise UserError(
                f"the model has {outputs} outputs, the task {count} classes: make them as many."
            )


def _check_same(directory: Path, config: Called, data: AnyDataset) -> None:
    saved = record.read_config(directory)
    if saved.get("data_checksum", data.checksum) != data.checksum:
        raise UserError(
            f"the data are not those of {directory}: give the same, or another run_dir."
        )
    if saved["experiment"] != Called.experiment:
        raise UserError(
            f"{directory} is a run of {saved['experiment']}: continue it with python -m "
            f"{saved['experiment']} --resume {directory}"
        )
    for name, given in record.as_json(record.recorded_settings(config)).items():
        kept = saved["settings"].get(name, given)
        if kept != given and name not in record.CHANGEABLE_ON_RESUME:
            raise UserError(
                f"{name} {given!r} differs from the {kept!r} of the run in {directory}: give the "
                "same, or another run_dir."
            )


def _trained(directory: Path, module: nn.Module) -> Trained:
    summary: dict[str, Any] = {}
    if (directory / "summary.json").exists():
        summary = read_json(directory / "summary.json", f"{directory} is damaged")
    return Trained(directory, summary, module, load.load_variables(directory)[0])
