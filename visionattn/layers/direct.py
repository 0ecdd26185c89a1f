"""When a layer may leave the plain path of one module after the other."""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

PLAIN = Tensor, nn.Parameter
PRECISE = torch.float32, torch.float64

UNSEEING: set[Callable] = set()
"""Hooks that do nothing in evaluation."""


def is_direct(*tensors: Tensor) -> bool:
    """Whether these may be computed with in pieces, in place and past autograd: eagerly, on a CPU, in full precision,
    and with nobody who traces, transforms or counts what is done.

    Args:
        tensors: inputs and parameters; what is no plain tensor, as those of graphs and shards, is not direct.
    """
    return not torch.compiler.is_compiling() and _is_direct(tensors)  # which compilers need not look into


def _is_direct(tensors: tuple[Tensor, ...]) -> bool:
    for x in tensors:  # in less time than all(): this is asked a hundred times for an image
        if not (type(x) in PLAIN and x.is_cpu and x.dtype in PRECISE):
            return False
    return (
        not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def is_watched(*modules: nn.Module) -> bool:
    """Whether there are hooks that calls of these modules would run, other than those in `UNSEEING`, or forwards that
    somebody has put in place of theirs."""
    if nn_module._has_any_global_hook():
        return True
    return any(
        "forward" in module.__dict__
        or (module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks)
        and any(hook not in UNSEEING for hooks in _HOOKS for hook in getattr(module, hooks).values())
        for module in modules
    )


def in_own_precision(backward: Callable) -> Callable:
    """Decorator of backward passes that hold tensors of one precision, which autocast may be on around."""

    @wraps(backward)
    def precise(ctx, *grads: Tensor):
        if not torch.is_autocast_enabled("cpu"):
            return backward(ctx, *grads)
        with torch.autocast("cpu", enabled=False):
            return backward(ctx, *grads)

    return precise


def replays(grad: Tensor) -> bool:
    """Whether a backward pass has to differentiate the plain computation: its gradients will be differentiated
    themselves, or are those of many outputs at once."""
    batched = torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or batched


def replayed(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `compute(*inputs)` where they are wanted, None elsewhere.

    They are those of aliases, as an input may depend on another one: its gradient is not to be counted here too.
    """
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [x if x is None else x.view_as(x) for x in inputs]
        chosen = [x for x, want in zip(aliases, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(compute(*aliases), chosen, grad, create_graph=create) if chosen else ())
    return tuple(next(found) if want else None for want in wanted)
