"""Flax's interceptors of layers' calls, which end with their context whatever Python's options."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
from flax.linen import module as linen

Interceptor = Callable[[Callable[..., Any], tuple, dict, nn.module.InterceptorContext], Any]


@contextlib.contextmanager
def intercept_methods(interceptor: Interceptor) -> Iterator[None]:
    """Within the context, `interceptor` is called in place of the methods of modules.

    That is `flax.linen.intercept_methods`. Flax 0.12 ends it by `assert stack.pop() is ...`, which
    `python -O` leaves out: every later call would be intercepted too.
    """
    stack = linen._global_interceptor_stack
    depth = len(stack)
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        while len(stack) > depth:
            stack.pop()


@contextlib.contextmanager
def not_intercepted() -> Iterator[None]:
    """Within the context, no interceptor is called but those that are added in it."""
    stack = linen._global_interceptor_stack
    outer = [stack.pop() for _ in range(len(stack))]
    try:
        yield
    finally:
        while outer:
            stack.push(outer.pop())
