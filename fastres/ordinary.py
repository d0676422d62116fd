"""Whether a call is an ordinary one, which custom operators may serve, or one that asks for PyTorch's own operators."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_functorch_level = torch._C._functorch.peek_interpreter_stack
_mode = torch._C._get_dispatch_mode
_tracing_state = torch._C._get_tracing_state


def why_not_ordinary() -> str | None:
    """Why this call has to be made of PyTorch's own operators, for a message; None where it need not.

    torch.func, forward-mode differentiation and the tracers know the derivative, the batched form or the exported form
    of PyTorch's operators, and of no others. Under torch.compile, and there alone, the operators stay: Dynamo calls
    them in its graph.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # A constant for Dynamo, which then sees nothing of the rest but the transforms that are traced in the graph.
        return "torch.func transforms it" if _functorch_level() is not None else None
    if _functorch_level() is not None:
        return "torch.func transforms it"
    if forward_ad._current_level >= 0:
        return "it is differentiated in forward mode"
    if _mode(_PROXY) is not None or torch._ops._get_dispatch_mode_pre_dispatch(_PROXY) is not None:
        return "make_fx traces it"
    if _tracing_state() is not None:
        return "torch.jit traces it"
    return None
