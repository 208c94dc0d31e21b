"""What `--help` says of settings that name functions, and what is said of flags that are wrong.

The registries are of functions of arrays: importing them imports JAX, for which help does not wait.
A test holds each text equal to `cnnjax.spec.describe` of its registry.
"""

import dataclasses
import functools
import re
from typing import Annotated, Any, get_type_hints

LISTINGS = {
    "augment": (
        "flip(probability=0.5), shift(max_pixels, fill=None), crop(pixels, fill=0.0), "
        "resized_crop(smallest_area=0.08, largest_area=1.0, aspect=1.3333333333333333), "
        "elastic(strength, deviation=4.0), brightness(strength), contrast(strength), "
        "saturation(strength), hue(max_turns), noise(deviation), salt_and_pepper(probability), "
        "blur(max_deviation), median(probability, size=3), erase(probability, largest_area=0.4, "
        "smallest_area=0.02, aspect=3.3333333333333335), cutout(size, fill=None), "
        "corruption(name, severity=3), randaugment(num_operations=2, magnitude=9.0), "
        "trivialaugment(max_magnitude=30.0), "
        "augmix(severity=3.0, width=3, depth=3), rotate(degrees), scale(change), "
        "translate(pixels), shear(degrees), mixup(alpha), cutmix(alpha)"
    ),
    "fit": "pad, resize, crop(share=0.875), center(resize=256, interpolation=bilinear)",
    "classes": "all, even-odd, only(*classes)",
    "schedule": (
        "constant, step(boundaries=(0.5, 0.75), factor=0.1), exponential(decay_rate=0.01, "
        "decay_steps=None, staircase=False), cosine(end_factor=0.0, cycles=1), "
        "polynomial(power=1.0, end_factor=0.0), one_cycle(peak_fraction=0.3, start_factor=0.04, "
        "end_factor=4e-06)"
    ),
    "preprocess": "gaussian(deviation), mean(size), median(size)",
    "mesh": "mesh(data=1, fsdp=1, model=1)",
    "sharding": "fsdp(dimension), model(dimension)",
    "attack": (
        "fgsm(epsilon), fgsm_l2(epsilon), pgd(epsilon, num_steps=20, restarts=1, step_size=None),"
        " pgd_l2(epsilon, num_steps=20, restarts=1, step_size=None), pgd_margin(epsilon, "
        "num_steps=20, restarts=1, step_size=None), noise(epsilon, tries=1)"
    ),
    "method": (
        "full, head, last(stages), bitfit, norm, lora(rank, norms=False, alpha=8.0, "
        "layers='.*kernel'), adapter(units, norms=False)"
    ),
    "losses": (
        "logits(temperature=4.0, weight=0.9), features(weight=1.0, layers=''), "
        "attention(weight=1000.0, layers='', power=2.0), rkd_distance(weight=25.0, layers=''), "
        "rkd_angle(weight=50.0, layers='')"
    ),
    "tta": "flip, shift(pixels)",
    "optimizer": "sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw, lamb, lion, muon",
    "loss": (
        "softmax_cross_entropy, sigmoid_binary_cross_entropy, one_vs_all_cross_entropy, "
        "mean_squared_error, lenet1998_map"
    ),
}

# What tyro says of a value, and what is meant.
MEANINGS = {
    r"Error parsing (\S+): invalid literal for int\(\) with base \d+: (.*)": (
        r"\1 \2: give a whole number"
    ),
    r"Error parsing (\S+): could not convert string to float: (.*)": r"\1 \2: give a number",
    r"Error parsing (\S+): no type matching \S*INT\S* could be instantiated from \[(.*?)\].*": (
        r"\1 \2: give a whole number"
    ),
    r"Error parsing (\S+): no type matching \S*FLOAT\S* could be instantiated from \[(.*?)\].*": (
        r"\1 \2: give a number"
    ),
    r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*?),?\)": (
        r"\2 \1: give one of \3"
    ),
}


def listed(*names: str) -> dict[str, str]:
    """Returns some of them."""
    return {name: LISTINGS[name] for name in names}


def with_listings(config_type: type) -> Any:
    """Returns the class with the names of its registries behind the help of its settings."""
    import tyro

    listings: dict[str, str] = {}
    for each in reversed(config_type.__mro__):
        listings |= vars(each).get("listings", {})
    if not listings:
        return config_type
    hints = get_type_hints(config_type)
    attributes: dict[str, Any] = {"__annotations__": {}, "__doc__": config_type.__doc__}
    for name, text in listings.items():
        hint = functools.partial("Choices: {} (default: {})".format, text)
        attributes["__annotations__"][name] = Annotated[
            hints[name], tyro.conf.arg(help_behavior_hint=hint)
        ]
        attributes[name] = getattr(config_type, name)
    return dataclasses.dataclass(frozen=True)(
        type(config_type.__name__, (config_type,), attributes)
    )


def one_line(boxed: str) -> str:
    """Returns the sense of one of tyro's boxed messages without its frame and the flags' help."""
    sections: list[list[str]] = [[]]
    for line in boxed.splitlines()[1:]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip("╭╮╰╯│+|")
        if re.fullmatch("[─-]{3,}", text.strip()):
            sections.append([])
        # Deeper than a flag stands what the flag means.
        elif not text.startswith(" " * 9):
            sections[-1].append(text.strip())
    sentences = [" ".join(lines).strip(" .") for lines in sections]
    skipped = ("Argument helptext", "For full helptext")
    kept = [_plain(each) for each in sentences if each and not each.startswith(skipped)]
    return "; ".join(kept) + " (see --help)"


def _plain(sentence: str) -> str:
    """Returns what tyro says of a value that is no number, or no choice, in the words of a user."""
    for pattern, meaning in MEANINGS.items():
        if found := re.fullmatch(pattern, sentence, re.DOTALL):
            return found.expand(meaning)
    return sentence
