"""Fine-tune any pretrained classifier on any image classification data.

    python -m experiments.mnist_lenet --classes 0,1,2,3,4 --run-dir runs/low
    python -m experiments.finetune --base runs/low --classes 5,6,7,8,9 --labels-per-class 10 \\
        --method lora:4

`--base` is a run, a checkpoint directory, or weights converted by `cnnjax convert`; the
model, image size and normalization are its own. docs/finetune.md says what each method trains.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import jax

import cnnjax
from cnnjax import finetune
from cnnjax.errors import UserError
from cnnjax.models.summary import summary
from cnnjax.run import classifier, settings
from cnnjax.run.help import listed
from cnnjax.run.load import read_base


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """Fine-tune a classifier: validates after each epoch, tests at the end, keeps everything."""

    listings: ClassVar[dict[str, str]] = listed("method")
    # Left open, they are filled in when the data are known.
    automatic: ClassVar = ("epochs", "batch_size", "learning_rate", "warmup_epochs")

    base: str = ""
    """Directory of a run (trained, fine-tuned or converted) or of checkpoints to start from. With
    --smoke and no base, a small one is trained first, in RUN/base."""

    model: str = ""
    """A name that `cnnjax models` lists, or MODULE:NAME; by default the base's. Of the base's own
    network the base's arguments are taken too."""

    image_size: int = 0
    """Height and width that the model gets; 0 takes the base's."""

    preprocess: str = ""
    """A filter of all images, training and test, such as median:3; by default the base's."""

    method: str = "full"
    """What is trained, such as head or lora:4; or scratch: nothing of the base is used but its
    settings."""

    new: tuple[str, ...] = ("head/.*",)
    """Patterns of parameters reinitialized instead of loaded from the base; none keeps all."""

    drop: tuple[str, ...] = ()
    """Patterns of the base's parameters that the model does not have."""

    also_train: tuple[str, ...] = ()
    """Patterns of parameters that are trained besides those of the method."""

    lora_ranks: tuple[str, ...] = ()
    """Ranks of some kernels, before lora's own: PATTERN=RANK, such as 'stage4/.*=16'."""

    lora_alpha: float = 0.0
    """LoRA's change of a kernel is multiplied by alpha / rank; 0: by what the method says."""

    norm_statistics: Literal["auto", "frozen", "batch"] = "auto"
    """Layers of BatchNorm that keep their running statistics and normalize by them: auto, those
    whose scale and bias are frozen; frozen, all; batch, none."""

    layer_decay: float = 1.0
    """Factor of the learning rate for each stage further from the head."""

    unfreeze_epochs: float = 0.0
    """Train the head alone at first, and one more stage every N epochs; 0: all at once."""

    l2_sp: float = 0.0
    """Strength of the pull of parameters to where the base has them (L2-SP)."""

    l2_sp_new: float = 0.01
    """With --l2-sp: strength of the pull of new parameters to 0."""

    labels_per_class: int = 0
    """Train on N images of each class, chosen by the seed; 0: on all."""

    epochs: int = 0
    """Passes over the training images; 0: 10, or as many as make 300 updates."""

    batch_size: int = 0
    """Examples per step, over all devices; 0: 64, or 24 of fewer than 1,000 images."""

    learning_rate: float = 0.0
    """The peak of the schedule; 0: what suits the method, see docs/finetune.md."""

    warmup_epochs: float = -1.0
    """Epochs in which the learning rate rises linearly from 0; -1: a tenth of them."""

    validate_every_steps: int = 30


def main(config: Config) -> int:
    """Fine-tunes and tests one network; returns the exit code."""
    if config.method != "scratch":
        finetune.check_method(config.method)
    few = finetune.defaults.FEW_BATCH
    cnnjax.run.trainer.start(dataclasses.replace(config, batch_size=config.batch_size or few))
    directory = Path(config.base or Path(config.run_dir) / "base")
    if not config.base:
        if not config.smoke:
            raise UserError("no base given: name a run or a checkpoint directory with --base.")
        code = _train_small_base(config, directory)
        if code:
            return code
    base = read_base(directory)
    if not (config.model or base.card):
        raise UserError(f"{base.source} does not say its model: name it with --model.")
    name, given = cnnjax.models.read_model(
        config.model or base.card["model"], config.model_arguments
    )
    size = config.image_size or base.card.get("image_shape", (0,))[0]
    preprocess = config.preprocess or base.card.get("preprocess", "")
    # The run's own settings stay as they were given: the base's are in its metadata.
    like_base = dataclasses.replace(config, image_size=size, preprocess=preprocess)
    dataset = classifier.read_data(like_base)
    if config.labels_per_class:
        dataset = cnnjax.data.few_labels(dataset, config.labels_per_class, seed=config.seed)
    arguments = base.card["arguments"] if name == base.card.get("model") else {}
    model, card = classifier.make_model(like_base, name, arguments | given, dataset)
    config = _filled_in(config, model, dataset)
    like_base = dataclasses.replace(config, image_size=size, preprocess=preprocess)

    scratch, shape = config.method == "scratch", dataset.image_shape
    new = (".*",) if scratch else config.new
    key = cnnjax.rng.stream_key(config.seed, "finetune", 0)
    loaded = finetune.load(base, model, shape, new=new, drop=config.drop, key=key)
    method = finetune.make_method(
        "full" if scratch else config.method,
        model,
        shape,
        also_train=config.also_train,
        lora_ranks=finetune.parse_ranks(config.lora_ranks),
        lora_alpha=config.lora_alpha or None,
        norm_statistics=config.norm_statistics,
    )
    tuned = finetune.FineTuned(model, method)
    variables = finetune.start(tuned, loaded, shape, key)
    pixels = ("mean", "std", "channel_order")
    card |= {name: base.card[name] for name in pixels if name in base.card}
    card["finetune"] = finetune.describe(tuned, variables, base, new=new, drop=config.drop)
    pull = None
    if config.l2_sp:
        pull = finetune.l2_sp(config.l2_sp, config.l2_sp_new)
        variables = finetune.remember_start(variables, loaded.kept)
    cnnjax.devices.processes.say(f"base         {base.source}\n{finetune.format_loaded(loaded)}")
    recipe = classifier.make_recipe(
        like_base,
        dataset,
        tuned,
        card,
        wrap_optimizer=lambda optimizer, total_steps: _by_group(
            config, finetune.layer_groups(model, shape), optimizer, total_steps
        ),
        variables=variables,
        base_checksum=base.checksum,
        pull=pull,
    )
    return cnnjax.run.trainer.train(config, recipe)


def _filled_in(config, model, dataset):
    """Returns the settings with those that are left open as suits the data and the method."""
    num_examples = cnnjax.data.split_size(dataset, "train")
    devices = cnnjax.devices.sharding.count_devices(config.mesh, config.devices)
    batch_size = config.batch_size or finetune.defaults.batch_size(
        num_examples, devices or jax.device_count()
    )
    epochs = config.epochs or finetune.defaults.epochs(num_examples, batch_size)
    size = summary(model, dataset.image_shape).parameters
    rate = finetune.defaults.learning_rate(config.method, config.optimizer, size)
    return dataclasses.replace(
        config,
        batch_size=batch_size,
        epochs=epochs,
        learning_rate=config.learning_rate or rate,
        warmup_epochs=epochs / 10 if config.warmup_epochs < 0 else config.warmup_epochs,
    )


def _by_group(config, groups, optimizer, total_steps):
    """Returns the optimizer with a rate and a beginning for each group of layers."""
    if config.layer_decay != 1:
        optimizer = finetune.layer_wise_decay(optimizer, groups, config.layer_decay)
    if config.unfreeze_epochs:
        steps = round(total_steps / config.epochs * config.unfreeze_epochs)
        optimizer = finetune.gradual_unfreezing(optimizer, groups, steps)
    return optimizer


def _train_small_base(config, directory):
    """Trains a base for a smoke run, on the parity of the labels; returns the exit code."""
    left_open = {name: getattr(classifier.Config, name) for name in Config.automatic}
    of_base = {"model": config.model or classifier.Config.model, "classes": "even-odd", "epochs": 1}
    small = left_open | of_base | {"stop_after_epochs": 0, "plan": False}
    return classifier.train_part(classifier.settings_like(config, **small), directory)


if __name__ == "__main__":
    settings.launch(Config, main)
