"""A head that is whole only within a context (ZeRO-3's): entered around a call, and again around its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import Variable

from hpo_fused.checks import described

WeightContext: TypeAlias = Callable[[], AbstractContextManager[Any]]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _made(weight_context: object) -> AbstractContextManager[Any]:
    """A context manager from the caller's ``weight_context``; TypeError unless that is a callable that makes them."""
    # One that was made already could not be entered twice; those of contextlib can be called, as decorators.
    if not callable(weight_context) or isinstance(weight_context, AbstractContextManager):
        raise TypeError(
            "weight_context: expected a callable that makes a context manager each time it is called, such as lambda: "
            f"deepspeed.zero.GatheredParameters([lm_head.weight]), or None, got {described(weight_context)}"
        )
    context = weight_context()
    if not isinstance(context, AbstractContextManager):
        raise TypeError(
            f"weight_context: expected a callable that returns a context manager, got one that returned "
            f"{described(context)}"
        )
    return context


def within_weight_context(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function``, run within what its keyword argument ``weight_context`` makes, if it is given one."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        weight_context = kwargs.get("weight_context")
        if weight_context is None:
            return function(*args, **kwargs)
        with _made(weight_context):
            return function(*args, **kwargs)

    return call


# Weights that a backward pass holds, as (pass, id). Passes are numbered anew: what a failed one leaves is nobody's.
_held: set[tuple[int, int]] = set()


@contextmanager
def until_accumulated(weight_context: WeightContext | None, weight: Tensor | None, *, needed: bool) -> Iterator[None]:
    """The context around a node's backward; where the head's gradients are ``needed``, until autograd has added them.

    Which may be as late as the end of the pass: a tied head's gradient waits for the embedding's. Another node of the
    pass does not enter for a ``weight`` that is held: DeepSpeed's contexts must not overlap.
    """
    held = torch._C._current_graph_task_id(), id(weight)
    if weight_context is None or held in _held:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_made(weight_context))
        yield
        if needed:
            _held.add(held)
            stack.callback(_held.remove, held)
            Variable._execution_engine.queue_callback(stack.pop_all().close)
