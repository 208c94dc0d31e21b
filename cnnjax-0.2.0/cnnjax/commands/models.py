"""List the models, or print one model's layers, sizes and source.

    cnnjax models
    cnnjax models 'vgg*'
    cnnjax models lenet5 --num-classes 26 --image-shape 32 32 3
    cnnjax models ResNet50                   (Keras's; so also timm's resnetv2_50, timm/resnet50)
    cnnjax models my_networks:tiny

Classes and image size are as published unless a flag gives others; as published, one model's sizes
are compared with its row, and others are an error.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cnnjax import commands
from cnnjax.errors import UserError

if TYPE_CHECKING:
    from cnnjax.models import Summary


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the list or the model; returns the exit code.

    Raises:
      UserError: an unknown flag or model, or an image that the model cannot take.
    """
    parser = commands.Parser(
        prog="cnnjax models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", nargs="?", default="*", help="a model, or a pattern such as 'vgg*' (default: all)"
    )
    parser.add_argument(
        "--num-classes", type=int, help="classes of the head (default: as published)"
    )
    parser.add_argument(
        "--image-shape",
        type=int,
        nargs=3,
        metavar=("HEIGHT", "WIDTH", "CHANNELS"),
        help="size of the image (default: as published)",
    )
    options = parser.parse_args(argv)
    if any(character in options.name for character in "*?["):
        _print_list(options.name, options.num_classes, options.image_shape)
    else:
        _print_model(options.name, options.num_classes, options.image_shape)
    return 0


def _summary(name: str, num_classes: int | None, image_shape: list[int] | None) -> Summary:
    from cnnjax import models

    if num_classes is None and image_shape is None:
        return models.check_sizes(name)
    num_classes = models.canonical_classes(name) if num_classes is None else num_classes
    height, width, channels = image_shape or models.input_shape(name)
    model = models.create(name, num_classes=num_classes)
    return models.summary(model, (height, width, channels))


def _print_list(pattern: str, num_classes: int | None, image_shape: list[int] | None) -> None:
    from cnnjax import models

    names = models.list_models(pattern)
    if not names:
        raise UserError(f"no model matches {pattern!r}: try '*'.")
    width = max(map(len, names))
    print(f"{'model':{width}}  {'image':>11}  {'parameters':>11}  {'MACs':>15}")
    for name in names:
        row = models.find(name).row
        shape, parameters, macs = row.image, row.parameters, row.macs
        # Tests compare the rows with the networks, which takes minutes for all of them.
        if num_classes or image_shape or parameters is None or macs is None:
            result = _summary(name, num_classes, image_shape)
            shape, parameters, macs = result.image_shape, result.parameters, result.macs
        size = "x".join(map(str, shape))
        print(f"{name:{width}}  {size:>11}  {parameters:>11,}  {macs:>15,}", flush=True)
    print("MACs: of convolutions and dense layers, for one image.")


def _print_model(name: str, num_classes: int | None, image_shape: list[int] | None) -> None:
    from cnnjax import models

    meaning = models.find(name)
    if meaning.library:
        print(f"{meaning}\n")
    print(models.format_summary(_summary(name, num_classes, image_shape)))
    module_class = type(models.create(name, num_classes=models.canonical_classes(name)))
    module = inspect.getmodule(module_class)
    arguments = [f"{field}={value!r}" for field, value in models.presets(name).items()]
    print(f"\nsource: {module_class.__module__}.{module_class.__name__}({', '.join(arguments)})")
    print(
        f"in {inspect.getsourcefile(module_class)}, line {inspect.getsourcelines(module_class)[1]}"
    )
    if elsewhere := list(models.elsewhere.others(meaning.name, models.MODELS)):
        print(f"other libraries' definitions: {', '.join(elsewhere)}")
    for described in (module, module_class):
        if text := inspect.getdoc(described):
            print(f"\n{text}")
