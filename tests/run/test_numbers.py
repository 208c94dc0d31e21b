"""Runs that differ in numbers alone train by one program."""

import dataclasses
import gc
import itertools
import weakref

import jax
import pytest

from cnnjax import models
from cnnjax.devices.sharding import make_mesh, parse_rules
from cnnjax.optim import OPTIMIZERS
from cnnjax.run import classifier, state, trainer
from cnnjax.run.recipe import NUMBERS
from cnnjax.schedules import SCHEDULES
from cnnjax.train.compile import lower_train
from tests.tiny import made_dataset

CONFIG = classifier.Config(
    model="mlp", model_arguments=("dense_widths=(4,)",), batch_size=32, epochs=2, warmup_epochs=0.5
)
# Each away from what it is by default.
SOME = dict.fromkeys(NUMBERS, 0.5)


def lowered(mean=0.5, **settings):
    """Returns the text of the program that trains with these settings."""
    config = dataclasses.replace(CONFIG, **settings)
    dataset = made_dataset(64, (4, 4, 1), mean)
    name, arguments = models.read_model(config.model, config.model_arguments)
    recipe = classifier.make_recipe(
        config, dataset, *classifier.make_model(config, name, arguments, dataset)
    )
    mesh = make_mesh(1)
    data = trainer.make_pipeline(dataset, config, mesh)
    form = state.state_form(recipe, config.seed, mesh, parse_rules(config.sharding))
    return lower_train(recipe.step_maker(), form, data, method="scan", mesh=mesh).as_text()


@pytest.mark.parametrize(
    ("optimizer", "schedule"), list(zip(OPTIMIZERS, itertools.cycle(SCHEDULES), strict=False))
)
def test_other_numbers_are_the_same_program(optimizer, schedule):
    names = {"optimizer": optimizer, "schedule": schedule}
    half = {name: value / 2 for name, value in SOME.items()}
    assert lowered(**names, **SOME) == lowered(**names, **half, mean=0.4)


def test_a_term_of_factor_zero_is_in_no_program():
    plain = lowered()
    for name in set(NUMBERS) - {"learning_rate", "momentum"}:
        assert lowered(**{name: 0.1}) != plain


def test_a_run_leaves_nothing_of_its_data_in_memory(monkeypatch, tmp_path):
    """Workers of a search run a hundred of them."""
    seen = []

    def load(*arguments, **options):
        dataset = made_dataset(64, (4, 4, 1))
        seen.append(weakref.ref(dataset))
        return dataset

    monkeypatch.setattr("cnnjax.data.load", load, raising=False)
    monkeypatch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])
    config = dataclasses.replace(CONFIG, devices=1, run_dir=str(tmp_path / "run"))
    assert classifier.main(config) == 0
    jax.clear_caches()
    gc.collect()
    assert [reference() for reference in seen] == [None]
