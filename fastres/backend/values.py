"""What is known of a node of Dynamo's graph: its fake tensor, its arguments by name, who reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true


def value(node: Any) -> Tensor | None:
    """The fake tensor that Dynamo computed there; None where it is no tensor, or one that a transform of torch.func
    wrapped: that has neither a storage nor, under vmap, the shape that is computed.
    """
    found = node.meta.get("example_value") if isinstance(node, Node) else None
    return found if isinstance(found, Tensor) and not is_transformed(node) else None


def is_transformed(node: Any) -> bool:
    """Whether the value is a tensor that a transform of torch.func (grad, vmap, jvp) wrapped."""
    found = node.meta.get("example_value") if isinstance(node, Node) else None
    return isinstance(found, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(found)


def same_sizes(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes, or strides, are equal for all the sizes that the graph serves."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(x is y or statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, strides, dtype and device."""
    alike = a.dtype == b.dtype and a.device == b.device
    return alike and same_sizes(a.shape, b.shape) and same_sizes(a.stride(), b.stride())


def _dense_strides(sizes: Sequence[Any]) -> list[Any]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def is_contiguous(t: Tensor) -> bool:
    """Whether a tensor is contiguous, axes of size 1 included, for all the sizes that the graph serves."""
    return same_sizes(t.stride(), _dense_strides(t.shape))


def is_channels_last(t: Tensor) -> bool:
    """Whether [N, C, H, W] lies in channels_last, or [N, C, D, H, W] in channels_last_3d, for all the sizes that the
    graph serves.
    """
    (n, c, *sizes), (along_n, along_c, *strides) = t.shape, t.stride()
    return same_sizes((along_n, *strides, along_c), _dense_strides((n, *sizes, c)))


def has_layout_of_norm(t: Tensor) -> bool:
    """Whether PyTorch's batch normalisation keeps a tensor's strides, which Dynamo always says. It writes what is both
    contiguous and channels_last with the strides of the one, and what is neither as well.
    """
    if is_contiguous(t):
        return True
    ambiguous = same_sizes(t.shape[1:2], (1,)) or same_sizes(t.shape[2:], [1] * (t.dim() - 2))
    return t.dim() >= 4 and not ambiguous and is_channels_last(t)


def hint(size: Any) -> int:
    """The size that Dynamo saw, where it stands for a range of them; 0 for one that depends on data."""
    if isinstance(size, torch.SymInt):
        seen = size.node.hint
        return 0 if seen is None else int(seen)
    return int(size)


def depends_on_data(t: Tensor) -> bool:
    """Whether its shape has sizes of which nothing is known before the graph runs, as those of x[x > 0]."""
    return bool(free_unbacked_symbols(t.shape))


def elements(t: Tensor) -> int:
    """The number of elements that Dynamo saw."""
    count = 1
    for size in t.shape:
        count *= hint(size)
    return count


def bind(node: Node, signature: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name; `signature` has torch's names in torch's order, with their defaults."""
    return {**signature, **dict(zip(signature, node.args, strict=False)), **node.kwargs}


def only_user(node: Node) -> Node | None:
    """The one call that reads the node, and reads it once, as an argument of its own; None where there is more."""
    user = next(iter(node.users), None)
    if user is None or len(node.users) != 1 or user.op == "output":
        return None
    return user if [*user.args, *user.kwargs.values()].count(node) == 1 else None
