"""Named leaves of a pytree, and the one language that selects parameters by path.

A leaf's path is the slash-joined names that lead to it, such as `stage1/block2/conv1/kernel`.
A pattern is a regular expression matched against a whole path; in a list of patterns the first
match wins, and a pattern that matches no path at all is an error, because it is a spelling
mistake far more often than a wish.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from cnnjax.errors import UserError, unknown_name

PyTree = Any
REQUIRED = object()


def _path_text(key_path: tuple) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns `{path: leaf}` in the tree's own order. `None` is no leaf, as elsewhere in JAX.

    >>> named_leaves({"conv1": {"kernel": 1, "bias": 2}})
    {'conv1/bias': 2, 'conv1/kernel': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path_text(key_path): leaf for key_path, leaf in leaves}


def from_named_leaves(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts whose `named_leaves` are these: its inverse for nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree


def label_by_path(
    tree: PyTree,
    rules: Sequence[tuple[str, Any]],
    default: Any = REQUIRED,
    *,
    kind: str = "parameter",
) -> PyTree:
    """Replaces each leaf by the value of the first rule whose pattern matches its path.

    Args:
      tree: any pytree.
      rules: pairs (pattern, value), in order of precedence.
      default: the value of leaves that no rule matches; without it they are an error.
      kind: what the leaves are called in messages.

    Returns:
      A tree of the same structure whose leaves are the rules' values.

    Raises:
      UserError: a pattern matches no path or is no regular expression, or (without `default`) a
        path is matched by no pattern.
    """
    paths = list(named_leaves(tree))
    compiled = [(_compile(pattern, kind), value) for pattern, value in rules]
    for pattern, _ in compiled:
        if not any(pattern.fullmatch(path) for path in paths):
            raise unknown_name(f"{kind} pattern (it matches nothing)", pattern.pattern, paths)

    def label(key_path: tuple, _: Any) -> Any:
        path = _path_text(key_path)
        for pattern, value in compiled:
            if pattern.fullmatch(path):
                return value
        if default is REQUIRED:
            raise UserError(f"no pattern matches {kind} {path!r}: add one, or '.*' as the last.")
        return default

    return jax.tree_util.tree_map_with_path(label, tree)


def mask_by_path(tree: PyTree, patterns: Sequence[str], *, kind: str = "parameter") -> PyTree:
    """Returns the tree of booleans that says which leaves any of the patterns matches."""
    rules = [(pattern, True) for pattern in patterns]
    return label_by_path(tree, rules, default=False, kind=kind)


def count_parameters(tree: PyTree) -> int:
    """Returns the number of scalars in all leaves (arrays or `jax.ShapeDtypeStruct`s)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _compile(pattern: str, kind: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{kind} pattern {pattern!r} is no regular expression: {error}") from None
