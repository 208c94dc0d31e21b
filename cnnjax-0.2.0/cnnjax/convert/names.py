"""The names that another framework gives to a model's leaves, as a table.

A table is a list of rules: a regular expression over our path, and a template for theirs. All
variants of a family share one; what differs between them, such as the running number of a block, is
counted from the model's own paths and filled into the template.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from cnnjax import trees
from cnnjax.convert import layouts
from cnnjax.convert.layouts import Layout, Shape
from cnnjax.errors import UserError
from cnnjax.models.fields import fields
from cnnjax.models.summary import abstract_variables

# A block of a stage, at the beginning of a path; the groups are numbers for the template.
BLOCK = r"stage(?P<stage>\d+)/block(?P<block>\d+)/"
# What stands in a `flattened` table for the input image instead of a convolution.
IMAGE = "image"
# The parts of a block that other frameworks number, in the order of computation.
PARTS = ("expand", "depthwise", "se", "project")


@dataclasses.dataclass(frozen=True)
class Names:
    """How a framework names and lays out the leaves of one model.

    Attributes:
      framework: its name, for messages.
      rules: (pattern, template) in order of precedence; the pattern is matched against a whole
        path without its collection. Against the path of a leaf: the template is the tensor's whole
        name. Otherwise against the path of the layer: `separator` and the leaf's name follow it.
        Templates are filled with the pattern's named groups and, where these have `stage` and
        `block`, with `stage0` and `block0` (counted from 0), `index` and `index0` (the block's
        number in the network, from 1 and from 0), `after` (the number of blocks, plus 1), `part`
        (the place of the block's part among `PARTS`, from 0) and `part1` (the next).
      exact: the path of a leaf or layer -> its name; looked up before the rules.
      leaves: our name of a leaf -> theirs.
      kinds: (pattern, layout) for leaves whose layout does not follow from name and rank.
      by_rank: (leaf, rank) -> layout; other leaves are laid out as ours.
      flattened: dense layer behind a flattened image -> the convolution (or `IMAGE`) whose channels
        that image has.
      stages: the name under which the model sows a stage -> the module that ends it over there.
      ignored: pattern of tensors that hold no weights.
      counters: (leaf, counter): with each tensor named `leaf`, an integer zero named `counter` is
        written, which the framework expects.
      separator: between the names of modules and leaves.
      requires: fields of the model and the values at which it computes what the network does over
        there, where its leaves do not tell.
      channels_first: whether images are `[batch, channels, height, width]` there.
      constants: tensors without weights that the framework expects: the name and, from the number
        of the image's channels, the value.
      layers: their layers in the order in which tensors are written, where that matters.
      own_paths: where no rule matches, the layer's own path with `separator` is its name.
    """

    framework: str
    rules: Sequence[tuple[str, str]]
    leaves: Mapping[str, str]
    exact: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kinds: Sequence[tuple[str, Layout]] = ()
    by_rank: Mapping[tuple[str, int], Layout] = dataclasses.field(default_factory=dict)
    flattened: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: str = r"(?!)"
    counters: tuple[str, str] | None = None
    separator: str = "."
    requires: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channels_first: bool = False
    constants: Mapping[str, Callable[[int], np.ndarray]] = dataclasses.field(default_factory=dict)
    layers: Sequence[str] = ()
    own_paths: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of ours and the tensor that holds it in the other framework.

    Attributes:
      path: of the leaf, with its collection, such as `params/stage1/block1/conv1/kernel`.
      shape: of the leaf.
      dtype: of the leaf.
      name: of the tensor.
      their_shape: of the tensor.
      layout: between the two.
    """

    path: str
    shape: Shape
    dtype: Any
    name: str
    their_shape: Shape
    layout: Layout


def entries(model: nn.Module, image_shape: Sequence[int], names: Names) -> list[Entry]:
    """Returns one entry for each leaf of the model's variables; nothing is computed.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      image_shape: `[height, width, channels]` of its images.
      names: the other framework's.

    Raises:
      UserError: a leaf has no name in the framework, or two have the same, or a field of the model
        is not as `names` requires.
    """
    _check_fields(model, names)
    leaves = trees.named_leaves(abstract_variables(model, image_shape))
    translate = functools.partial(_translate, names, _numbers(leaves))
    found: list[Entry] = []
    for path, leaf in leaves.items():
        layout = _layout(names, path, leaf, leaves, image_shape)
        name, shape = translate(_without_collection(path)), tuple(leaf.shape)
        found.append(Entry(path, shape, leaf.dtype, name, layout.their_shape(shape), layout))
    _refuse_duplicates(found, names.framework)
    return found


def _check_fields(model: nn.Module, names: Names) -> None:
    values = fields(model)
    wrong = {field: value for field, value in names.requires.items() if values[field] != value}
    if wrong:
        there = ", ".join(f"{field}={value}" for field, value in wrong.items())
        here = ", ".join(f"{field}={values[field]}" for field in wrong)
        raise UserError(
            f"{names.framework}'s {type(model).__name__} has {there}, and this model {here}: build "
            f"it with {there}."
        )


def _without_collection(path: str) -> str:
    return path.partition("/")[2]


def _numbers(paths: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Returns, for each (stage, block), what templates may ask about it."""
    parts: dict[tuple[int, int], set[str]] = {}
    for path in paths:
        match = re.match(BLOCK + r"(?P<part>\w+)", _without_collection(path))
        if match:
            key = int(match["stage"]), int(match["block"])
            parts.setdefault(key, set()).add(match["part"])
    return {
        (stage, block): {
            "stage0": stage - 1,
            "block0": block - 1,
            "index": index,
            "index0": index - 1,
            "after": len(parts) + 1,
            "parts": [part for part in PARTS if part in parts[stage, block]],
        }
        for index, (stage, block) in enumerate(sorted(parts), 1)
    }


def _translate(names: Names, numbers: Mapping[tuple[int, int], Mapping], path: str) -> str:
    """Returns the tensor's name for our leaf at `path`."""
    layer, _, leaf = path.rpartition("/")
    last = names.separator + names.leaves.get(leaf, leaf)
    texts = ((path, ""), (layer, last))
    for text, suffix in texts:
        if text in names.exact:
            return names.exact[text] + suffix
    for pattern, template in names.rules:
        for text, suffix in texts:
            match = re.fullmatch(pattern, text)
            if match:
                return template.format(**_fields(match, numbers)) + suffix
    if names.own_paths:
        return layer.replace("/", names.separator) + last
    raise UserError(
        f"the leaf {path} has no name in {names.framework}: the model differs from the one that "
        "is published there (check its arguments, such as stem and norm)."
    )


def _fields(match: re.Match, numbers: Mapping[tuple[int, int], Mapping]) -> dict[str, Any]:
    groups = match.groupdict()
    fields: dict[str, Any] = dict(groups)
    if "stage" in groups and "block" in groups:
        fields |= numbers[int(groups["stage"]), int(groups["block"])]
        part = re.match(BLOCK + r"(?P<part>\w+)", match.string)
        if part and part["part"] in fields["parts"]:
            fields["part"] = fields["parts"].index(part["part"])
            fields["part1"] = fields["part"] + 1
    elif numbers:
        fields["after"] = len(numbers) + 1
    return fields


def _layout(
    names: Names, path: str, leaf: Any, leaves: Mapping[str, Any], image_shape: Sequence[int]
) -> Layout:
    inner = _without_collection(path)
    layer, _, name = inner.rpartition("/")
    if name == "kernel" and layer in names.flattened:
        source = names.flattened[layer]
        channels = (
            image_shape[-1] if source == IMAGE else leaves[f"params/{source}/kernel"].shape[-1]
        )
        return layouts.flattened(channels)
    for pattern, layout in names.kinds:
        if re.fullmatch(pattern, inner):
            return layout
    rank = len(leaf.shape)
    return names.by_rank.get((name, rank), layouts.unchanged(rank))


def _refuse_duplicates(found: Sequence[Entry], framework: str) -> None:
    first: dict[str, str] = {}
    for entry in found:
        if entry.name in first:
            raise UserError(
                f"{first[entry.name]} and {entry.path} would both be {framework}'s {entry.name}: "
                "mend the rules."
            )
        first[entry.name] = entry.path
