"""Whether every network here answers the same as an ONNX, a StableHLO and a LiteRT file.

    python scripts/export_table.py                          # the smallest network of each class
    python scripts/export_table.py --networks 'resnet*' --formats onnx
    python scripts/export_table.py --all --out all.md       # every network: hours
    python scripts/export_table.py --out table.md --resume  # those that table.md lacks

Each network gets random weights (and statistics of BatchNorm), small images and ten classes, is
written in each format, run in the format's own runtime, and compared with JAX: the largest
difference of logits over the largest logit. A row that is above 1e-4, or an export that fails, is
named, and the exit code is 1. docs/export.md has the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import export, models, paths
from cnnjax.convert.parity import relative_error
from cnnjax.errors import UserError
from cnnjax.run.exits import one_line_errors

FORMATS = ("onnx", "stablehlo", "tflite")
TOLERANCE = 1e-4
CLASSES, IMAGES = 10, 2
# Sides of images to try, the smallest first.
SIDES = (32, 64, 96, 128)


def smallest() -> list[str]:
    """Returns the network with the fewest parameters of each class of networks, smallest first."""

    def parameters(name: str) -> int:
        return models.find(name).row.parameters or sys.maxsize

    classes: dict[Any, list[str]] = {}
    for name in models.list_models():
        classes.setdefault(models.find(name).row.network, []).append(name)
    return sorted((min(names, key=parameters) for names in classes.values()), key=parameters)


def image_shape(name: str) -> tuple[int, int, int]:
    """Returns the smallest image that a network takes, of those that are tried."""
    height, width, channels = models.input_shape(name)
    model = models.create(name, num_classes=CLASSES)
    for side in (*(side for side in SIDES if side < min(height, width)), 0):
        shape = (side, side, channels) if side else (height, width, channels)
        try:
            jax.eval_shape(lambda x: model.init(jax.random.key(0), x), jnp.zeros((1, *shape)))
        except (UserError, ValueError, TypeError, ZeroDivisionError):
            continue
        return shape
    raise UserError(f"{name} takes no image of {models.input_shape(name)}.")


def random_variables(model: Any, shape: Sequence[int], seed: int = 0) -> Any:
    """Draws variables by which activations keep their size: kernels, scales, statistics, shifts."""
    generator = np.random.default_rng(seed)
    key = jax.random.key(0)
    abstract = jax.eval_shape(lambda: model.init(key, jnp.zeros((1, *shape)), train=False))

    def leaf(path: Any, found: Any) -> np.ndarray:
        name, size = jax.tree_util.keystr(path), found.shape
        if "var" in name:
            return generator.uniform(0.5, 1.5, size).astype(np.float32)
        if "kernel" in name or len(size) > 1:
            fan = max(1, int(np.prod(size[:-1])))
            return (np.sqrt(1.5 / fan) * generator.normal(size=size)).astype(np.float32)
        if "scale" in name:
            return generator.uniform(0.7, 1.3, size).astype(np.float32)
        return (0.1 * generator.normal(size=size)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def errors_of(name: str, formats: Sequence[str], folder: Path) -> dict[str, float | str]:
    """Returns, by format, the relative error of a network's logits, or why there is no file."""
    shape, model = image_shape(name), models.create(name, num_classes=CLASSES)
    variables = random_variables(model, shape)
    image = np.random.default_rng(1).normal(size=(IMAGES, *shape)).astype(np.float32)
    expected = np.asarray(jax.jit(model.apply)(variables, image))
    forward = export.forward_of(model)
    found: dict[str, float | str] = {}
    for kind in formats:
        path = folder / f"{name}.{kind}"
        # LiteRT's converter knows more of a fixed batch; the others take any.
        signature = export.Signature(shape, batch=IMAGES if kind == "tflite" else None)
        options = export.Options(platforms=("cpu",))
        try:
            export.write(path, kind, forward, variables, signature, options=options)
            found[kind] = relative_error(export.opened(path, kind)(image), expected)
        except Exception as error:  # Of many types; the table says which.
            found[kind] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"
        path.unlink(missing_ok=True)
    return found


def rows(names: Sequence[str], formats: Sequence[str]) -> Iterator[tuple[str, Any, float]]:
    """Yields (name, errors, seconds) of each network."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            start = time.perf_counter()
            yield name, errors_of(name, formats, Path(folder)), time.perf_counter() - start
            jax.clear_caches()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 where a format differs or fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", help="names or patterns such as 'resnet*'")
    parser.add_argument("--all", action="store_true", help="every network")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--resume", action="store_true", help="leave out the rows that --out has")
    arguments = parser.parse_args(argv)
    names = models.list_models() if arguments.all else smallest()
    if arguments.networks:
        names = [name for pattern in arguments.networks for name in models.list_models(pattern)]
        if not names:
            raise UserError(f"no network is called {' or '.join(arguments.networks)}.")
    lines = [f"| network | image | {' | '.join(arguments.formats)} |"]
    lines.append("|" + "---|" * (2 + len(arguments.formats)))
    if arguments.resume and arguments.out and arguments.out.exists():
        lines = paths.read_text(arguments.out).splitlines()
        names = [name for name in names if not any(f"`{name}`" in line for line in lines)]
    print("\n".join(lines), flush=True)
    wrong = []
    for name, found, seconds in rows(names, arguments.formats):
        cells = [each if isinstance(each, str) else f"{each:.1e}" for each in found.values()]
        size = "x".join(map(str, image_shape(name)[:2]))
        lines.append(f"| `{name}` | {size} | {' | '.join(cells)} |")
        print(lines[-1], f"{seconds:.0f} s", flush=True)
        bad = [kind for kind, each in found.items() if isinstance(each, str) or each > TOLERANCE]
        wrong += [f"{name} as {kind}" for kind in bad]
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines) - 2} networks, wrong: {', '.join(wrong) or 'none'}")
    return bool(wrong)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
