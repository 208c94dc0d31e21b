"""Checks that functions of arrays work under JAX's transformations, for whole modules at a time.

A test module keeps a table of cases, one or more for each public function of its module, and
`assert_covered` fails when a public function has none. Static arguments are bound in the case.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of arrays with one set of arguments.

    Attributes:
      name: the public function that it calls; a suffix after a space tells its cases apart.
      function: takes pytrees of arrays only and returns one.
      arguments: pytrees of arrays or numbers.
      differentiable: positions of the arguments with respect to which gradients are compared with
        finite differences; empty where a gradient means nothing.
      eps: the step of these differences, where the default drowns in the rounding of float32.
    """

    name: str
    function: Callable[..., PyTree]
    arguments: tuple[PyTree, ...]
    differentiable: tuple[int, ...] = ()
    eps: float | None = None

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def public_functions(module: ModuleType) -> set[str]:
    """Returns the names of the public functions that the module itself defines."""
    return {
        name
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def assert_covered(module: ModuleType, cases: Iterable[Case], exempt: Iterable[str] = ()) -> None:
    """Fails when a public function has no case, or a case names no public function.

    `exempt` lists functions that take no arrays, and thus have nothing to transform.
    """
    covered = {case.name.split(" ")[0] for case in cases} | set(exempt)
    assert covered == public_functions(module)


def check_transforms(case: Case) -> None:
    """Checks jit (one trace only), vmap, eval_shape and, where it means something, grad."""
    arguments = jax.tree.map(jnp.asarray, case.arguments)
    variants = [jax.tree.map(lambda x, i=i: _variant(x, i), arguments) for i in range(3)]
    traces = []

    def counted(*arguments: PyTree) -> PyTree:
        traces.append(1)
        return case.function(*arguments)

    compiled = jax.jit(counted)
    expected = [compiled(*variant) for variant in variants]
    assert len(traces) == 1, f"{case.name} was traced {len(traces)} times for the same shapes"
    _assert_close(expected[0], case.function(*arguments))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants)
    results = jax.jit(jax.vmap(case.function))(*stacked)
    for index, result in enumerate(expected):
        _assert_close(jax.tree.map(lambda leaf, i=index: np.asarray(leaf)[i], results), result)

    shapes = jax.eval_shape(case.function, *arguments)
    assert _structure(shapes) == _structure(expected[0])
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(expected[0]), strict=True):
        assert shape.shape == jnp.shape(leaf)
        assert shape.dtype == jnp.result_type(leaf)

    if case.differentiable:
        _check_gradients(case)


def _check_gradients(case: Case) -> None:
    with jax.enable_x64(True):
        arguments = [jax.tree.map(_as_float64, argument) for argument in case.arguments]

        def of_differentiable(*chosen: PyTree) -> PyTree:
            chosen_at = dict(zip(case.differentiable, chosen, strict=True))
            return case.function(*(chosen_at.get(i, value) for i, value in enumerate(arguments)))

        chosen = tuple(arguments[position] for position in case.differentiable)
        check_grads(
            jax.jit(of_differentiable),
            chosen,
            order=1,
            modes=["rev"],
            atol=1e-4,
            rtol=1e-4,
            eps=case.eps,
        )


def _as_float64(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _variant(leaf: jax.Array, index: int) -> jax.Array:
    """Other values of the same shape, dtype and range."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, index) if index else leaf
    if leaf.ndim > 0:
        return jnp.roll(leaf, index, axis=0)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf * (1 - index / 8)
    return leaf + jnp.asarray(index, leaf.dtype) if leaf.dtype != bool else leaf


def _assert_close(result: PyTree, expected: PyTree) -> None:
    assert _structure(result) == _structure(expected)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=2e-5, atol=1e-6
        )


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree)
