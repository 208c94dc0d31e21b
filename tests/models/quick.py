"""Compilation for networks so small that optimizing their program takes longer than running it."""

import functools
from typing import Any

import jax

# `jax.jit` without most of the compiler's optimizations.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def quick_init(model: Any, *arguments: Any, **options: Any) -> Any:
    """Returns `model.init(jax.random.key(0), *arguments, **options)`, compiled as one program."""
    return quick_jit(lambda key: model.init(key, *arguments, **options))(jax.random.key(0))


def quick_apply(model: Any, variables: Any, *arguments: Any, **options: Any) -> Any:
    """Returns `model.apply(variables, *arguments, **options)`, compiled as one program."""
    return quick_jit(lambda variables: model.apply(variables, *arguments, **options))(variables)
