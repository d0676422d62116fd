"""What every call of a graph reads and writes, so that no value is computed on the wrong side of a write.

Dynamo's example values are fake tensors, which share storages as the real ones will: a view lies in the storage of its
base, and an in-place call returns its argument's. What a call writes to is found by running it on these fake tensors
once more and reading, in the schema of each ATen operator that it comes down to, which arguments are marked as written.
This covers every spelling of an in-place call, out=, lists of tensors and custom operators. A call that cannot be run
that way (a higher-order operator, a switch of modes, a function that is not torch's) is a barrier: nothing moves
across it.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.source import UnspecializedParamBufferSource
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastres.backend.apart import Apart
from fastres.backend.values import bind, value

Storages = frozenset[int]
_NOTHING: Storages = frozenset()

# Operators that update running statistics without a mark in their schema: (first, last) such argument, and the flag
# with which they do.
_UNMARKED = {
    "aten::native_batch_norm": (3, 4, 5),
    "aten::batch_norm": (3, 4, 5),
    "aten::_batch_norm_impl_index": (3, 4, 5),
    "aten::cudnn_batch_norm": (3, 4, 5),
    "aten::miopen_batch_norm": (3, 4, 5),
    "aten::instance_norm": (3, 4, 5),
}
_BATCH_NORM = dict.fromkeys(("input", "running_mean", "running_var", "weight", "bias"), None) | {"training": False}
# Calls without tensors that do nothing but compute.
_ARITHMETIC = {operator.__name__, math.__name__, "builtins", "_operator", "torch.fx.experimental.sym_node"}


def storages_of(found: Any) -> Storages:
    """The storages of all tensors in a structure."""
    return frozenset(t.untyped_storage()._cdata for t in tree_leaves(found) if isinstance(t, Tensor))


class _Recorder(TorchDispatchMode):
    """Notes the storages that the operators within write to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        # An operator that changes a tensor's shape or storage changes what its other names mean, and the graph's own
        # fake tensor if it is run on it once more.
        if schema is None or torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} cannot be run again")
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written |= storages_of(args[i] if i < len(args) else kwargs.get(argument.name))
        if schema.name in _UNMARKED:
            first, last, flag = _UNMARKED[schema.name]
            if len(args) <= flag or args[flag]:
                self.written |= storages_of(args[first : last + 1])
        return func(*args, **kwargs)


def _is_of_torch(target: Any) -> bool:
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    module: str = getattr(target, "__module__", None) or type(target).__module__
    # Built-in methods of torch's classes have no module.
    return module.split(".")[0] in ("torch", "_operator", "math", "builtins") or hasattr(torch, target.__name__)


class Memory:
    """The reads and writes of a graph's calls, by storage, in the order in which they stand.

    Attributes:
        nodes, position: the graph as it was when this was made, and the place of each node in it.
        owned: storages of parameters and buffers.
        apart: where it is noted that an input of the caller's is taken to lie outside of these; without, it is taken
            to overlap those of its dtype.
    """

    def __init__(self, graph: Graph, owned: Storages = _NOTHING, apart: Apart | None = None) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.owned = owned | owned_storages(graph)
        self._apart = apart
        self._dtypes: dict[int, torch.dtype] = {}
        for node in self.nodes:
            found = value(node)
            if node.op == "placeholder" and found is not None:
                self._dtypes[found.untyped_storage()._cdata] = found.dtype
        self._values: dict[Node, Storages | None] = {n: self._storages(n) for n in self.nodes}
        self._writes: dict[Node, Storages | None] = {n: self._written_by(n) for n in self.nodes}
        self._sharing: dict[int, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for storage in self._values[node] or ():
                self._sharing[storage].append(node)
        self._reads = {n: self.storages(n.all_input_nodes) for n in self.nodes}
        self._parts: dict[Node, list[Memory]] = {}
        # Where anything may be written, and where each storage is.
        self._barriers = [i for i, n in enumerate(self.nodes) if self._writes[n] is None]
        self._written_at: dict[int, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            for storage in self._writes[node] or ():
                self._written_at[storage].append(i)

    # ------------------------------------------------------------------------------------------------------- one call

    @staticmethod
    def _storages(node: Node) -> Storages | None:
        try:
            return storages_of(node.meta.get("example_value"))
        except (NotImplementedError, RuntimeError):  # without a storage: sparse and the like
            return None

    def _written_by(self, node: Node) -> Storages | None:
        """The storages that the call writes to; None for a barrier."""
        if node.op in ("placeholder", "get_attr", "output"):
            return _NOTHING
        if node.op not in ("call_function", "call_method") or self._values[node] is None:
            return None
        if any(self._values[n] is None for n in node.all_input_nodes):
            return None
        if node.target is F.batch_norm:
            # The operator behind it depends on the device, and so do its marks.
            arguments = bind(node, _BATCH_NORM)
            if arguments["training"] is False:
                return _NOTHING
            return self.storages([arguments["running_mean"], arguments["running_var"]])
        if node.target is torch.conv2d:
            return _NOTHING
        tensors = [n for n in node.all_input_nodes if self._values[n]]
        if not tensors and not self._values[node]:
            computes = node.op == "call_function" and getattr(node.target, "__module__", None) in _ARITHMETIC
            return _NOTHING if computes or getattr(node.target, "__name__", "").startswith("sym_") else None
        if node.op == "call_function" and not _is_of_torch(node.target):
            return None
        if any("example_value" not in n.meta for n in node.all_input_nodes):
            return None
        return _run_again(node)

    # ---------------------------------------------------------------------------------------------------- many calls

    def storages(self, nodes: Iterable[Any]) -> Storages:
        """Those in which the values of these nodes lie; what is no node has none."""
        return _NOTHING.union(*(self._values.get(n) or _NOTHING for n in nodes if isinstance(n, Node)))

    def writes(self, node: Node) -> Storages:
        """The storages that a call writes to; none for a barrier."""
        return self._writes[node] or _NOTHING

    def is_barrier(self, node: Node) -> bool:
        return self._writes[node] is None

    def may_write(self, barrier: Node, storages: Storages) -> bool:
        """Whether a barrier may write to these storages: a higher-order operator does what the graphs do that it runs,
        whose inputs Dynamo gives the storages of its own.
        """
        if self.storages(barrier.all_input_nodes).isdisjoint(storages):
            return False
        if barrier not in self._parts:
            self._parts[barrier] = [Memory(part.graph) for part in _parts_of(barrier)]
        parts = self._parts[barrier]
        return not parts or any(part._may_be_written(storages) for part in parts)

    def _may_be_written(self, storages: Storages) -> bool:
        barriers = [self.nodes[i] for i in self._barriers]
        return self.is_written(storages) or any(self.may_write(n, storages) for n in barriers)

    def sharing(self, node: Node) -> list[Node]:
        """All nodes whose values lie in the memory of this one's, itself among them, in order."""
        found = {n for s in self.storages([node]) for n in self._sharing[s]}
        return sorted(found, key=self.position.__getitem__)

    def overlap(self, a: Storages, b: Storages) -> bool:
        """Whether memory of the one may be memory of the other.

        Storages that are one for Dynamo are one here: it gives views of one tensor one fake storage, and what a graph
        makes itself lies in no input's. Inputs with a storage each are different tensors, which Dynamo guards, but may
        be views of one tensor in the next call, which it does not guard. So two tensors of the caller's and one dtype
        are taken to overlap. One of the caller's and one of the module's, or of another dtype, are taken to be apart,
        which every call checks (`fastres.backend.apart`). A module's parameters and buffers are taken as they are.
        """
        if not a.isdisjoint(b):
            return True
        outside_a, outside_b = ([s for s in side if s in self._dtypes] for side in (a, b))
        return any(self._may_meet(x, y) for x in outside_a for y in outside_b)

    def _may_meet(self, x: int, y: int) -> bool:
        """Whether two inputs' storages may be one in another call."""
        if x in self.owned and y in self.owned:
            return False
        alike = self._dtypes[x] == self._dtypes[y]
        if self._apart is None or (alike and x not in self.owned and y not in self.owned):
            return alike
        return not self._apart.assume(x, y)

    def is_written_between(self, storages: Storages, first: Node, last: Node | None, own: Iterable[Node] = ()) -> bool:
        """Whether a call after `first` and before `last` (None: the graph's end) writes to these storages, or may."""
        begin = self.position[first] + 1
        end = len(self.nodes) if last is None else self.position[last]
        if any(begin <= i < end for i in self._barriers):
            return True
        ours = set(own)
        return any(
            self.overlap(self.writes(n), storages) for n in self.nodes[begin:end] if n not in ours and self._writes[n]
        )

    def is_read_between(self, storages: Storages, first: Node, last: Node, own: Iterable[Node] = ()) -> bool:
        """Whether a call between the two reads what lies in these storages."""
        ours = set(own)
        span = self.nodes[self.position[first] + 1 : self.position[last]]
        return any(self.overlap(self._reads[n], storages) for n in span if n not in ours)

    def may_move(self, own: Iterable[Node]) -> bool:
        """Whether these calls give the same when all of them are made where the last one stands, and nobody else sees
        a difference.
        """
        own = sorted(own, key=self.position.__getitem__)
        last = own[-1]
        for node in own[:-1]:
            written = self.writes(node)
            if self.is_written_between(self._reads[node] | written, node, last, own):
                return False
            if written and self.is_read_between(written, node, last, own):
                return False
        return True

    def stays(self, node: Node, since: Node) -> bool:
        """Whether nobody writes to the node's memory after that call."""
        return not self.is_written_between(self.storages([node]), since, None)

    def is_written_after(self, storages: Storages, node: Node) -> bool:
        """Whether a call after the node is known to write to these storages; barriers are not taken to."""
        return any(i > self.position[node] for storage in storages for i in self._written_at.get(storage, ()))

    def is_written(self, storages: Storages) -> bool:
        """Whether a call is known to write to these storages."""
        return not storages.isdisjoint(self._written_at)

    def readers(self, storages: Storages) -> list[Node]:
        """The calls that read what lies in these storages."""
        return [n for n in self.nodes if n.op != "output" and not self._reads[n].isdisjoint(storages)]

    def is_known_outside(self, node: Node) -> bool:
        """Whether the node's memory is that of an input or output of the graph."""
        edges = ("placeholder", "get_attr", "output")
        return any(n.op in edges or any(user.op == "output" for user in n.users) for n in self.sharing(node))

    def is_made_here(self, node: Node) -> bool:
        """Whether the node's memory is new with it: no input of the graph, no view, no in-place result."""
        return node.op in ("call_function", "call_method") and self.sharing(node)[:1] == [node]


def _parts_of(node: Node) -> list[GraphModule]:
    """The graphs that a higher-order operator runs."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    found = [getattr(node.graph.owning_module, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
    return [part for part in found if isinstance(part, GraphModule)]


def owned_storages(graph: Graph) -> Storages:
    """The storages of parameters and buffers that Dynamo found in modules."""
    return storages_of([value(n) for n in graph.nodes if _is_state(n)])


def _is_state(node: Node) -> bool:
    """Whether a node is a parameter or buffer that Dynamo found in a module."""
    if node.op == "get_attr":
        return True
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    while source is not None and not isinstance(source, UnspecializedParamBufferSource):
        source = getattr(source, "base", None)
    return node.op == "placeholder" and source is not None


def _run_again(node: Node) -> Storages | None:
    """The storages that a call writes to when it is run on the fake tensors; None where that says nothing."""
    fakes = [v for n in node.all_input_nodes if (v := value(n)) is not None]
    results = [t for t in tree_leaves(node.meta.get("example_value")) if isinstance(t, Tensor)]
    mode = next((m for t in (*fakes, *results) if (m := getattr(t, "fake_mode", None)) is not None), None)
    if mode is None:
        return None
    example = tree_map_only(Node, lambda n: n.meta["example_value"], (node.args, dict(node.kwargs)))
    with _quietly(mode) as recorder:
        try:
            args, kwargs = example
            if node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # whatever it is, the call is not understood
            return None
    return frozenset(recorder.written)


@contextlib.contextmanager
def _quietly(mode: Any) -> Iterator[_Recorder]:
    """Fake mode, without autograd and without a trace of the sizes that are made up on the way."""
    shapes = mode.shape_env
    with contextlib.ExitStack() as stack:
        if shapes is not None:
            stack.enter_context(shapes.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        recorder = _Recorder()
        stack.enter_context(recorder)
        yield recorder
