"""The 3x3 and 1x1 convolutions around a chain, and 3x3 convolutions and those in groups that stand alone.

In training a convolution behind a chain normalises and activates its input itself (the prologue), and one before a
normalisation takes the statistics of its output (the epilogue). In evaluation one before a chain applies the chain to
its output. Which convolutions are worth a kernel of our own is `fastres.ops.algorithms.choose_algorithm`'s to say; and
since those kernels write channels_last, only a convolution whose output is that in PyTorch as well is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.fx import Node

from fastres import functional
from fastres.backend.calls import Conv, conv_of
from fastres.backend.chains import Chain, may_save_residual
from fastres.backend.memory import Memory
from fastres.backend.values import is_channels_last, only_user, value
from fastres.ops.algorithms import choose_algorithm


def why_not_ours(conv: Conv, requested: str, *, followed: bool = False) -> str | None:
    """Why a convolution is left to PyTorch; None where a kernel of ours computes it faster."""
    y, x, weight = (value(n) for n in (conv.node, conv.x, conv.weight))
    assert y is not None and x is not None and weight is not None
    needs_grad = y.requires_grad
    choice = choose_algorithm(conv.problem(needs_grad=needs_grad, followed=followed and not needs_grad), requested)
    if choice.algorithm == "torch":
        return choice.reason
    if conv.stride not in ((1, 1), (2, 2)):
        return f"its stride is {conv.stride}"
    if x.dtype == y.dtype and weight.dtype not in (y.dtype, x.new_empty(0).float().dtype):
        return f"its weight is {weight.dtype}, its input {x.dtype}"
    if not is_channels_last(y):
        return "its output is not in channels_last"
    return None


def with_statistics(conv: Conv) -> Callable[..., functional.Convolved]:
    """The function that computes a convolution in training and measures its output."""
    if conv.groups != 1:
        return functional.grouped_conv2d_with_statistics
    return functional.conv3x3_with_statistics if conv.kernel == 3 else functional.conv1x1_with_statistics


def with_prologue(chain: Chain, memory: Memory, claimed: set[Node], requested: str) -> Chain:
    """The chain with the convolution in training that alone reads its result, where that is one of ours."""
    user = only_user(chain.nodes[-1])
    if not chain.norm.training or chain.residual_norm is not None or user is None:
        return chain
    conv, x = conv_of(user), value(chain.norm.x)
    if isinstance(conv, str) or x is None or conv.x is not chain.nodes[-1] or conv.dtype != x.dtype or x.dim() != 4:
        return chain
    if why_not_ours(conv, requested) is not None:
        return chain
    longer = replace(chain, after=conv)
    if longer.saves_residual and not may_save_residual(longer, memory):
        return chain
    return _where_allowed(longer, chain, memory, claimed)


def with_convolution_before(chain: Chain, memory: Memory, claimed: set[Node], requested: str) -> Chain:
    """The chain with the convolution in evaluation that makes its input for it alone, where that is one of ours."""
    if chain.norm.training or chain.residual_norm is not None or chain.order != "add_act":
        return chain
    conv = conv_of(chain.norm.x, (3,))
    if isinstance(conv, str) or only_user(conv.node) is not chain.norm.node:
        return chain
    y, x = value(conv.node), value(conv.x)
    if y is None or x is None or x.dtype != y.dtype or why_not_ours(conv, requested, followed=True) is not None:
        return chain
    # A bias becomes part of the running mean, which has no gradient.
    if conv.bias is not None and y.requires_grad:
        return chain
    return _where_allowed(replace(chain, before=conv), chain, memory, claimed)


def _where_allowed(longer: Chain, chain: Chain, memory: Memory, claimed: set[Node]) -> Chain:
    return longer if claimed.isdisjoint(longer.own) and memory.may_move(longer.own) else chain
