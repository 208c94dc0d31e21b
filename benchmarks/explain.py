"""Times the methods of `cnnjax.explain`, and captum's on the same network and images.

    python benchmarks/explain.py
    python benchmarks/explain.py --network resnet18 --side 224 --images 8
    python benchmarks/explain.py --network lenet5 --images 500 --classes 10

Weights are drawn at random on both sides. Grad-CAM of all classes of LeNet-5 comes first. With
`--classes N` the maps of the first N classes are computed for each image: here by `vmap`, with one
forward pass, by captum one class after another. A call is measured alone, after one that compiles;
each row is the fastest of several rounds in which both sides take turns. On a busy machine,
`OMP_NUM_THREADS=1 taskset -c 0 python ...` measures one core. Without captum (`pip install
--no-deps captum`, with torch and torchvision) ours are measured alone.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peer_torch

from cnnjax import convert, explain, models
from cnnjax.explain import named

ALL_CLASSES = ("gradient", "integrated_gradients(steps=20)", "grad_cam")
METHODS = (
    "gradient",
    "gradient_times_input",
    "integrated_gradients(steps=20)",
    "guided_backpropagation",
    "grad_cam",
    "occlusion(window=8,stride=4)",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", default="resnet18", help="lenet5, or one of torchvision's with ReLU")
    add("--side", type=int, default=64, help="pixels along a side of the images (64)")
    add("--images", type=int, default=32, help="images in a call (32)")
    add("--classes", type=int, default=0, help="maps of so many classes of each image (0: of one)")
    add("--methods", nargs="*", help="instead of all")
    add("--rounds", type=int, default=5, help="rounds, of which the fastest counts (5)")
    options = parser.parse_args()
    digits(options.rounds)
    compare(options)


def digits(rounds: int) -> None:
    """Prints the time of Grad-CAM of all ten classes of LeNet-5 on 1,000 digits."""
    model = models.create("lenet5", num_classes=10)
    image = jax.random.normal(jax.random.key(0), (1000, 28, 28, 1))
    variables = model.init(jax.random.key(1), image[:1])

    @jax.jit
    def all_classes(variables: Any, image: jax.Array) -> jax.Array:
        def one(label: jax.Array) -> jax.Array:
            return explain.grad_cam(model, variables, image, explain.class_score(label))

        return jax.vmap(one)(jnp.arange(10))

    seconds = fastest({"ours": lambda: all_classes(variables, image)}, rounds)["ours"]
    print(f"Grad-CAM of 10 classes of LeNet-5, 1,000 digits: {seconds:.2f} s\n")


def compare(options: argparse.Namespace) -> None:
    """Prints a row for each method."""
    model = models.create(options.network, num_classes=10)
    shape = (28, 28, 1) if options.network == "lenet5" else (options.side, options.side, 3)
    pixels = np.random.default_rng(0).normal(size=(options.images, *shape)).astype(np.float32)
    image, label = jnp.asarray(pixels), jnp.arange(options.images) % 10
    variables = model.init(jax.random.key(0), image[:1])
    peers = captum_methods(options.network, model, variables, pixels)
    wanted = f"{options.classes} classes" if options.classes else "one class"
    print(f"{options.network}, {options.images} images of {shape[0]} x {shape[1]}, {wanted} each")
    print("| method | images/s | captum, images/s | times as fast |\n|---|---|---|---|")
    methods = options.methods or (ALL_CLASSES if options.classes else METHODS)
    for method in named.read(",".join(methods)):

        @jax.jit
        def ours(variables: Any, image: jax.Array, method: Any = method) -> jax.Array:
            def of_class(label: jax.Array) -> jax.Array:
                target = explain.class_score(label)
                return method(jax.random.key(0), model, variables, image, target)

            if options.classes:
                return jax.vmap(of_class)(jnp.arange(options.classes))
            return of_class(label)

        calls: dict[str, Callable[[], Any]] = {"ours": functools.partial(ours, variables, image)}
        if method.name in peers:
            theirs = peers[method.name]
            classes: list[Any] = [np.full_like(label, each) for each in range(options.classes)]
            classes = classes or [label]
            calls["captum"] = functools.partial(one_by_one, theirs, classes)
        seconds = fastest(calls, options.rounds)
        speed = options.images / seconds["ours"]
        row = f"| {method.text} | {speed:.1f} |"
        if "captum" in seconds:
            peer = options.images / seconds["captum"]
            row += f" {peer:.1f} | {speed / peer:.2f} |"
        print(row, flush=True)


def one_by_one(method: Callable[[Any], Any], classes: list[Any]) -> list[Any]:
    """Calls captum's method for each class (or labels `[images]`)."""
    import torch

    return [method(torch.from_numpy(np.array(each)).long()) for each in classes]


def captum_methods(
    network: str, model: Any, variables: Any, pixels: np.ndarray
) -> dict[str, Callable[[Any], Any]]:
    """Returns captum's methods, `labels -> maps`, by our names.

    They are of torchvision's network with our weights; of LeNet-5 with other random ones.
    """
    if not all(map(importlib.util.find_spec, ("torch", "torchvision", "captum"))):
        return {}
    import torch
    from captum import attr

    small = network == "lenet5"
    make = peer_torch.torch_model if small else peer_torch.torchvision_model
    module = make(network, 10).eval()
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    if not small:
        arrays = convert.from_cnnjax(variables, model, pixels.shape[1:], framework="torchvision")
        module.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    image = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    window = (pixels.shape[-1], 8, 8), (pixels.shape[-1], 4, 4)
    last = [part for part in module.modules() if isinstance(part, torch.nn.Conv2d)][-1]
    return {
        "gradient": lambda target: attr.Saliency(module).attribute(image, target),
        "gradient_times_input": lambda target: attr.InputXGradient(module).attribute(image, target),
        "integrated_gradients": lambda target: attr.IntegratedGradients(module).attribute(
            image, target=target, n_steps=20, internal_batch_size=len(image)
        ),
        "guided_backpropagation": lambda target: attr.GuidedBackprop(module).attribute(
            image, target
        ),
        "grad_cam": lambda target: attr.LayerGradCam(module, last).attribute(image, target),
        "occlusion": lambda target: attr.Occlusion(module).attribute(image, *window, target=target),
    }


def fastest(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the seconds of the fastest round of each, after one that is not counted."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
