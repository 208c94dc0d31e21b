"""ResNet-50 on ImageNet, by the recipe of 90 epochs or that of 300.

    python -m experiments.imagenet_resnet50                 # 90 epochs: 76.4% are published
    python -m experiments.imagenet_resnet50 --recipe 300    # 300 epochs: 79.8% are published
    python -m experiments.imagenet_resnet50 --mesh fsdp=8 --precision bfloat16 --plan

90: Goyal et al. 2017, "Accurate, Large Minibatch SGD" (arXiv 1706.02677), section 5.1: 256 images a
step. A rate of 0.1 for each 256 images, 5 epochs of linear rise, divided by 10 after 30, 60 and 80
epochs; Nesterov momentum 0.9; weight decay 0.0001 of the kernels, in the gradient, so neither of
norms nor of biases; the last scale of each block starts at 0; random parts of 8 to 100% of the
area, flips. Other batch sizes need `--learning-rate` in proportion.

300: Wightman et al. 2021, "ResNet strikes back" (arXiv 2110.00476), Table 2, A2: LAMB at 0.005 with
2,048 images per step and a cosine, weight decay 0.02, one sigmoid per class as the loss,
RandAugment, mixup 0.1 or CutMix 1, stochastic depth 0.05, tested at a crop of 0.95. Left out:
repeated augmentation, and the spread of RandAugment's magnitude.

ImageNet must be prepared by tfds from its two archives (`python scripts/prepare_data.py --help`);
it is streamed from disk, and of each file only the part that is seen is decoded. `test` is its
validation split, and nothing is held out. It cannot be had without an account, so neither score nor
time is measured here: the tests run both recipes for 20 steps on made JPEG files (the second with
fewer blocks). Where it is not prepared, `--smoke` runs on synthetic images of 32x32, and says so.
"""

import dataclasses
from typing import Any, Literal

from cnnjax.run import classifier, settings
from cnnjax.run.classifier import main

RECIPES: dict[str, dict[str, Any]] = {
    "90": {},
    "300": {
        "epochs": 300,
        "batch_size": 2048,
        "model_arguments": ("stochastic_depth_rate=0.05",),
        "fit": "crop:0.95",
        "loss": "one_vs_all_cross_entropy",
        "optimizer": "lamb",
        "learning_rate": 5e-3,
        "schedule": "cosine",
        "schedule_arguments": (),
        "l2": 0.0,
        "weight_decay": 0.02,
        "augment": "flip,randaugment:2:7,mixup:0.1,cutmix:1",
    },
}
SMOKE = {"image_size": 32, "batch_size": 64, "warmup_epochs": 0.0}


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """ResNet-50 on ImageNet: trains, tests on the validation split at the end."""

    recipe: Literal["90", "300"] = "90"
    """Which settings other flags start from: the classical ones of 90 epochs, or A2 of 300. From
    Python: Config(**RECIPES["300"])."""

    model: str = "resnet50"
    model_arguments: tuple[str, ...] = ("zero_init_residual=True",)
    dataset: str = "tfds:imagenet2012"
    pipeline: Literal["auto", "resident", "stream"] = "stream"
    image_size: int = 224
    fit: str = "crop"
    crop_area: float = 0.08
    validation: float = 0.0
    epochs: int = 90
    batch_size: int = 256
    optimizer: str = "nesterov"
    learning_rate: float = 0.1
    schedule: str = "step"
    schedule_arguments: tuple[str, ...] = ("boundaries=(0.3333333, 0.6666667, 0.8888889)",)
    warmup_epochs: float = 5.0
    l2: float = 0.5e-4
    augment: str = "flip"

    def implied(self) -> dict[str, Any]:
        """The defaults of the recipe, and a size that a smoke run computes in seconds."""
        return RECIPES[self.recipe] | (SMOKE if self.smoke else {})


if __name__ == "__main__":
    settings.launch(Config, main)
