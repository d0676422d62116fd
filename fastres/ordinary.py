"""Whether a call is an ordinary one, which custom operators may serve, or one that asks for PyTorch's own operators."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_get_mode = torch._C._get_dispatch_mode
_get_mode_before_dispatch = torch._ops._get_dispatch_mode_pre_dispatch
_get_tracing_state = torch._C._get_tracing_state


def is_transformed() -> bool:
    """Whether a transform of torch.func is under way."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


# torch.compiler.assume_constant_result, which would import the compiler: Dynamo of torch 2.11 does not know that
# function, and what this one says while it traces holds for the graph.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Whether torch.export traces. Dynamo of torch 2.11 takes torch.compiler.is_exporting for True in any graph."""
    return torch.compiler._is_exporting_flag


def why_not_ordinary() -> str | None:
    """Why this call has to be made of PyTorch's own operators, in words for a message; None where it need not be.

    torch.func, forward-mode differentiation and the tracers know the derivative, the batched or the exported form of
    PyTorch's operators, and of no others. Dynamo calls ours in its graph, and so does torch.compile.
    """
    if is_transformed():
        return "torch.func transforms it"
    if torch.compiler.is_compiling():
        return None
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():
        return "gradients are enabled within inference mode, where nothing can be saved for backward"
    if forward_ad._current_level >= 0:
        return "it is differentiated in forward mode"
    if _get_mode(_PROXY) is not None or _get_mode_before_dispatch(_PROXY) is not None:  # type: ignore[no-untyped-call]
        return "make_fx traces it"
    if _get_tracing_state() is not None:
        return "torch.jit traces it"
    return None
