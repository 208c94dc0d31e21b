"""Layers by the names under which JAX keeps their operations, in programs and in profiles."""

from __future__ import annotations

import re

# Transformations that JAX writes around the scopes they were applied to.
_WRAPPER = re.compile(r"^([\w.<>-]+)\((.*)\)$")
# Scopes of what calls the network, and of JAX's own functions.
_CALLS = ("jit", "pjit", "pmap", "shard_map", "xmap")
_INNER = ("while", "body", "cond", "closed_call", "checkpoint", "remat", "scan", "vmap")
_BRANCH = re.compile(r"branch_\d+_fun|rematted_computation")


def layer_of(scope: str, root: str = "") -> tuple[str, bool]:
    """Returns the layer of a scope, and whether it is of the backward pass.

        layer_of("jit(step)/transpose(jvp(ResNet))/stage1/block1/conv1")
        ("stage1/block1/conv1", True)

    The first name that is not a call's is the network's class, which is left out, and so are the
    methods that Flax names as `Class.method`. "" is the network itself, or nothing of it.

    Args:
      scope: names and calls, outermost first.
      root: the network's class, if only its scopes are layers; "" takes any.
    """
    backward, names = False, list[str]()
    for part in _split(scope):
        plain, transforms = _unwrapped(part)
        if transforms and transforms[0] in _CALLS:
            continue
        backward |= "transpose" in transforms
        if not plain or "." in plain or plain in (*_CALLS, *_INNER) or _BRANCH.fullmatch(plain):
            continue
        names.append(plain)
    if root and names[:1] != [root]:
        return "", backward
    return "/".join(names[1:]), backward


def _unwrapped(part: str) -> tuple[str, list[str]]:
    transforms = []
    while found := _WRAPPER.match(part):
        transforms.append(found[1])
        part = found[2]
    return part, transforms


def _split(scope: str) -> list[str]:
    """Splits at the slashes that are in no parentheses."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(scope):
        depth += (character == "(") - (character == ")")
        if character == "/" and depth == 0:
            parts.append(scope[start:place])
            start = place + 1
    return [*parts, scope[start:]]
