"""Channels_last inside a network that is kept in NCHW, where its convolutions gain by it.

Our convolutions read and write channels_last, and PyTorch's in NCHW copy what they read and write to a format of their
own. A region of calls that give the same in every memory format is computed in channels_last: what comes in is copied
once, and whoever reads a value from outside reads a copy in NCHW, so the strides of outputs, and of all that the
network looks at, are those of eager. Right whatever format the calls inside choose; the region is only worth its copies
where enough convolutions are in it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from fastres.backend.calls import ADDITIONS, CONV, activation_of, conv_of, is_conv, is_norm
from fastres.backend.memory import Memory
from fastres.backend.values import bind, elements, hint, is_contiguous, same_sizes, value
from fastres.ops.algorithms import choose_algorithm

_ANY_FORMAT = (
    *ADDITIONS, torch.conv2d, torch.conv_transpose2d, F.batch_norm, F.max_pool2d, F.avg_pool2d, F.interpolate,
    torch.cat, operator.mul, operator.imul, "mul", "mul_", torch.sigmoid, F.sigmoid, F.hardsigmoid, F.relu,
)  # fmt: skip
# Floating-point operations, as `fastres.ops.algorithms` counts them, that the copy of an element costs, there and back,
# and the two calls of a copy; those that PyTorch's convolution in NCHW spends on each element of its input and output
# to have it in another format, of nine networks of timm's at 160 pixels 32 to 331 with a median of 223; and the share
# of a direct convolution's that Winograd's saves.
_COPY_COST = 400
_CALLS_COST = 2_000_000
_REORDER_COST = 150
_SAVED = 0.3
# With fewer inputs than a vector has elements, oneDNN writes past its own memory in channels_last, where it computes
# the gradient of the weight of a strided 1x1 convolution (https://github.com/uxlfoundation/oneDNN/issues/6035).
_FEWEST_INPUTS_OF_STRIDED = 16


def _is_nchw(node: Any) -> bool:
    """Whether a value is a batch of images in NCHW, and not in channels_last as well."""
    t = value(node)
    if t is None or t.dim() != 4 or t.device.type != "cpu":
        return False
    return is_contiguous(t) and not same_sizes(t.shape[2:], (1, 1))


_ADAPTIVE_POOL = {"input": None, "output_size": None}


def _is_global_pool(node: Node) -> bool:
    if node.target is not F.adaptive_avg_pool2d:
        return False
    return bind(node, _ADAPTIVE_POOL)["output_size"] in (1, (1, 1), [1, 1])


def _reads_any_format(node: Node) -> bool:
    """Whether a call reads images of either format and gives their means over both axes, which have none."""
    if "out" in node.kwargs:
        return False
    if _is_global_pool(node):
        return True
    if node.target not in (torch.mean, "mean"):
        return False
    axes = bind(node, {"input": None, "dim": None, "keepdim": False, "dtype": None})["dim"]
    return isinstance(axes, (tuple, list)) and sorted(a % 4 for a in axes if isinstance(a, int)) == [2, 3]


def _is_wrong_in_channels_last(node: Node) -> bool:
    """Whether it is a convolution that PyTorch's own kernels for channels_last cannot be trusted with."""
    if not is_conv(node):
        return False
    given = bind(node, CONV)
    weight, stride = value(given["weight"]), given["stride"]
    if weight is None or not same_sizes(weight.shape[2:], (1, 1)) or stride in (1, (1, 1), [1, 1]):
        return False
    return hint(weight.shape[1]) < _FEWEST_INPUTS_OF_STRIDED


def _candidates(memory: Memory) -> set[Node]:
    """Calls whose result may be in either format, and whose memory nobody outside knows under another name."""
    found = {
        node
        for node in memory.nodes
        if node.op in ("call_function", "call_method")
        and _is_nchw(node)
        and (node.target in _ANY_FORMAT or activation_of(node) is not None)
        and not _is_wrong_in_channels_last(node)
    }
    while True:
        outside = {node for node in found if not _is_inside(node, found, memory)}
        if not outside:
            return found
        found -= outside


def _is_inside(node: Node, members: set[Node], memory: Memory) -> bool:
    """Whether all that writes to the node's memory, and where it is written all that shares it, are members too."""
    if not is_norm(node) and memory.writes(node) - memory.storages([node]):
        return False
    if not memory.is_made_here(memory.sharing(node)[0]):
        return False
    # Behind a switch of modes, without gradients, a view has its base's requires_grad, and a copy of the base has none.
    views = [user for user in memory.sharing(node) if node in user.all_input_nodes and user not in members]
    if any(memory.is_written_between(frozenset(), node, view) for view in views):
        return False
    storages = memory.storages([node])
    writers = [n for n in memory.nodes if not memory.writes(n).isdisjoint(storages)]
    barriers = {user for n in memory.sharing(node) for user in n.users if memory.is_barrier(user)}
    if any(writers or memory.may_write(barrier, storages) for barrier in barriers):
        return False
    return all(n in members for n in (writers and [*writers, *memory.sharing(node)]))


def _may_be_in_any_format(node: Any) -> bool:
    """Whether a value is a batch of images whose strides Dynamo no longer fixes, for it has seen others before."""
    t = value(node)
    if t is None or t.dim() != 4 or t.device.type != "cpu" or not isinstance(t.stride(1), torch.SymInt):
        return False
    return not _is_nchw(node)


def _images(node: Node) -> list[Node]:
    """What a call reads that is to be copied, but for a convolution's weight, which it reads in either format."""
    weight = bind(node, CONV)["weight"] if is_conv(node) else None
    inputs = [n for n in node.all_input_nodes if n is not weight]
    return [n for n in inputs if _is_nchw(n) or _may_be_in_any_format(n)]


def _conv_gain(node: Node, requested: str) -> float:
    """Operations that a convolution of the region saves by being computed in channels_last."""
    given, y = bind(node, CONV), value(node)
    x = value(given["input"])
    if x is None or y is None:
        return 0.0
    # PyTorch computes float64 as it stands.
    gain = 0.0 if y.dtype == torch.float64 else float(_REORDER_COST * (elements(x) + elements(y)))
    conv = conv_of(node, (3,))
    if not isinstance(conv, str):
        problem = conv.problem(needs_grad=y.requires_grad)._replace(channels_last=True)
        if choose_algorithm(problem, requested).algorithm == "winograd":
            gain += _SAVED * 18 * problem.shape[1] * elements(y)
    return gain


def _gain(members: set[Node], requested: str, memory: Memory) -> float:
    """Operations that the region's convolutions save, less those that the copies at its border cost."""
    gain = 0.0
    for node in members:
        gain += _conv_gain(node, requested) if is_conv(node) else 0.0
        copied = [n for n in _images(node) if n not in members]
        copied += [node] if any(user not in members and not _reads_any_format(user) for user in node.users) else []
        copied += [node] if not members.isdisjoint(_readers_of_output(node, members, memory)) else []
        gain -= sum(_CALLS_COST + _COPY_COST * elements(t) for t in map(value, copied) if t is not None)
    return gain


def _is_returned(node: Node, memory: Memory) -> bool:
    """Whether the graph returns a value, which has its gradient where it stands: what was written in place without
    gradients keeps that of the tensor, and a copy there would have none.
    """
    made = memory.sharing(node)[0]
    within = made is node or not memory.is_written_between(frozenset(), made, node)
    return within and any(user.op == "output" for user in node.users)


def _readers_of_output(node: Node, members: set[Node], memory: Memory) -> list[Node]:
    """Who would read a member as it lies, where the graph returns it too and somebody may ask for its gradient."""
    t = value(node)
    if t is None or not t.requires_grad or not _is_returned(node, memory):
        return []
    return [user for user in node.users if user in members or _reads_any_format(user)]


def _return_copy(graph: Graph, node: Node, members: set[Node], memory: Memory) -> None:
    """Return a copy of a member that all outside read, so that views of it share its memory, and that is read inside
    where a gradient may be asked for: it is what comes back to the copy.
    """
    readers = _readers_of_output(node, members, memory)
    returned = _copy(graph, node.next, node, torch.contiguous_format, {}, memory)
    read = returned
    if not members.isdisjoint(readers):
        read = _copy(graph, returned.next, returned, torch.channels_last, {}, memory)
    for user in list(node.users):
        if user in members:
            user.replace_input_with(node, read if user in readers else node)
        elif user is not returned and (user in readers or not _reads_any_format(user)):
            user.replace_input_with(node, returned)


def to_channels_last(graph: Graph, requested: str) -> int:
    """Compute what may be in channels_last there, where that pays; the number of calls in the region.

    Args:
        requested: the convolutions' algorithm.
    """
    if not any(is_conv(node) and _is_nchw(node) for node in graph.nodes):
        return 0
    memory = Memory(graph)
    members = _candidates(memory)
    if _gain(members, requested, memory) <= 0:
        return 0
    inside: dict[Node, Node] = {}
    outside: dict[Node, Node] = {}
    for node in memory.nodes:
        if node in members and _is_returned(node, memory):
            _return_copy(graph, node, members, memory)
    for node in memory.nodes:
        if node in members:
            for image in _images(node):
                if image not in members:
                    node.replace_input_with(image, _copy(graph, node, image, torch.channels_last, inside, memory))
        elif _is_global_pool(node) and bind(node, _ADAPTIVE_POOL)["input"] in members:
            _write_global_pool_as_mean(node)
        elif not _reads_any_format(node):
            for image in [n for n in node.all_input_nodes if n in members]:
                node.replace_input_with(image, _copy(graph, node, image, torch.contiguous_format, outside, memory))
    _set_values(memory, members)
    return len(members)


def _write_global_pool_as_mean(node: Node) -> None:
    """What is pooled of images in channels_last has the strides of that, and a mean, which it is, those of NCHW."""
    image = bind(node, _ADAPTIVE_POOL)["input"]
    node.op, node.target, node.args, node.kwargs = "call_method", "mean", (image, (2, 3)), {"keepdim": True}


def _copy(
    graph: Graph, reader: Node, image: Node, memory_format: torch.memory_format, known: dict[Node, Node], memory: Memory
) -> Node:
    """The image in this format where `reader` stands; one that was copied before, if nobody has written to it since."""
    earlier = known.get(image)
    if earlier is not None and not memory.is_written_between(memory.storages([image]), image, reader):
        return earlier
    found = value(image)
    assert found is not None
    # Of an image that may be in this format already, `contiguous` would not be a copy; one channel is in both.
    method = "clone" if _may_be_in_any_format(image) or same_sizes(found.shape[1:2], (1,)) else "contiguous"
    with graph.inserting_before(reader):
        made = graph.call_method(method, (image,), {"memory_format": memory_format})
    made.meta.update(image.meta)
    made.meta["example_value"] = _formatted(found, memory_format)
    known[image] = made
    return made


def _formatted(t: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """A fake tensor like t, in memory of its own; one channel is in both formats with the strides of NCHW."""
    if same_sizes(t.shape[1:2], (1,)):
        memory_format = torch.contiguous_format
    mode: Any = t.fake_mode  # type: ignore[attr-defined]
    with mode, torch.no_grad():
        made = torch.empty_like(t, memory_format=memory_format)
    return made.requires_grad_(t.requires_grad)


def _set_values(memory: Memory, members: set[Node]) -> None:
    """Give the members fake tensors in channels_last, one for all that share their memory."""
    for node in memory.nodes:
        if node in members:
            first = memory.sharing(node)[0]
            old = value(node)
            assert old is not None
            if node is first:
                node.meta["example_value"] = _formatted(old, torch.channels_last)
            else:
                node.meta["example_value"] = value(first)
