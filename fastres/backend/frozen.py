"""A normalisation by constants that is written as arithmetic, as torchvision's FrozenBatchNorm2d is, and others' are.

    scale = weight * rsqrt(var + eps)
    y = x * scale + (bias - mean * scale)

becomes a call of F.batch_norm in evaluation, which all patterns know, where the four are constants: with a gradient of
theirs, it would be another one. Where no pattern takes it, the arithmetic is written again, so that what stays
PyTorch's is what the user wrote.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from fastres.backend.memory import Memory
from fastres.backend.values import only_user, same_layout, same_sizes, value

_PRODUCTS = (operator.mul, torch.mul, "mul")
_SUMS = (operator.add, torch.add, "add")
_DIFFERENCES = (operator.sub, torch.sub, "sub")
_ROOTS = (torch.rsqrt, "rsqrt")
_SHAPES = (torch.reshape, "reshape", "view")


@dataclass(frozen=True)
class Arithmetic:
    """What a call of F.batch_norm in the graph was: x * scale + shift.

    Attributes:
        tensors: running mean and variance, weight and bias.
        product: the call that multiplies.
        inner: the calls that compute scale and shift out of the tensors.
    """

    x: Node
    scale: Node
    shift: Node
    tensors: tuple[Node, Node, Node, Node]
    eps: float
    product: Node
    inner: frozenset[Node]


def recognise(graph: Graph) -> tuple[dict[Node, Arithmetic], list[tuple[Node, str]]]:
    """Write the arithmetic as calls of F.batch_norm.

    Returns:
        The new calls, and what they were; the last calls of such arithmetic that stays, with the reason.
    """
    found = [(node, arithmetic) for node in graph.nodes if (arithmetic := _arithmetic_of(node)) is not None]
    if not found:
        return {}, []
    memory = Memory(graph)
    reasons = {node: _why_not(node, arithmetic, memory) for node, arithmetic in found}
    new: dict[Node, Arithmetic] = {}
    for node, arithmetic in found:
        if reasons[node] is not None:
            continue
        # Not that of before: it may have been such arithmetic itself.
        (x,) = [factor for factor in arithmetic.product.args if factor is not arithmetic.scale]
        with graph.inserting_before(node):
            arguments = (x, *arithmetic.tensors)
            norm = graph.call_function(F.batch_norm, arguments, {"training": False, "eps": arithmetic.eps})
        norm.meta.update(node.meta)
        node.replace_all_uses_with(norm)
        graph.erase_node(node)
        graph.erase_node(arithmetic.product)
        new[norm] = arithmetic
    return new, [(node, reason) for node, reason in reasons.items() if reason is not None]


def erase_unused(graph: Graph, arithmetic: Iterable[Arithmetic]) -> None:
    """Take out what computed scales and shifts that nobody reads any more."""
    inner = {node for a in arithmetic for node in a.inner}
    for node in [n for n in reversed(graph.nodes) if n in inner]:
        if not node.users:
            graph.erase_node(node)


# --------------------------------------------------------------------------------------------------------- recognising


def _operands(node: Any, targets: tuple[Any, ...]) -> tuple[Any, Any] | None:
    called = isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets
    return (node.args[0], node.args[1]) if called and len(node.args) == 2 and not node.kwargs else None


def _either_way(node: Any, targets: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    operands = _operands(node, targets)
    if operands is not None:
        yield operands
        yield operands[1], operands[0]


def _bare(node: Any) -> Any:
    """What was given another shape."""
    while isinstance(node, Node) and node.target in _SHAPES and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _arithmetic_of(node: Node) -> Arithmetic | None:
    for product, shift in _either_way(node, _SUMS):
        for x, scale in _either_way(product, _PRODUCTS):
            if isinstance(x, Node) and isinstance(scale, Node) and only_user(product) is node:
                constants = _constants_of(scale, shift)
                if constants is not None and all(isinstance(t, Node) for t in constants[0]):
                    tensors, eps = constants
                    return Arithmetic(x, scale, shift, tensors, eps, product, _inner(scale, shift, tensors))
    return None


def _constants_of(scale: Any, shift: Any) -> tuple[tuple[Any, Any, Any, Any], float] | None:
    """((mean, var, weight, bias), eps) of which these are the scale and the shift."""
    difference = _operands(_bare(shift), _DIFFERENCES)
    if difference is None:
        return None
    means = [m for m, s in _either_way(_bare(difference[1]), _PRODUCTS) if _bare(s) is _bare(scale)]
    for weight, root in _either_way(_bare(scale), _PRODUCTS):
        root = _bare(root)
        called = isinstance(root, Node) and root.target in _ROOTS and len(root.args) == 1 and not root.kwargs
        for var, eps in _either_way(_bare(root.args[0]), _SUMS) if called else ():
            if means and isinstance(eps, float):
                mean, bias = means[0], difference[0]
                return (_bare(mean), _bare(var), _bare(weight), _bare(bias)), eps
    return None


def _inner(scale: Node, shift: Node, tensors: tuple[Node, ...]) -> frozenset[Node]:
    found: set[Node] = set()
    ahead = [scale, shift]
    while ahead:
        node = ahead.pop()
        if node not in tensors and node not in found:
            found.add(node)
            ahead += node.all_input_nodes
    return frozenset(found)


# ------------------------------------------------------------------------------------------------------------ checking


def _why_not(node: Node, arithmetic: Arithmetic, memory: Memory) -> str | None:
    """Why the arithmetic is not that of F.batch_norm in evaluation, or not that of the call that we would write."""
    x, y, scale = value(arithmetic.x), value(node), value(arithmetic.scale)
    tensors = [value(t) for t in arithmetic.tensors]
    if x is None or y is None or scale is None or x.dim() < 2:
        return "its input is no tensor that Dynamo knows"
    if any(t is None or t.dtype != x.dtype for t in (y, scale, *tensors)):
        return f"its input is {x.dtype}, its output {y.dtype} and its scale {scale.dtype}"
    if not same_layout(x, y):
        return f"its input has the strides {tuple(x.stride())}, which its output does not keep"
    channels = (x.shape[1],)
    broad = (1, *channels, *(1 for _ in x.shape[2:]))
    if any(t is None or not same_sizes(t.shape, channels) for t in tensors):
        return "its statistics are not one for each channel"
    shapes = [t.shape for n in arithmetic.inner if (t := value(n)) is not None]
    shaped = [value(n) for n in (arithmetic.scale, arithmetic.shift)]
    if not all(same_sizes(shape, channels) or same_sizes(shape, broad) for shape in shapes) or not all(
        t is not None and same_sizes(t.shape, broad) for t in shaped
    ):
        return "its scale and shift are not one for each channel"
    if any(t is not None and t.requires_grad for t in tensors):
        return "its statistics or parameters have gradients"
    first = min(arithmetic.inner, key=memory.position.__getitem__)
    constants = memory.storages([*arithmetic.inner, *arithmetic.tensors])
    if memory.is_written_between(constants, first, node) or memory.is_written_between(
        memory.storages([arithmetic.x]), arithmetic.product, node
    ):
        return "something writes to what it reads before it is done"
    if y.requires_grad and memory.is_written_after(constants, node):
        return "something writes to what backward would read"
    return None
