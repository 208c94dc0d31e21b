"""The contenders on JAX for `peers.py`: cnnjax itself, and the same networks in plain Flax.

cnnjax runs as its experiments do: uint8 images on the device, gathered in a fresh random order,
normalized within the step, which also measures accuracy and norms. Plain Flax gets float32 batches
that are on the device already, and computes the loss alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from workloads import (
    LEARNING_RATE,
    MOMENTUM,
    Images,
    Labels,
    Program,
    Run,
    Task,
    standardize,
)

STEP_A_CALL = ("cnnjax-jit", "cnnjax-lax")
MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bf16": None}


def build(task: Task, image: Images, label: Labels) -> Program:
    """Returns the program of a contender whose name begins with `cnnjax` or `flax`."""
    from cnnjax.devices import backend

    ours = task.contender.startswith("cnnjax")
    if ours:
        backend.start(_num_devices(task), batch_size=task.batch_size)
    import flax
    import jax
    import optax

    compiled_secs = _compiler_clock()
    if task.device == "gpu":
        jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION[task.precision])
    # Times of compilation are those of a first run.
    jax.config.update("jax_enable_compilation_cache", False)
    num_parameters, num_devices, prepare = (_cnnjax if ours else _flax)(task, image, label)
    if task.contender == "cnnjax-lax":
        prepare = _with_lax(prepare)
    return Program(
        num_parameters=num_parameters,
        platform=jax.devices()[0].platform,
        versions={module.__name__: module.__version__ for module in (jax, flax, optax)},
        variants={
            mode: {_form(task, mode, num_devices): functools.partial(prepare, mode)}
            for mode in ("train", "infer")
        },
        compiled_secs=compiled_secs,
    )


def _compiler_clock() -> Callable[[], float]:
    """Returns what tells the seconds in which JAX has traced, lowered or compiled from now on.

    Traces of functions within functions overlap, so moments are counted, not durations added.
    """
    import jax

    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            spans.append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: covered(spans)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _with_lax(prepare: Callable[[str], Run]) -> Callable[[str], Run]:
    """Returns `prepare` whose runs are traced with XLA's own convolutions and pools."""
    from cnnjax import ops

    def prepare_lax(mode: str) -> Run:
        with ops.lowering("lax"):
            run = prepare(mode)

        def run_lax(num_steps: int) -> float:
            with ops.lowering("lax"):
                return run(num_steps)

        return run_lax

    return prepare_lax


def _form(task: Task, mode: str, num_devices: int) -> str:
    looped = mode == "infer" or task.contender in (*STEP_A_CALL, "flax-loop")
    form = "a step a call" if looped else "one call"
    return f"{form}, {num_devices} device{'s' * (num_devices > 1)}"


def _num_devices(task: Task) -> int:
    """Returns the devices to use; 0 is all accelerators, or what suits the CPU."""
    return 0 if task.contender == "cnnjax" else 1


def _dtype(task: Task) -> Any:
    import jax.numpy as jnp

    return jnp.bfloat16 if task.precision == "bf16" else None


def _count(tree: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _cnnjax(task: Task, image: Images, label: Labels) -> tuple[int, int, Callable[[str], Run]]:
    import jax

    from cnnjax import augment as augment_lib
    from cnnjax import data, models, optim, schedules
    from cnnjax.data.dataset import channel_moments
    from cnnjax.devices.sharding import batch_sharding, replicated
    from cnnjax.models.summary import summary
    from cnnjax.tasks.classification import classification
    from cnnjax.train.compile import choose_mesh, compile_train
    from cnnjax.train.evaluate import compile_predict
    from cnnjax.train.predict import make_predict
    from cnnjax.train.state import create_state
    from cnnjax.train.step import make_step

    workload = task.workload
    model = models.create(
        workload.model, num_classes=workload.num_classes, dtype=_dtype(task), **workload.arguments
    )
    macs = task.batch_size * summary(model, workload.image_shape).macs
    mesh = choose_mesh(_num_devices(task), macs)
    mean, std = channel_moments(image)
    normalize = functools.partial(augment_lib.normalize, mean=mean, std=std)
    key = jax.random.key(0)
    first = normalize(jax.numpy.asarray(image[:1]))
    variables = jax.jit(functools.partial(model.init, train=False))(key, first)
    schedule = schedules.constant(LEARNING_RATE, total_steps=1)
    optimizer = optim.make_optimizer("momentum", schedule, momentum=MOMENTUM)

    def prepare(mode: str) -> Run:
        if mode == "infer":
            predict = make_predict(model, classification(10), normalize=normalize)
            predict = compile_predict(predict, mesh)
            placed = jax.device_put(variables, replicated(mesh))
            batches = [
                jax.device_put(
                    {"image": image[start : start + task.batch_size]},
                    batch_sharding(mesh),
                )
                for start in range(0, len(image), task.batch_size)
            ]
            return _inference(functools.partial(predict, placed), batches)
        pipeline = data.ResidentPipeline(
            data.Arrays(image, label),
            task.batch_size,
            seed=0,
            sharding=batch_sharding(mesh),
            replicated=replicated(mesh),
        )
        # A copy, since training donates its state.
        state = create_state(jax.tree.map(jax.numpy.copy, variables), optimizer, key)
        state = jax.device_put(state, replicated(mesh))
        train = compile_train(
            lambda axis_name: make_step(
                model,
                optimizer,
                classification(10),
                schedule=schedule,
                normalize=normalize,
                axis_name=axis_name,
            ),
            state,
            pipeline,
            method="jit" if task.contender in STEP_A_CALL else "auto",
            mesh=mesh,
        )
        first_step = 0

        def run(num_steps: int) -> float:
            nonlocal state, first_step
            ((state, metrics),) = train(state, first_step, [num_steps])
            first_step += num_steps
            jax.block_until_ready(state)
            total, count = metrics["loss"]
            return float(total[-1] / count[-1])

        return run

    return _count(variables["params"]), mesh.size, prepare


def _inference(predict: Callable[[Any], Any], batches: list[Any]) -> Run:
    import jax

    endless = itertools.cycle(batches)

    def run(num_steps: int) -> float:
        jax.block_until_ready([predict(next(endless)) for _ in range(num_steps)])
        return 0.0

    return run


def _flax(task: Task, image: Images, label: Labels) -> tuple[int, int, Callable[[str], Run]]:
    import jax
    import optax

    workload = task.workload
    model = plain_flax_model(workload.model, workload.num_classes, _dtype(task))
    floats = standardize(image)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), floats[:1])
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)

    def step(state: Any, image: jax.Array, label: jax.Array) -> Any:
        params, batch_stats, opt_state, _ = state

        def objective(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                image,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean(), updated.get("batch_stats", batch_stats)

        (loss, batch_stats), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state, loss.astype("float32")

    def prepare(mode: str) -> Run:
        shape = (-1, task.batch_size, *workload.image_shape)
        images, labels = jax.device_put((floats.reshape(shape), label.reshape(shape[:2])))
        if mode == "infer":
            predict = jax.jit(functools.partial(model.apply, train=False))
            return _inference(functools.partial(predict, variables), list(images))
        # A copy, since the step donates its state.
        params, batch_stats = jax.tree.map(
            lambda leaf: leaf.copy(), (variables["params"], variables.get("batch_stats", {}))
        )
        state = params, batch_stats, optimizer.init(params), jax.numpy.float32(0)
        if task.contender == "flax-scan":
            return _in_one_loop(step, state, images, labels)
        return _in_a_python_loop(step, state, list(images), list(labels))

    return _count(variables["params"]), 1, prepare


def _in_a_python_loop(step: Callable, state: Any, images: list, labels: list) -> Run:
    import jax

    jitted = jax.jit(step, donate_argnums=0)
    batches = itertools.cycle(zip(images, labels, strict=True))

    def run(num_steps: int) -> float:
        nonlocal state
        for _ in range(num_steps):
            state = jitted(state, *next(batches))
        jax.block_until_ready(state)
        return float(state[-1])

    return run


def _in_one_loop(step: Callable, state: Any, images: Any, labels: Any) -> Run:
    import jax

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state: Any, images: jax.Array, labels: jax.Array, num_steps: jax.Array) -> Any:
        # What `lax.scan` compiles to, but for any number of steps.
        def body(i: jax.Array, state: Any) -> Any:
            batch = i % len(images)
            return step(state, images[batch], labels[batch])

        return jax.lax.fori_loop(0, num_steps, body, state)

    def run(num_steps: int) -> float:
        nonlocal state
        state = jax.block_until_ready(steps(state, images, labels, num_steps))
        return float(state[-1])

    return run


def plain_flax_model(name: str, num_classes: int, dtype: Any = None) -> Any:
    """Returns the network as a newcomer writes it, with Flax's own layers."""
    from flax import linen as nn

    conv = functools.partial(nn.Conv, dtype=dtype)
    dense = functools.partial(nn.Dense, dtype=dtype)

    class Small(nn.Module):
        """Convolutions with bias, ReLU and 2x2 max pool, then dense layers."""

        widths: tuple[int, ...]
        window: int
        dense_widths: tuple[int, ...]

        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            for width in self.widths:
                x = nn.relu(conv(width, (self.window, self.window), padding="VALID")(x))
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = x.reshape(x.shape[0], -1)
            for width in self.dense_widths:
                x = nn.relu(dense(width)(x))
            return dense(num_classes)(x)

    class ResNet(nn.Module):
        """ResNet v1.5 (arXiv 1512.03385, the stride in the 3x3 convolution)."""

        stage_sizes: tuple[int, ...]
        bottleneck: bool
        small_images: bool

        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            norm = functools.partial(
                nn.BatchNorm,
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=dtype,
            )

            def conv_norm(x: Any, width: int, window: int, stride: int) -> Any:
                padding = [(window // 2, window // 2)] * 2
                x = conv(width, (window, window), stride, padding=padding, use_bias=False)(x)
                return norm()(x)

            def block(x: Any, width: int, stride: int) -> Any:
                if self.bottleneck:
                    y = nn.relu(conv_norm(x, width, 1, 1))
                    y = nn.relu(conv_norm(y, width, 3, stride))
                    y = conv_norm(y, 4 * width, 1, 1)
                else:
                    y = nn.relu(conv_norm(x, width, 3, stride))
                    y = conv_norm(y, width, 3, 1)
                if x.shape != y.shape:
                    x = conv_norm(x, y.shape[-1], 1, stride)
                return nn.relu(x + y)

            if self.small_images:
                x = nn.relu(conv_norm(x, 64, 3, 1))
            else:
                x = nn.relu(conv_norm(x, 64, 7, 2))
                x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
            for stage, depth in enumerate(self.stage_sizes):
                for index in range(depth):
                    x = block(x, 64 * 2**stage, 2 if stage and not index else 1)
            return dense(num_classes)(x.mean(axis=(1, 2)))

    return {
        "lenet5": lambda: Small((6, 16), 5, (120, 84)),
        "cnn_32_64_dense64": lambda: Small((32, 64), 3, (64,)),
        "resnet18": lambda: ResNet((2, 2, 2, 2), bottleneck=False, small_images=True),
        "resnet50": lambda: ResNet((3, 4, 6, 3), bottleneck=True, small_images=False),
    }[name]()
