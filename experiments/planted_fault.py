r"""A fault planted into LeNet-5, and found by its maps and by TCAV: a mark that leaks the label.

Digits of MNIST are written as PNG files, most training images with a mark in a corner whose place
is that of their class. A network trained on them scores well on test images with the mark, and
answers by the mark, as networks did by copyright tags of photographs: Lapuschkin et al. 2019,
"Unmasking Clever Hans Predictors and Assessing What Machines Really Learn". An honest network
learns the same digits without. Grad-CAM, Layer-CAM, layer-wise relevance and occlusion look at both
on the same marked images: what fraction of the map's positive mass lies in the corner, and how
often its largest value. TCAV asks in how many classes "has the mark of the class" speaks for it.

    python -m experiments.planted_fault

RUN/faulty and RUN/honest are runs like any, trained on the folders RUN/marked and RUN/plain:

    cnnjax explain --run RUN/faulty
    cnnjax concepts --run RUN/faulty --concept mark=RUN/concepts/3 --random RUN/plain/train \
        --prepare image --classes 3 --layers stage3

Two to four minutes on 2 CPU cores; docs/explain.md shows what is found, with seed 0.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

import cnnjax
from cnnjax import explain
from cnnjax.errors import UserError
from cnnjax.explain import concepts, named, page
from cnnjax.run import classifier, files, load, record, settings

# The marks are squares, five in each of two rows.
SIDE = 3
PLACES = [(SIDE * (label // 5), SIDE * (label % 5)) for label in range(10)]
CORNER = np.s_[:, : 2 * SIDE, : 5 * SIDE]
METHODS = ("grad_cam", "layer_cam(layer=stage1)", "lrp", "occlusion(window=4, stride=2)")
NETWORKS = ("faulty", "honest")


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """Train LeNet-5 on digits with a mark that leaks the label, and find the fault."""

    leaked: float = 0.99
    """Fraction of the training images that have the mark of their class."""

    digits: int = 8000
    """Training images; an eighth as many test images."""

    looked_at: int = 200
    """Test images whose maps are measured."""

    model: str = "lenet5"
    epochs: int = 5
    learning_rate: float = 3e-3
    weight_decay: float = 0.05


def main(config: Config) -> int:
    """Writes the digits, trains both networks, looks for the fault; returns the exit code."""
    if not 0 < config.leaked <= 1 or config.digits < 800 or config.looked_at < 10:
        raise UserError("give --leaked above 0 to 1, --digits 800 or more, --looked-at 10 or more.")
    if config.smoke:
        config = dataclasses.replace(config, digits=800, looked_at=20)
    cnnjax.run.trainer.start(dataclasses.replace(config, coordinator="off"))
    directory = Path(config.run_dir)
    files.make_directory(directory)
    with files.only_writer(directory):
        record.write_config(config, record.experiment_name(type(config)))
        digits = cnnjax.data.load("mnist", seed=config.seed)
        train, test = (
            cnnjax.data.dataset.Arrays(split.image[:count], split.label[:count])
            for split, count in ((digits.train, config.digits), (digits.test, config.digits // 8))
        )
        write_digits(directory, config, train, test)
        for network, folder in zip(NETWORKS, ("marked", "plain"), strict=True):
            data = f"folder:{directory / folder}"
            own = classifier.settings_like(config, dataset=data, coordinator="off")
            code = classifier.train_part(own, directory / network)
            if code or not (directory / network / "summary.json").exists():
                return code
        trained = [load.load_classifier(directory / name) for name in NETWORKS]
        found = find(config, directory, trained, train, test)
        text = "\n".join(f"{name:40} {value:.3f}" for name, value in found.items())
        print(text)
        card = files.read_json(directory / "faulty" / "summary.json", "it is damaged")
        kept = ("model", "parameters", "seconds", "seed", "epochs", "step")
        summary = {
            "experiment": record.experiment_name(type(config)),
            "dataset": "mnist",
            "test_accuracy": found["faulty, accuracy with its mark"],
            **{name: card[name] for name in kept},
            **found,
        }
        cnnjax.run.report.write_summary(directory, summary, text)
        print(f"see          {directory / 'summary.md'}")
    return 0


def marked(image, label):
    """Returns digits `[examples, 28, 28, 1]` with the marks of classes."""
    image = image.copy()
    for each, number in zip(image, label, strict=True):
        row, column = PLACES[number]
        each[row : row + SIDE, column : column + SIDE] = 255
    return image


def write_digits(directory, config, train, test):
    """Writes marked/ and plain/, folders of PNG files by split and class, and concepts/CLASS."""
    from PIL import Image

    generator = np.random.default_rng(config.seed)
    is_leaked = generator.random(len(train.label)) < config.leaked
    with_marks = marked(train.image, train.label)
    some = np.where(is_leaked[:, None, None, None], with_marks, train.image)
    for name, image, label in (
        ("marked/train", some, train.label),
        ("plain/train", train.image, train.label),
        ("marked/test", marked(test.image, test.label), test.label),
        ("plain/test", test.image, test.label),
        *(
            ("concepts", marked(train.image[-100:], np.full(100, number)), np.full(100, number))
            for number in range(10)
        ),
    ):
        for index, (pixels, number) in enumerate(zip(image, label, strict=True)):
            path = directory / name / str(number) / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(path)


def find(config, directory, trained, train, test):
    """Returns accuracies, what the maps point at, and in how many classes TCAV finds the mark."""
    shown = test.image[: config.looked_at]
    right, others = (marked(test.image, (test.label + shift) % 10) for shift in (0, 1))
    corner = np.zeros(shown.shape[:3], bool)
    corner[CORNER] = True
    tiles, found = [list(np.repeat(right[:3], 3, -1))], {}
    for name, each in zip(NETWORKS, trained, strict=True):
        predicted = jax.jit(lambda variables, image, each=each: each.model.apply(variables, image))
        for kind, image in (("its", right), ("no", test.image), ("another", others)):
            label = predicted(each.variables, each.normalize(image)).argmax(-1)
            text = f"{name}, accuracy with {kind} mark"
            found[text] = float(np.mean(np.asarray(label) == test.label))
        image = each.normalize(right[: config.looked_at])
        for method in named.read(",".join(METHODS)):
            map_ = np.asarray(_map(method, each, image))
            mass = map_.clip(0)
            total = mass.sum((1, 2))
            share = mass[CORNER].sum((1, 2)) / np.where(total > 0, total, 1)
            hits = explain.pointing_game(map_, corner, tolerance=0)
            found[f"{name}, {method.name}, mass in the corner"] = float(share.mean())
            found[f"{name}, {method.name}, points at the corner"] = float(hits.mean())
            tiles.append([page.painted(*pair) for pair in zip(right[:3], map_[:3], strict=True)])
        found[f"{name}, TCAV, classes of ten"] = float(_classes_with_mark(each, train, test))
    picture = np.concatenate([np.concatenate(column, 0) for column in tiles], 1)
    (directory / "figures").mkdir(exist_ok=True)
    (directory / "figures" / "maps.png").write_bytes(page.png(picture, 4 * max(picture.shape)))
    return found


def _map(method, trained, image):
    @jax.jit
    def draw(variables, image):
        # None of these methods draws at random.
        return method(None, trained.model, variables, image, explain.predicted_class)

    return draw(trained.variables, image)


def _classes_with_mark(trained, train, test, layer="stage3"):
    """Returns in how many classes "has the mark of the class" speaks for it."""
    marks = {
        str(number): trained.normalize(marked(train.image[-100:], np.full(100, number)))
        for number in range(10)
    }
    of_class = {n: trained.normalize(test.image[test.label == n]) for n in range(10)}
    others = trained.normalize(train.image[:-100][:1000])
    arguments = trained.model, trained.variables, marks, others, of_class
    tests = concepts.tcav(*arguments, [layer])
    own = [each for each in tests if each.concept == str(each.label)]
    return sum(each.verdict == "speaks for the class" for each in own)


if __name__ == "__main__":
    settings.launch(Config, main)
