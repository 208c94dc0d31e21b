"""Convolutions of several branches in training, of one kernel when deployed.

A sum of convolutions, each with its batch normalization, and of a batch normalization of the input
is linear once the statistics are fixed: one convolution with a bias computes the same. Ding et al.
2021, "RepVGG: Making VGG-style ConvNets Great Again" (arXiv 2101.03697), section 3.3; Vasu et al.
2023, "MobileOne" (arXiv 2206.04040), section 3.3; Vasu et al. 2023, "FastViT" (arXiv 2303.14189),
section 3.2.

    deployed, fewer = reparametrize(model, variables)
    deployed.apply(fewer, image)  # equals model.apply(variables, image)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from cnnjax.errors import UserError
from cnnjax.models import blocks
from cnnjax.models.fields import fields, with_fields
from cnnjax.models.layers import Array, Factories
from cnnjax.models.reshaped import input_width

Tree = Mapping[str, Any]
BRANCHES = r"branch\d+|identity"
MIXER = {"mixer", "norm", "layer_scale"}


class BranchedConv(nn.Module):
    """Sum of convolutions with norms, and the norm of the input where that has the same shape.

    Attributes:
      features, strides, groups: of each convolution.
      kernel_sizes: a branch each, `branch1`, `branch2` ...; all odd.
      deployed: whether there is one convolution, `conv`, of the largest kernel and with a bias.
    """

    features: int
    kernel_sizes: Sequence[int]
    layers: Factories
    strides: int = 1
    groups: int = 1
    deployed: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.layers.dtype is not None:
            # Once, not in each branch.
            x = x.astype(self.layers.dtype)
        sizes = {"strides": self.strides, "groups": self.groups}
        if self.deployed:
            kernel_size = max(self.kernel_sizes)
            conv = self.layers.conv(self.features, kernel_size, use_bias=True, name="conv", **sizes)
            return conv(x)
        branch = functools.partial(
            blocks.ConvNorm,
            self.features,
            layers=self.layers,
            strides=self.strides,
            groups=self.groups,
            linear=True,
        )
        branches = [
            branch(size, name=f"branch{number}")(x)
            for number, size in enumerate(self.kernel_sizes, 1)
        ]
        if self.strides == 1 and input_width(x) == self.features:
            branches.append(self.layers.norm(name="identity")(x))
        return sum(branches[1:], start=branches[0])


class BranchedMixer(nn.Module):
    """`x + layer_scale * (mixer(x) - norm(x))`, for each channel by itself (arXiv 2303.14189, 3.2).

    Attributes:
      kernel_size: of `mixer`, a `BranchedConv` with a 1x1 branch; `norm` has the identity alone.
      layer_scale_init: first value of the scales.
      deployed: whether there is one convolution, `conv`.
    """

    kernel_size: int
    layer_scale_init: float
    layers: Factories
    deployed: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        branched = functools.partial(BranchedConv, channels, layers=self.layers, groups=channels)
        if self.deployed:
            conv = self.layers.conv
            return conv(channels, self.kernel_size, groups=channels, use_bias=True, name="conv")(x)
        mixed = branched((self.kernel_size, 1), name="mixer")(x) - branched((), name="norm")(x)
        constant = nn.initializers.constant(self.layer_scale_init)
        scale = self.param("layer_scale", constant, (channels,))
        return x + mixed * scale.astype(mixed.dtype)


def reparametrize(model: nn.Module, variables: Tree) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the deployed form of a model and its variables; evaluation gives the same outputs.

    Sums are computed in float64 and rounded once.

    Args:
      model: one with a field `deployed`, which is False.
      variables: its `params` and `batch_stats`.

    Raises:
      UserError: the model has no such field, is deployed already, or has another norm than batch
        norm, whose statistics alone are fixed in evaluation.
    """
    found = fields(model)
    if "deployed" not in found:
        raise UserError(
            f"{type(model).__name__} has no deployed form: RepVGG, MobileOne and FastViT have."
        )
    if found["deployed"]:
        raise UserError(f"this {type(model).__name__} is deployed already: nothing is left.")
    if not found["norm"].startswith("batch"):
        raise UserError(
            f"norm={found['norm']!r} depends on the image: only batch norm can be folded into a "
            "convolution."
        )
    params, statistics = _fold_tree(
        variables["params"], variables["batch_stats"], found["norm_epsilon"]
    )
    others = {key: tree for key, tree in variables.items() if key not in ("params", "batch_stats")}
    folded = {**others, "params": params}
    return with_fields(model, deployed=True), folded | (
        {"batch_stats": statistics} if statistics else {}
    )


def _fold_tree(params: Tree, statistics: Tree, epsilon: float) -> tuple[dict[str, Any], Tree]:
    """Returns the parameters and the statistics of a module of the deployed form."""
    if all(re.fullmatch(BRANCHES, name) for name in params):
        return _one_convolution(params, *_sum_of_branches(params, statistics, epsilon)), {}
    if params.keys() == MIXER:
        return _one_convolution(params, *_mixer(params, statistics, epsilon)), {}
    folded: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for name, tree in params.items():
        own = statistics.get(name, {})
        if isinstance(tree, Mapping):
            tree, own = _fold_tree(tree, own, epsilon)
        folded[name] = tree
        if own:
            kept[name] = own
    # Those of a norm are beside its parameters, not below them.
    return folded, kept or {name: own for name, own in statistics.items() if name not in params}


def _one_convolution(params: Tree, kernel: np.ndarray, bias: np.ndarray) -> dict[str, Any]:
    dtype = jax.tree.leaves(params)[0].dtype
    return {"conv": {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}}


def _sum_of_branches(
    params: Tree, statistics: Tree, epsilon: float, shape: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel, of the shape of the largest, and the bias of all branches, in float64."""
    kernels = [branch["conv"]["kernel"] for name, branch in params.items() if name != "identity"]
    shape = shape or max((kernel.shape for kernel in kernels), key=lambda shape: shape[0])
    kernel, bias = np.zeros(shape), np.zeros(shape[-1])
    for name, branch in params.items():
        if name == "identity":
            factor, summand = _affine(branch, statistics[name], epsilon)
            own = identity_kernel(shape)
        else:
            factor, summand = _affine(branch["norm"], statistics[name]["norm"], epsilon)
            own = widened(np.asarray(branch["conv"]["kernel"], np.float64), shape[0])
        kernel, bias = kernel + own * factor, bias + summand
    return kernel, bias


def _mixer(params: Tree, statistics: Tree, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel and the bias of a `BranchedMixer`, in float64."""
    kernel, bias = _sum_of_branches(params["mixer"], statistics["mixer"], epsilon)
    less = _sum_of_branches(params["norm"], statistics["norm"], epsilon, kernel.shape)
    scale = np.asarray(params["layer_scale"], np.float64)
    return identity_kernel(kernel.shape) + scale * (kernel - less[0]), scale * (bias - less[1])


def _affine(norm: Tree, statistics: Tree, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns what batch norm multiplies each channel by and adds to it."""
    scale, bias, mean, var = (
        np.asarray(array, np.float64)
        for array in (norm["scale"], norm["bias"], statistics["mean"], statistics["var"])
    )
    factor = scale / np.sqrt(var + epsilon)
    return factor, bias - mean * factor


def identity_kernel(shape: Sequence[int]) -> np.ndarray:
    """Returns the kernel `[height, width, in channels a group, features]` that changes nothing."""
    kernel = np.zeros(shape)
    features = np.arange(shape[3])
    kernel[shape[0] // 2, shape[1] // 2, features % shape[2], features] = 1.0
    return kernel


def widened(kernel: np.ndarray, size: int) -> np.ndarray:
    """Returns a square kernel with zeros around it."""
    margin = (size - kernel.shape[0]) // 2
    return np.pad(kernel, [(margin, margin), (margin, margin), (0, 0), (0, 0)])
