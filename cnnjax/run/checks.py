"""What is refused, or warned of, before a run trains."""

import dataclasses
import math

from cnnjax.data.streamed import AnyDataset, split_size
from cnnjax.devices import processes
from cnnjax.errors import UserError, unknown_name
from cnnjax.run.groups import LabeledImages, Optimization, Regularization
from cnnjax.run.settings import Settings

# Setting -> least and most; the numbers of `BELOW` are less than that.
RANGES = {
    "seed": (0, 2**32 - 1),
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "stop_after_epochs": (0, math.inf),
    "accumulate": (1, math.inf),
    "join_timeout_secs": (1, math.inf),
    "track_wait_secs": (0, 1e6),
    "learning_rate": (0, math.inf),
    "warmup_epochs": (0, 1e6),
    "ema_decay": (0, 1),
    "label_smoothing": (0, 1),
    "sam": (0, 1e6),
    "l1": (0, 1e6),
    "l2": (0, 1e6),
    "clip_norm": (0, math.inf),
    "recalibrate": (0, math.inf),
    "swa_from_epoch": (0, math.inf),
    "unfreeze_epochs": (0, 1e6),
    "image_size": (0, 10_000),
}
BELOW = ("ema_decay", "label_smoothing")


def check_specs(config: Settings) -> None:
    """Refuses specs that no function takes, before anything takes long; computes nothing."""
    from cnnjax import models, optim, schedules, spec
    from cnnjax.augment import filters, policy
    from cnnjax.data.image_files import parse_fit
    from cnnjax.devices.sharding import parse_rules
    from cnnjax.run.tracking import followers
    from cnnjax.train import profiling

    _check_ranges(config)
    parse_rules(config.sharding)
    followers.check(config.track)
    if config.profile:
        profiling.parse(config.profile)
    if isinstance(config, Optimization):
        if config.optimizer and config.optimizer not in optim.OPTIMIZERS:
            raise unknown_name("optimizer", config.optimizer, optim.OPTIMIZERS)
        schedules.read_schedule(config.schedule, config.schedule_arguments)
    # Of a module that a caller has made, the settings have a description only.
    if hasattr(config, "model_arguments") and (model := getattr(config, "model", "")):
        models.read_model(model, config.model_arguments)
    if isinstance(config, Regularization):
        spec.check(config.augment, policy.NAMES, policy.KIND)
    if isinstance(config, LabeledImages):
        spec.check(config.preprocess, filters.FILTERS, "filter")
        parse_fit(config.fit)


def _check_ranges(config: Settings) -> None:
    """Refuses numbers that no run can have; settings left open have none yet."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    left_open = getattr(type(config), "automatic", ())
    for name, (least, most) in RANGES.items():
        value = getattr(config, name, None)
        if name not in defaults or (name in left_open and value == defaults[name]):
            continue
        whole = isinstance(defaults[name], int)
        if not isinstance(value, (int,) if whole else (int, float)):
            kind = "a whole number" if whole else "a number"
            raise UserError(f"--{name.replace('_', '-')} {value!r}: give {kind}.")
        if not least <= value <= most or (name in BELOW and value == most):
            asked = f"{least} or more" if most == math.inf else f"{least} to {most:,.0f}"
            asked = f"{least} or more, below {most}" if name in BELOW else asked
            raise UserError(f"--{name.replace('_', '-')} {value}: give {asked}.")
    warmup, epochs = getattr(config, "warmup_epochs", 0), config.epochs
    if "warmup_epochs" not in left_open and warmup > epochs:
        raise UserError(f"--warmup-epochs {warmup:g} is more than --epochs {epochs}: give less.")


# What a network learns in fewer steps is next to nothing, whatever the learning rate.
FEW_UPDATES = 50


def check_retention(config: Settings, dataset: AnyDataset) -> None:
    """Raises a UserError unless what is asked to be kept can be, and early stopping can work."""
    for name in ("keep_last", "keep_best", "patience", "save_every_steps", "validate_every_steps"):
        if getattr(config, name) < 0:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(config, name)} is negative: use 0 or more.")
    if config.patience and not config.keep_best:
        raise UserError("--patience keeps the best weights: use --keep-best 1 or more.")
    if config.patience and not split_size(dataset, "validation"):
        raise UserError(
            f"patience {config.patience} stops by the validation {config.monitor or 'score'}, but "
            f"{dataset.name} has no validation images: hold some out, or use patience 0."
        )


def check_length(config: Settings, first_step: int, steps_per_epoch: int) -> None:
    """Refuses a run that has trained for longer than is asked; warns of one that hardly learns."""
    last_step = config.epochs * steps_per_epoch
    if first_step > last_step:
        raise UserError(
            f"{config.run_dir} has trained for {first_step / steps_per_epoch:g} epochs already, "
            f"more than --epochs {config.epochs}: give at least "
            f"{-(-first_step // steps_per_epoch)}, or start a new run."
        )
    if last_step < FEW_UPDATES and not (config.smoke or config.stop_after_epochs):
        processes.say(
            f"note         only {last_step} updates of {config.batch_size} examples: hardly "
            "enough to learn from; give more --epochs."
        )
