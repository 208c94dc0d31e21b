import jax.numpy as jnp
import pytest

from cnnjax import trees
from cnnjax.errors import UserError

TREE = {
    "stage1": {"conv1": {"kernel": jnp.zeros((3, 3, 1, 2)), "bias": jnp.zeros(2)}},
    "head": {"kernel": jnp.zeros((2, 10)), "bias": jnp.zeros(10)},
}


def test_paths_are_the_names_that_lead_to_a_leaf():
    assert list(trees.named_leaves(TREE)) == [
        "head/bias",
        "head/kernel",
        "stage1/conv1/bias",
        "stage1/conv1/kernel",
    ]
    assert list(trees.named_leaves([1, None, {"a": 2}])) == ["0", "2/a"]


def test_first_match_wins():
    labels = trees.label_by_path(TREE, [("head/.*", 10), (".*/kernel", 1), (".*", 0)])
    assert labels == {
        "stage1": {"conv1": {"kernel": 1, "bias": 0}},
        "head": {"kernel": 10, "bias": 10},
    }


def test_pattern_matches_whole_paths_only():
    with pytest.raises(UserError, match="matches nothing"):
        trees.mask_by_path(TREE, ["head"])


def test_misspelt_pattern_names_the_nearest_path():
    with pytest.raises(UserError, match=r"'head/kernle': did you mean head/kernel"):
        trees.mask_by_path(TREE, ["head/kernle"])


def test_uncovered_leaf_is_an_error():
    with pytest.raises(UserError, match="no pattern matches parameter 'head/bias'"):
        trees.label_by_path(TREE, [(".*/kernel", 1)])


def test_malformed_pattern_says_why():
    with pytest.raises(UserError, match="no regular expression"):
        trees.mask_by_path(TREE, ["(head"])


def test_mask_and_count():
    mask = trees.mask_by_path(TREE, [".*/kernel"])
    assert mask["head"] == {"kernel": True, "bias": False}
    assert trees.count_parameters(TREE) == 18 + 2 + 20 + 10
