"""Which inputs of a graph the rewritten graph takes to lie in different memory, and the check of that in every call.

Dynamo guards that two inputs are not the same tensor. It does not guard that one is no view of the other, so what the
example inputs show of their memory says nothing about a later call: a caller may pass `bn.running_mean[:]`, or set a
buffer's `.data` to a view of what is passed. Between a caller's tensor and a parameter or buffer of the network that
never happens in practice, and a network of which only blocks are compiled would lose its fused residuals to it. So the
rewriter takes these to be apart, notes where the result relies on it, and the compiled graph compares the addresses in
each call before it runs. A call in which they do meet is computed by the graph as Dynamo made it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from fastres.backend.values import value


class Apart:
    """Inputs of a graph that are taken to lie in different memory.

    Attributes:
        pairs: their positions.
    """

    def __init__(self, graph: Graph) -> None:
        self.pairs: set[tuple[int, int]] = set()
        self._positions: dict[int, list[int]] = defaultdict(list)
        for i, node in enumerate(graph.find_nodes(op="placeholder")):
            t = value(node)
            if t is not None and t.layout is torch.strided:
                self._positions[t.untyped_storage()._cdata].append(i)

    def assume(self, x: int, y: int) -> bool:
        """Rely on it that these two storages of inputs are apart; False where one is no input of this graph."""
        if x not in self._positions or y not in self._positions:
            return False
        self.pairs.update((i, k) for i in self._positions[x] for k in self._positions[y])
        return True

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether they are apart in this call. Tensors without an address, as fake ones, meet nobody."""
        try:
            spans = {i: _span(inputs[i]) for i in {i for pair in self.pairs for i in pair}}
        except (RuntimeError, NotImplementedError):
            return True
        return all(spans[i][0] >= spans[k][1] or spans[i][1] <= spans[k][0] for i, k in self.pairs)


def _span(t: Tensor) -> tuple[int, int]:
    """Where a tensor's storage begins and ends. Different storages may overlap, as those of NumPy's arrays do."""
    storage = t.untyped_storage()
    begin, size = storage.data_ptr(), storage.nbytes()
    if begin == 0 and size > 0:
        raise RuntimeError(f"expected a tensor with an address, got {type(t).__name__} on {t.device}")
    return begin, begin + size


def plain_copy(module: GraphModule) -> GraphModule:
    """The graph as it is now, to be run where the rewritten one may not be."""
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        node.meta.clear()  # fake tensors that nobody reads again
    return GraphModule(module, graph)


def where_apart(compiled: Callable[..., Any], plain: GraphModule, apart: Apart) -> Callable[..., Any]:
    """The compiled graph, for the calls in which its inputs are as it takes them to be; others get the plain one."""

    def call(*inputs: Any) -> Any:
        return compiled(*inputs) if apart.holds(inputs) else plain.forward(*inputs)

    return call
