"""What help says of a flag is what the flag does."""

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

from cnnjax import commands, losses
from cnnjax.commands import convert, show_batch
from cnnjax.data.dataset import Arrays, Dataset
from cnnjax.errors import UserError
from cnnjax.run import classifier, record, settings
from experiments import finetune
from tests.tiny import random_arrays

ROOT = Path(__file__).parents[2]
EXPERIMENTS = [path.stem for path in sorted((ROOT / "experiments").glob("[a-z]*.py"))]
COMMANDS = [name.replace("-", "_") for name in commands.COMMANDS]


def help_of(config_type):
    """Field -> its docstring, that of the class which says it last."""
    found = {}
    for each in reversed(config_type.__mro__[:-1]):
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(each))).body[0].body
        for field, text in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                said = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                found[field.target.id] = " ".join(text.value.value.split()) if said else ""
    return found


@pytest.mark.parametrize(
    "module",
    [f"experiments.{name}" for name in EXPERIMENTS]
    + [f"cnnjax.commands.{name}" for name in COMMANDS],
)
def test_every_flag_has_help(module):
    config_type = getattr(importlib.import_module(module), "Config", None)
    if config_type is not None:
        texts = help_of(config_type)
        fields = {field.name for field in dataclasses.fields(config_type)}
        # A default of its own is no other meaning.
        silent = {name for name in fields & texts.keys() if not texts[name]}
        inherited = {
            name
            for each in config_type.__mro__[1:-1]
            for name in vars(each).get("__annotations__", {})
        }
        assert fields <= texts.keys() and not silent - inherited


def two_classes():
    parts = (random_arrays(16, num_classes=2) for _ in range(3))
    return Dataset("two", ("a", "b"), *(Arrays(*part) for part in parts), (0.5,), (0.3,))


def test_label_smoothing_is_of_the_losses_that_its_help_names():
    said = help_of(classifier.Config)["label_smoothing"]
    takes = []
    for name in losses.LOSSES:
        try:
            losses.make_loss(name, label_smoothing=0.1)
            takes.append(name)
        except UserError:
            pass
    assert takes == ["softmax_cross_entropy", "sigmoid_binary_cross_entropy"]
    assert "of softmax and sigmoid cross-entropy (other losses refuse it)" in said
    config = classifier.Config(label_smoothing=0.5, batch_size=8, model="lenet5")
    dataset = two_classes()
    model, card = classifier.make_model(config, "lenet5", {}, dataset)
    task = classifier.make_recipe(config, dataset, model, card).task
    batch = {"label": dataset.train.label[:1] * 0 + 1}
    # Of a logit of 0 the loss is log 2 whatever the label; of 2 it is above that of label 1 alone.
    values, _ = task.loss(2.0 + 0 * batch["label"][:, None].astype("f"), batch)
    plain = losses.sigmoid_binary_cross_entropy([2.0], [1])
    assert float(values[0]) == pytest.approx(float(plain[0]) + 0.25 * 2.0)


def test_resume_says_what_may_change():
    said = help_of(settings.Run)["resume"]
    assert "may change how long it trains, where it reads and computes, and what it keeps" in said
    assert {"epochs", "dataset", "data_dir", "devices", "keep_last"} <= (
        record.CHANGEABLE_ON_RESUME
    )


def test_fine_tuning_says_that_it_takes_the_bases():
    said = help_of(finetune.Config)
    assert "0 takes the base's" in said["image_size"]
    assert "by default the base's" in said["preprocess"]


def test_defaults_that_help_names():
    assert "digits" in help_of(show_batch.Config)["dataset"]
    assert "or 0 where none are published" in help_of(convert.Config)["mean"]
    probe = importlib.import_module("cnnjax.commands.probe")
    assert "Number of seeds" in help_of(probe.Config)["seeds"]
