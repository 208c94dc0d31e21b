"""What a network costs: operations, bytes, memory and time by layer, and limits for a project's CI.

    cnnjax cost resnet18
    cnnjax cost resnet50 --batch-size 32 --precision bfloat16
    cnnjax cost lenet5 --device flops=100G,bandwidth=20G     (peaks of another device, per second)
    cnnjax cost --run RUN --budget flops=1M,params=50K,memory=2MiB,train_memory=20MiB
    cnnjax cost resnet50 --batch-size 128 --precision bfloat16 --tpu v5e:2x2      (without a TPU)
    cnnjax cost resnet18 --lanes                  (what of a TPU's matrix unit its channels fill)
    cnnjax cost --run RUN --input                 (images/s of the run's input, and of its step)
    cnnjax cost resnet18 --json --no-train

Operations are counted in the traced program (a multiplication and an addition are two), bytes as if
each layer were one kernel, and the least time follows from what the device can do, measured in a
second (the roofline). Memory and measured times are those of the compiled programs. With --budget
the exit code is 1 if anything is over its limit: flops, macs and bytes are those of one image,
memory and train_memory the peaks for the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from cnnjax import commands
from cnnjax.errors import UserError

# What a budget may limit.
LIMITS = ("flops", "macs", "bytes", "params", "memory", "train_memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the costs; returns the exit code: 1 if one is over the budget.

    Raises:
      UserError: an unknown flag, model or limit, no such run, or an image that does not fit.
    """
    options = _options(argv)
    from cnnjax.cost import budget, roofline, tpu
    from cnnjax.devices import backend

    limits = budget.parse(options.budget, LIMITS, "--budget") if options.budget else {}
    peaks = None
    if options.device:
        names = ("flops", "bandwidth")
        peaks = roofline.given(budget.parse(options.device, names, "--device"))
    chip = tpu.described(options.tpu)[0] if options.tpu else None
    if chip is not None and peaks is None:
        peaks = tpu.peaks(chip)
    if "train_memory" in limits and options.no_train:
        raise UserError("--no-train leaves out the train_memory that --budget limits: drop one.")
    backend.start(**_devices(options))
    network = _of_run(options) if options.run else _named(options)
    found = _costs(network, options, peaks, chip)
    if options.input:
        found["input"] = _input_rates(options)
    if options.json:
        print(
            json.dumps({**found, "layers": [_as_dict(each) for each in found["layers"]]}, indent=2)
        )
    else:
        _show(network, found)
    over = budget.exceeded(limits, found)
    for line in over:
        print(f"over budget  {line}")
    if limits and not over and not options.json:
        print(f"budget       {options.budget} holds")
    return int(bool(over))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commands.Parser(
        prog="cnnjax cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", help="a model that cnnjax models lists, or MODULE:NAME of a file")
    add("--run", help="instead: the network of a run, with its classes and image size")
    add("--num-classes", type=int, help="classes of the head (default: as published)")
    add(
        "--image-shape",
        type=int,
        nargs=3,
        metavar=("HEIGHT", "WIDTH", "CHANNELS"),
        help="size of the image (default: as published)",
    )
    add("--batch-size", type=int, default=1, help="images at a time (1)")
    add("--precision", help="float32, bfloat16 or float16 (of TPUs bfloat16; of a run, the run's)")
    add("--optimizer", default="adamw", help="of the training step (adamw)")
    add("--no-train", action="store_true", help="leave out the training step, which takes longest")
    add("--device", help="flops=...,bandwidth=... per second, in place of those measured here")
    add("--tpu", help="compile for a chip of this slice, such as v5e:2x2; no TPU is needed")
    add("--lanes", action="store_true", help="name the layers that leave most lanes of a TPU idle")
    add("--input", action="store_true", help="of a run: images/s of its input, and of its step")
    add("--dataset", help="of --input: where the run's data are now, such as folder:NEW")
    add("--data-dir", help="of --input: where tfds datasets are now")
    add("--budget", help=f"NAME=NUMBER,... of {', '.join(LIMITS)}; K, M, G, T, Ki, Mi, Gi, B")
    add("--json", action="store_true", help="print all as JSON")
    options = parser.parse_args(argv)
    if options.model and options.run:
        raise UserError(f"{options.model} and --run {options.run}: give one of the two.")
    if not options.model and not options.run:
        raise UserError("give a model, such as cnnjax cost lenet5, or --run RUN.")
    if options.input and not options.run:
        raise UserError("--input is of a run's data and step: give --run RUN.")
    for flag in ("dataset", "data_dir"):
        if getattr(options, flag) and not options.input:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {getattr(options, flag)}: it is of --input; give that too.")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: give 1 or more.")
    for value in options.image_shape or ():
        if value < 1:
            raise UserError(f"--image-shape {value}: give lengths of 1 or more.")
    if options.num_classes is not None and options.num_classes < 1:
        raise UserError(f"--num-classes {options.num_classes}: give 1 or more.")
    return options


class Network(NamedTuple):
    """A network: name, module, the forms of its variables, image, logits, precision."""

    name: str
    model: Any
    variables: Any
    image_shape: tuple[int, int, int]
    num_outputs: int
    dtype: Any


def _named(options: argparse.Namespace) -> Network:
    import jax.numpy as jnp

    from cnnjax import models
    from cnnjax.models.summary import abstract_variables
    from cnnjax.run import load
    from cnnjax.train.precision import AUTO, compute_dtype

    name, arguments = models.read_model(options.model, ())
    num_classes = options.num_classes or models.canonical_classes(name)
    shape = tuple(options.image_shape or models.input_shape(name))
    asked, platform = options.precision or AUTO, "tpu" if options.tpu else ""
    precision = load.precision_of(name, arguments, asked, platform=platform)
    fields = load.computation(name, arguments, precision=precision)
    model = models.create(name, num_classes=num_classes, **fields)
    dtype = compute_dtype(precision) or jnp.float32
    return Network(name, model, abstract_variables(model, shape), shape, num_classes, dtype)


def _of_run(options: argparse.Namespace) -> Network:
    import jax
    import jax.numpy as jnp

    from cnnjax.run import load
    from cnnjax.train.precision import compute_dtype

    given = {"--num-classes": options.num_classes, "--image-shape": options.image_shape}
    for flag, value in {**given, "--precision": options.precision}.items():
        if value:
            raise UserError(f"{flag} is the run's own: drop it, or name the model without --run.")
    trained = load.load_classifier(options.run)
    card = trained.card
    forms = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), trained.variables
    )
    dtype = compute_dtype(card.get("precision") or "float32") or jnp.float32
    shape = tuple(card["image_shape"])
    return Network(card["model"], trained.model, forms, shape, card["num_outputs"], dtype)


def _costs(network: Network, options: argparse.Namespace, peaks: Any, chip: Any) -> dict[str, Any]:
    """Returns all costs by name; `layers` are those of the batch, in the order of computation.

    `chip` is the device that is compiled for, where it is not there.
    """
    import jax
    import jax.numpy as jnp

    from cnnjax import optim, trees
    from cnnjax.cost import compiled, operations, roofline, tpu
    from cnnjax.devices import backend

    if options.optimizer not in optim.OPTIMIZERS:
        from cnnjax.errors import unknown_name

        raise unknown_name("optimizer", options.optimizer, optim.OPTIMIZERS)
    image = jax.ShapeDtypeStruct((options.batch_size, *network.image_shape), jnp.float32)
    model, variables = network.model, network.variables
    layers = operations.layer_costs(
        lambda variables, image: model.apply(variables, image, train=False), variables, image
    )
    all_flops, moved = operations.total(layers)
    placed = (lambda tree: tree) if chip is None else (lambda tree: tpu.on(tree, chip))
    program = compiled.inference(model, placed(variables), placed(image))
    inference = compiled.read(program)
    if peaks is None:
        peaks = roofline.measure(network.dtype)
    found: dict[str, Any] = {
        "model": network.name,
        "device": backend.describe() if chip is None else f"1 x {chip.device_kind} (described)",
        "image_shape": network.image_shape,
        "batch_size": options.batch_size,
        "flops": all_flops / options.batch_size,
        "macs": sum(each.products for each in layers) / 2 / options.batch_size,
        "bytes": moved / options.batch_size,
        "params": trees.count_parameters(variables["params"]),
        "memory": inference.peak,
        "inference": dataclasses.asdict(inference),
        "roofline": dataclasses.asdict(peaks),
        "least_secs": sum(peaks.seconds(each) for each in layers),
        "layers": layers,
    }
    if not options.device and chip is None:
        found["measured_secs"] = compiled.seconds(program, (variables, image))
    if not options.no_train:
        step, forms = compiled.training_step(
            model, variables, image, num_outputs=network.num_outputs, optimizer=options.optimizer
        )
        train = compiled.training(step, *placed(forms))
        training = compiled.read(train)
        found["train_memory"], found["training"] = training.peak, dataclasses.asdict(training)
        found["train_flops"] = operations.total(operations.layer_costs(step, *forms))[0]
    if options.lanes or "tpu" in (jax.default_backend(), getattr(chip, "platform", "")):
        padded = tpu.padded_layers(variables["params"], layers)
        found["padded"] = [each._asdict() for each in padded]
    return found


def _devices(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the devices to compute on: one; of a run's input, those that the run has."""
    if not options.input:
        return {"devices": 1}
    from cnnjax.run import again

    settings = again.settings_of_run(options.run)
    batch_size = settings.batch_size // settings.accumulate
    return {"devices": settings.devices, "mesh": settings.mesh, "batch_size": batch_size}


def _input_rates(options: argparse.Namespace) -> dict[str, Any]:
    """Measures a run's pipeline and its training step."""
    from pathlib import Path

    import jax

    from cnnjax.data import ResidentPipeline
    from cnnjax.devices import sharding
    from cnnjax.run import again, classifier, load, trainer
    from cnnjax.run import state as states
    from cnnjax.train import feeding

    directory, settings = Path(options.run), again.settings_of_run(options.run)
    data = again.data_of_run(
        directory, dataset=options.dataset or "", data_dir=options.data_dir or ""
    )
    trained = load.load_classifier(directory)
    recipe = classifier.make_recipe(settings, data, trained.model, trained.card)
    mesh = sharding.make_mesh(settings.mesh or settings.devices or None)
    state = states.initial_state(recipe, settings.seed, trained.variables)
    pipeline = trainer.make_pipeline(data, settings, mesh)
    rates = feeding.measure(
        recipe.step_maker(),
        jax.device_put(state, sharding.state_shardings(state, mesh)),
        pipeline,
        mesh=mesh,
        streamed=not isinstance(pipeline, ResidentPipeline),
    )
    return {**dataclasses.asdict(rates), "text": str(rates)}


def _as_dict(layer: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(layer), "operations": layer.operations}


def _show(network: Network, found: dict[str, Any]) -> None:
    from cnnjax.cost import roofline, table, tpu

    peaks = roofline.Roofline(**found["roofline"])
    height, width, channels = network.image_shape
    batch = found["batch_size"]
    print(
        f"{network.name}: {batch} image{'s' * (batch > 1)} of {height}x{width}x{channels} on "
        f"{found['device']}\n"
    )
    print(table.table(found["layers"], peaks))
    print(
        f"\nan image     {found['flops']:,.0f} FLOP ({found['macs']:,.0f} multiply-accumulates), "
        f"{found['bytes']:,.0f} bytes\nparameters   {found['params']:,}"
    )
    print(
        f"device       {peaks.operations_per_sec / 1e9:,.1f} GFLOP/s, "
        f"{peaks.bytes_per_sec / 1e9:,.1f} GB/s ({peaks.source}): bound by memory below "
        f"{peaks.ridge:,.1f} FLOP/byte"
    )
    least = f"at least {1e3 * found['least_secs']:,.3f} ms"
    if "measured_secs" in found:
        fraction = found["least_secs"] / found["measured_secs"]
        measured = f"measured {1e3 * found['measured_secs']:,.3f} ms"
        least += f", {measured}: {fraction:.0%} of the roofline"
        if fraction > 1:
            least += " (its arrays stay in the caches, which are faster than the memory)"
    print(f"inference    {least}")
    inference = found["inference"]
    print(
        f"memory       {_megabytes(found['memory'])} at the peak of inference, "
        f"{_megabytes(inference['temporary'])} of it activations and workspace"
    )
    if "training" in found:
        print(
            f"training     {_megabytes(found['train_memory'])} at the peak of a step, "
            f"{_megabytes(found['training']['temporary'])} of it activations, gradients and "
            f"workspace; {found['train_flops'] / 1e6:,.3f} MFLOP"
        )
    if "padded" in found:
        layers = [tpu.Padded(**each) for each in found["padded"]]
        print(f"TPU lanes    {tpu.describe_padded(layers)}")
    if "input" in found:
        print(f"input        {found['input']['text']}")
    if inference["operations"]:
        print(
            f"XLA counts   {inference['operations'] / 1e6:,.3f} MFLOP and "
            f"{(inference['bytes_accessed'] or 0) / 1e6:,.3f} MB of inference, without calls of "
            "libraries"
        )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f} MB"
