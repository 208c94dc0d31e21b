"""The grammar of small specs, what binds them, and the eleven settings that are written in it."""

import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import distill, finetune, losses, models, optim, robust, schedules, signatures, spec
from cnnjax.augment import change, filters, policy
from cnnjax.data import dataset, image_files
from cnnjax.devices import sharding
from cnnjax.errors import UserError
from cnnjax.evaluation import ensemble
from cnnjax.finetune import methods
from cnnjax.robust import named
from cnnjax.run import checks, classifier, cli, help


def crop(pixels: int, fill: float | Literal["reflect"] | None = 0.0):
    return pixels, fill


def dense(widths: tuple[int, ...] = (1,), pair: tuple[float, float] = (1, 2), act: str = "relu"):
    return widths, pair, act


def only(*names: int | str, known):
    return names, known


def flip():
    return ()


NAMES = {"crop": crop, "dense": dense, "flip": flip, "any-of": only}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        (" ", []),
        ("flip", [spec.Spec("flip")]),
        ("flip()", [spec.Spec("flip")]),
        ("crop:4", [spec.Spec("crop", (4,))]),
        ("crop(4)", [spec.Spec("crop", (4,))]),
        ("crop:4:reflect", [spec.Spec("crop", (4, "reflect"))]),
        (" crop : 4 , flip ", [spec.Spec("crop", (4,)), spec.Spec("flip")]),
        ("crop( 4 , fill = 1e-3, )", [spec.Spec("crop", (4,), {"fill": 1e-3})]),
        ("a(b=(1, 2), c=[3], d=None)", [spec.Spec("a", (), {"b": (1, 2), "c": [3], "d": None})]),
        ("a('x, y)', bishop's, \"=\")", [spec.Spec("a", ("x, y)", "bishop's", "="))]),
        ("even-odd,a.b/c", [spec.Spec("even-odd"), spec.Spec("a.b/c")]),
        ("a(...,1j,{1},f(2))", [spec.Spec("a", ("...", "1j", "{1}", "f(2)"))]),
        ("a,,b", [spec.Spec("a"), spec.Spec(""), spec.Spec("b")]),
    ],
)
def test_what_the_grammar_reads(text, found):
    assert spec.parse(text) == found


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
SPECS = st.builds(
    spec.Spec,
    st.from_regex(r"[a-z][a-z0-9_-]{0,6}", fullmatch=True),
    st.lists(VALUES, max_size=3).map(tuple),
    st.dictionaries(WORDS, VALUES, max_size=3),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(SPECS, max_size=3))
def test_what_is_written_is_read_back(items):
    assert spec.parse(", ".join(map(str, items))) == items


@settings(max_examples=100, deadline=None)
@given(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.lists(NUMBERS, min_size=1, max_size=4))
def test_the_short_spelling_is_the_positional_one(name, values):
    short = ":".join([name, *map(repr, values)])
    assert spec.parse(short) == spec.parse(f"{name}({', '.join(map(repr, values))})")


@pytest.mark.parametrize("text", ["crop:4", "crop(4)", "crop(pixels=4)", "crop(4, fill=0)"])
def test_spellings_of_one_call(text):
    value = spec.call(spec.parse_one(text), NAMES, "change")
    assert value == (4, 0.0) and isinstance(value[1], float)


def test_values_are_converted_as_annotated():
    found = spec.call(spec.parse_one("dense([3, 4], pair=(0, 1), act=tanh)"), NAMES, "layer")
    assert found == ((3, 4), (0.0, 1.0), "tanh")
    found = spec.call(spec.parse_one("any-of(3, x, '4')"), NAMES, "choice", known=5)
    assert found == ((3, "x", "4"), 5)
    assert signatures.convert(len, float) is len  # What no text can be is not checked.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corp:4", "unknown change 'corp': did you mean crop?"),
        ("crop(4)x", "unknown change 'crop(4)x': did you mean crop?"),
        ("crop", "missing a required argument: 'pixels'. Write it as crop(pixels, fill=0.0)"),
        ("crop:1:2:3", "too many positional arguments. Write it as crop(pixels, fill=0.0)"),
        ("crop(1, pixels=1)", "multiple values for argument 'pixels'. Write it as crop(pixels, "),
        ("crop(pixel=4)", "unknown argument 'pixel': did you mean pixels or fill? Write it as "),
        ("crop:2.5", "change 'crop:2.5': pixels=2.5: give a whole number. Write it as crop(pixels"),
        ("crop(True)", "pixels=True: give a whole number."),
        ("crop(2, mirror)", "fill='mirror': give a number or reflect or None."),
        ("crop(2, 1e999)", "fill=inf: give a number or reflect or None."),
        ("dense(widths=3)", "widths=3: give (a whole number, ...)."),
        ("dense((1, x))", "widths='(1, x)': give (a whole number, ...)."),
        ("dense(pair=(1, 2, 3))", "pair=(1, 2, 3): give (a number, a number)."),
        ("dense(act=3)", "act=3: give a word. Write it as dense(widths=(1,), pair=(1, 2), act=re"),
        ("any-of([3])", "names=([3],): give a whole number or a word. Write it as any-of(*names)"),
        ("flip:2", "change 'flip:2': it takes no arguments. Write it as flip"),
        ("flip(a=2)", "it takes no arguments. Write it as flip"),
        ("crop(4", "change 'crop(4': a bracket is not closed: add ')'"),
        ("crop)4", "change 'crop)4': ')' closes no bracket: drop it"),
        ("crop(fill=1, fill=2)", "change 'crop(fill=1, fill=2)': fill is given twice: drop one"),
        ("flip,flip", "change 'flip,flip': give one, not 2"),
    ],
)
def test_each_mistake_is_one_clear_line(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        supplied = {"known": ()} if text.startswith("any-of") else {}
        spec.call(spec.parse_one(text, "change"), NAMES, "change", **supplied)
    assert "\n" not in str(error.value)


def test_arguments_alone_have_names():
    assert spec.arguments(["a=tanh", "b=(1, 2)"]) == {"a": "tanh", "b": (1, 2)}
    with pytest.raises(UserError, match="'tanh' has no name: write it as name=value"):
        spec.arguments(["tanh"])
    with pytest.raises(UserError, match="a is given twice"):
        spec.extend(spec.parse_one("x(a=1)"), {"a": 2})


def _augmented(text):
    image = jnp.asarray(np.arange(48.0).reshape(4, 4, 3))
    return change.compose(*policy.parse_policy(text).changes)(jax.random.key(0), image)


def _filter(text):
    found = filters.make_filter(text)
    return found.func, found.keywords


def _views(text):
    image = np.arange(16.0).reshape(1, 4, 4, 1)
    return np.stack([view(image) for view in ensemble.parse_views(text)])


def _method(text):
    return finetune.make_method(text, models.create("lenet5", num_classes=3), (28, 28, 1))


def _rules(text):
    return sharding.parse_rules([f"head/.*={text}"])


def _classes(text):
    return dataset.select_classes(tuple("0123456789"), text)


def _model(text):
    return models.read_model(*_and_arguments(text))


def _schedule(text):
    return schedules.read_schedule(*_and_arguments(text))


def _and_arguments(text):
    """`name + a=1 b=2` is how the older settings say `name(a=1, b=2)`."""
    name, _, words = text.partition(" + ")
    return name, words.split()


# setting -> reader, what it is called, one thing in two spellings, and three mistakes: an unknown
# name, an unknown argument, a value of another type.
OPTIONS = {
    "augment": (_augmented, "augmentation", "crop:2,flip", "crop(pixels=2), flip()"),
    "fit": (image_files.parse_fit, "fit", "crop:0.9", "crop(share=0.9)"),
    "mesh": (sharding.parse_mesh, "mesh", "data=4,model=2", "mesh(data=4, model=2)"),
    "sharding": (_rules, "sharding axis", "fsdp:-2,model:-1", "fsdp(-2), model(dimension=-1)"),
    "attack": (robust.parse_attack, "attack", "pgd:0.3:7:2", "pgd(0.3, restarts=2, num_steps=7)"),
    "method": (_method, "fine-tuning method", "lora:4", "lora(rank=4)"),
    "preprocess": (_filter, "filter", "median:3", "median(size=3)"),
    "tta": (_views, "view", "shift:1,flip", "flip(), shift(pixels=1)"),
    "classes": (_classes, "classes", "3,8", "only(3, 8)"),
    "model": (
        _model,
        "model",
        "lenet5 + activation=tanh pool=max",
        "lenet5(activation=tanh, pool=max)",
    ),
    "schedule": (_schedule, "schedule", "cosine + cycles=3", "cosine(cycles=3)"),
}
MISTAKES = {
    "augment": ("corp(2)", "crop(pixel=2)", "crop(pixels=two)"),
    "fit": ("corp(0.9)", "crop(shar=0.9)", "crop(share=most)"),
    "mesh": ("mseh(data=2)", "mesh(dta=2)", "mesh(data=two)"),
    "sharding": ("fspd(-1)", "fsdp(dim=-1)", "fsdp(dimension=last)"),
    "attack": ("pdg(0.3)", "pgd(0.3, step=4)", "pgd(epsilon=big)"),
    "method": ("lorra(4)", "lora(ranks=4)", "lora(rank=2.5)"),
    "preprocess": ("medain(3)", "median(siz=3)", "median(size=3.0)"),
    "tta": ("shfit(1)", "shift(pixel=1)", "shift(pixels=one)"),
    "classes": ("odd-even", "only(class=3)", "only(3, (8, 9))"),
    "model": ("lenet(pool=max)", "lenet5(pol=max)", "lenet5(pool=2)"),
    "schedule": ("cosin(cycles=3)", "cosine(cycle=3)", "cosine(cycles=often)"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_setting_has_both_spellings(option):
    read, _, short, full = OPTIONS[option]
    jax.tree.map(np.testing.assert_array_equal, read(short), read(full))


@pytest.mark.parametrize("option", OPTIONS)
def test_each_setting_refuses_mistakes_in_the_same_words(option):
    read, kind, *_ = OPTIONS[option]
    name, argument, value = MISTAKES[option]
    with pytest.raises(UserError, match=r"unknown [\w -]+ '[\w-]+': did you mean [\w-]+") as error:
        read(name)
    lines = [str(error.value)]
    for text, problem in ((argument, r"unknown argument '\w+'"), (value, r"\w+=.+: give .+")):
        form = rf"{kind} {re.escape(repr(text))}: {problem}.* Write it as [\w-]+\(.*\)"
        with pytest.raises(UserError) as error:
            read(text)
        assert re.fullmatch(form, str(error.value)), str(error.value)
        lines.append(str(error.value))
    assert not any("\n" in line for line in lines)


def test_flags_take_both_spellings():
    flags = [
        "--model=lenet5(activation=tanh)",
        "--model-arguments=pool=average",
        "--schedule=cosine(cycles=2)",
        "--classes=only(3, 8)",
        "--augment=crop(4), flip",
        "--preprocess=median(3)",
        "--fit=crop(share=0.9)",
        "--mesh=mesh(data=1)",
        "--sharding=head/.*=fsdp(-1)",
    ]
    config = cli.parse(classifier.Config, flags)
    checks.check_specs(config)
    model = models.read_model(config.model, config.model_arguments)
    assert model == ("lenet5", {"activation": "tanh", "pool": "average"})


@pytest.mark.parametrize(
    "flags",
    [
        ["--augment=corp:4"],
        ["--fit=corp"],
        ["--sharding=a=fspd:1"],
        ["--preprocess=medain:3"],
        ["--model-arguments=pol=max"],
        ["--schedule-arguments=cycle=2"],
    ],
)
def test_mistakes_are_refused_before_anything_is_read(flags):
    config = cli.parse(classifier.Config, ["--model", "lenet5", "--dataset", "none", *flags])
    with pytest.raises(UserError, match="did you mean"):
        classifier.main(config)


def test_help_lists_what_the_registries_have():
    assert {
        "augment": spec.describe(policy.NAMES),
        "fit": spec.describe(image_files.FITS),
        "classes": spec.describe(dataset.CLASSES, supplied=("class_names",)),
        "schedule": spec.describe(schedules.SCHEDULES, supplied=schedules.SHARED),
        "preprocess": spec.describe(filters.FILTERS),
        "mesh": spec.describe(sharding.MESHES),
        "sharding": spec.describe(sharding.TRIES),
        "attack": spec.describe(named.ATTACKS),
        "method": spec.describe(methods.METHODS, supplied=("target",)),
        "tta": spec.describe(ensemble.VIEWS, supplied=("views",)),
        "optimizer": ", ".join(optim.OPTIMIZERS),
        "loss": ", ".join(losses.LOSSES),
        "losses": spec.describe(distill.LOSSES),
    } == help.LISTINGS


def test_help_shows_the_listings(capsys):
    with pytest.raises(SystemExit):
        cli.parse(classifier.Config, ["--help"])
    printed = " ".join(re.sub("[│\n]", " ", capsys.readouterr().out).split())
    assert f"Choices: {help.LISTINGS['schedule']} (default: cosine)" in printed
