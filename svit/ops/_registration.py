"""Registers an operator in `torch.ops.svit`: its schema, and an implementation that lets `_dispatch` choose a backend.

The ops take and return contiguous NHWC maps. An operator's registration.py has its schemas, the shapes of the results,
the gradients and the functions of each backend.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library

from . import _dispatch, triton

LIBRARY = Library("svit", "DEF")
ops = torch.ops.svit


def define(
    schema: str,
    check: Callable[..., None] = lambda *_: None,
    sizes: Callable[..., dict[str, Any]] = lambda *_: {},
    composite: bool = False,
) -> None:
    """Defines an op. Its first argument is the map that the choice depends on, its last is `str? backend`.

    Args:
        schema: of the op, without `backend`.
        check: takes the arguments but `backend`, and raises a ValueError if they do not fit together. Kernels trust
            their arguments.
        sizes: takes the same arguments, and returns what else the choice of a backend depends on.
        composite: whether the op can be made of primitives.
    """
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.rpartition(") -> ")
    LIBRARY.define(f"{name}({arguments}, str? backend=None) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))

    def implementation(*args: Any) -> Any:
        # PyTorch passes no defaults.
        *inputs, backend = args if len(args) > arguments.count(",") + 1 else (*args, None)
        inputs = [a.contiguous() if isinstance(a, Tensor) else a for a in inputs]
        check(*inputs)
        # The first argument has the dtype, device and channels that the choice depends on.
        return _dispatch.run(name, backend, sizes(*inputs), inputs[0], *inputs)

    if composite:
        _dispatch.COMPOSITE_OPS.add(name)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")


def grid(H: int, W: int, cell: list[int]) -> tuple[int, int]:
    return (H + cell[0] - 1) // cell[0], (W + cell[1] - 1) // cell[1]


def refuse_second_derivative(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"svit::{name} has no second derivative; use backend='reference' for double backward")

    return backward


def refuse_gradient(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"svit::{name} is for inference and has no gradient")

    return backward


def flop_formula(op: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: the cost of an op for PyTorch's FlopCounterMode, which knows PyTorch's own operations only.

    A formula counts the products as the counter counts the reference's: a multiply-accumulate is 2 FLOPs, and norms,
    softmax and sums are 0. (A tool that traces a model, such as fvcore, sees the reference's operations.)
    """
    if not triton.available:  # no fused op will run, and PyTorch would warn that Triton is missing
        return lambda formula: formula
    from torch.utils.flop_counter import register_flop_formula

    return register_flop_formula(op)
