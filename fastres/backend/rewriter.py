"""From a graph of torch's calls to one of ours: find chains, give them their convolutions, write the calls.

The new calls are written in the order of the old graph, each where the last call stands that it takes the place of.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from fastres import functional
from fastres.backend import chains, convolutions, frozen, pools
from fastres.backend.apart import Apart
from fastres.backend.calls import (
    ADDITIONS,
    CONV,
    Conv,
    Norm,
    any_conv_of,
    conv_of,
    dropout_of,
    is_conv,
    is_norm,
    norm_params,
)
from fastres.backend.chains import Chain
from fastres.backend.layout import to_channels_last
from fastres.backend.memory import Memory, Storages
from fastres.backend.report import GraphReport, Left, place_of
from fastres.backend.values import bind, elements, is_channels_last, only_user, value
from fastres.backend.whole import covers_image, linear_of_image
from fastres.contract import NormParams

# Who may read a convolution's input in place of the tensor that it was: calls that only read it, and that give nothing
# on which somebody could look at its gradient.
_READERS = (*ADDITIONS, torch.conv2d, torch.cat, F.batch_norm, F.relu, F.avg_pool2d, F.max_pool2d)


def remove_idle_dropout(graph: Graph) -> None:
    """Take out dropout in evaluation, and with rate 0, which returns its input."""
    for node in list(graph.nodes):
        if dropout_of(node) == 0.0:
            node.replace_all_uses_with(bind(node, {"input": None})["input"])
            graph.erase_node(node)


def rename_after_writes(graph: Graph) -> None:
    """Let whoever reads a tensor after a call wrote to it read that call's result, which is the tensor itself.

    Then what a node's users read is what the node computed.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    memory = Memory(graph)
    for node in memory.nodes:
        target, result = next(iter(node.args), None), value(node)
        # Another name for the same memory, as out= may give, may be another tensor for autograd.
        if result is not None and value(target) is result and memory.writes(node) == memory.storages([target]):
            _replace_later_uses(target, node, position)


def _replace_later_uses(old: Any, new: Node, position: dict[Node, int]) -> None:
    old.replace_all_uses_with(new, lambda user: position[user] > position[new])


def _with(params: NormParams, **nodes: Any) -> NormParams:
    return params._replace(**nodes)


class Rewriter:
    """Rewrites one graph in place.

    Args:
        graph: Dynamo's, or a part of it.
        owned: storages of parameters and buffers, where the graph does not say itself.
        apart: notes what the result takes of its inputs' memory; None where no call could check it.
        algorithm: of the convolutions, as in `fastres.functional.conv3x3`.
        requested: the same, read from the environment where it is None.
        smallest: elements below which a normalisation on the CPU with no convolution of ours beside it is left, and a
            max pooling alone.
    """

    def __init__(
        self,
        graph: Graph,
        owned: Storages,
        apart: Apart | None,
        algorithm: str | None,
        requested: str,
        smallest: int,
    ) -> None:
        self.graph, self.algorithm, self.requested, self.smallest = graph, algorithm, requested, smallest
        remove_idle_dropout(graph)
        rename_after_writes(graph)
        self.frozen, unknown = frozen.recognise(graph)
        converted = to_channels_last(graph, requested)
        self.memory = Memory(graph, owned, apart)
        self.report = GraphReport(channels_last=converted, norms=len(unknown))
        for node, reason in unknown:
            self.leave("normalisation", node, reason)
        self.claimed: set[Node] = set()
        self.chains: list[Chain] = []
        self._now: dict[Node, Node] = {}
        self._statistics: dict[Node, Node] = {}
        self._biases: dict[Node, Node] = {}

    # ---------------------------------------------------------------------------------------------------------- finding

    def find(self) -> None:
        """Choose the chains; a normalisation behind a 1x1 convolution last, for it may be that of a projection."""
        found: list[Norm] = []
        for node in filter(is_norm, self.memory.nodes):
            norm = chains.norm_at(node, self.memory)
            if isinstance(norm, str):
                self.leave("normalisation", node, norm)
            else:
                found.append(norm)
        for norm in sorted(found, key=lambda n: not isinstance(conv_of(n.x, (1,)), str)):
            if norm.node in self.claimed:
                continue
            chain = chains.find(norm, self.memory, self.claimed)
            for extend in (convolutions.with_prologue, convolutions.with_convolution_before):
                chain = extend(chain, self.memory, self.claimed, self.requested)
            chain = pools.with_pool(chain, self.memory, self.claimed)
            y = value(norm.node)
            if self._keeps_input_of_frozen(chain):
                self.leave(
                    "normalisation", norm.node, "a call of ours would keep its input, which the arithmetic does not"
                )
                continue
            alone = chain.before is None and chain.after is None and chain.projection is None
            if alone and y is not None and y.device.type == "cpu" and elements(y) < self.smallest:
                self.leave(
                    "normalisation", norm.node, f"its {elements(y)} elements are too few for a call of ours to pay"
                )
                continue
            self.chains.append(chain)
            self.claimed.update(chain.own)

    def _keeps_input_of_frozen(self, chain: Chain) -> bool:
        """Whether the call would save what arithmetic with constants multiplies, and others may write to."""
        y = value(chain.nodes[-1])
        if y is None or not y.requires_grad or not any(norm.node in self.frozen for norm in chain.norms):
            return False
        parameters = [value(t) for norm in chain.norms for t in (norm.params.weight, norm.params.bias)]
        learns = any(t is not None and t.requires_grad for t in parameters)
        return learns or not (chain.act.gated or chain.act.kind == "identity")

    def leave(self, call: str, node: Node, reason: str) -> None:
        self.report.left.append(Left(call, reason, place_of(node)))

    # ---------------------------------------------------------------------------------------------------------- writing

    def call(self, function: Any, *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
        node = self.graph.call_function(function, args, kwargs)
        if like is not None:
            node.meta.update(like.meta)
        return node

    def current(self, node: Any) -> Any:
        """What stands for a node of the old graph here in the new one."""
        while node in self._now:
            node = self._now[node]
        return node

    def params(self, norm: Norm) -> NormParams:
        """The normalisation's tensors; its bias has a gradient of 0 for one that it takes out again."""
        params = norm_params([self.current(t) for t in norm.params[:4]], norm.params.momentum, norm.params.eps)
        conv_bias = self._biases.get(norm.node)
        return params if conv_bias is None else _with(params, bias=self.call(add_zero_gradient, params.bias, conv_bias))

    def count(self, function: Any, norms: int = 0, convs: int = 0) -> Any:
        self.report.operators[function.__name__] += 1
        self.report.fused_norms += norms
        self.report.fused_convolutions += convs
        return function

    def write(self, chain: Chain) -> Node:
        """The call of ours that computes the chain."""
        self.report.pointwise += len(chain.nodes) - 1
        options: dict[str, Any] = {"activation": chain.activation}
        if chain.residual is not None and chain.projection is None:
            options["residual"] = self.current(chain.residual)
        if chain.after is not None:
            return self.convolve(chain.after, chain, options)
        params, x = self.params(chain.norm), self.current(chain.norm.x)
        if chain.before is not None:
            return self._write_convolution_and_norm(chain, params, options)
        if chain.norm.training:
            options["statistics"] = self._statistics.get(chain.norm.x)
        if chain.dropout_p > 0:
            options["dropout_p"] = chain.dropout_p
        options["training"] = chain.norm.training
        if chain.pool is not None:
            y = self.call(self.count(functional.batch_norm_act_max_pool2d, 1), x, params, *chain.pool, **options)
        elif chain.projection is not None and chain.residual_norm is not None:
            conv = chain.projection
            if "statistics" in options:
                options["x_statistics"] = options.pop("statistics")
            function = self.count(functional.projection_shortcut, 2, 1)
            s, weight = self.current(conv.x), self.current(conv.weight)
            y = self.call(
                function, s, weight, self.params(chain.residual_norm), x, params, stride=conv.stride, **options
            )
        else:
            options |= {"momentum": params.momentum, "eps": params.eps, "order": chain.order}
            if chain.residual_norm is not None:
                options["residual_norm"] = self.params(chain.residual_norm)
            y = self.call(self.count(functional.batch_norm_act, len(chain.norms)), x, *params[:4], **options)
        self._move_mean(chain.norm)
        return y

    def _write_convolution_and_norm(self, chain: Chain, params: NormParams, options: dict[str, Any]) -> Node:
        conv = chain.before
        assert conv is not None
        if conv.bias is not None:
            mean = self.call(operator.sub, params.running_mean, self.current(conv.bias))
            params = _with(params, running_mean=mean)
        function = self.count(functional.conv3x3_norm_act, 1, 1)
        x, weight = self.current(conv.x), self.current(conv.weight)
        return self.call(function, x, weight, params, **conv.way, algorithm=self.algorithm, **options)

    def _write_arithmetic(self, node: Node, arithmetic: frozen.Arithmetic) -> Node:
        """The arithmetic that a normalisation was which is not fused."""
        scale, shift = self.current(arithmetic.scale), self.current(arithmetic.shift)
        product = self.call(operator.mul, self.current(node.args[0]), scale, like=node)
        return self.call(operator.add, product, shift)

    def convolve(self, conv: Conv, chain: Chain | None = None, options: dict[str, Any] | None = None) -> Node:
        """A convolution, in training after the chain that only it reads, where there is one."""
        n, x, weight, bias = conv.node, self.current(conv.x), self.current(conv.weight), self.current(conv.bias)
        reader = self._reader(conv)
        measures = reader is not None
        absorbs = reader is not None and self._absorbs(conv, reader)
        statistics: Node | None = None
        if chain is not None:
            assert options is not None
            params, norm_x = self.params(chain.norm), self.current(chain.norm.x)
            behind: Any = functional.norm_act_conv3x3 if conv.kernel == 3 else functional.norm_act_conv1x1
            made = self.call(
                self.count(behind, 1, 1), norm_x, params, weight, dropout_p=chain.dropout_p, order=chain.order,
                statistics=self._statistics.get(chain.norm.x), **conv.way, algorithm=self.algorithm,
                **options,
            )  # fmt: skip
            y, statistics = self.call(operator.getitem, made, 0, like=n), self.call(operator.getitem, made, 1)
            self._move_mean(chain.norm)
        elif measures:
            ours = convolutions.with_statistics(conv)
            made = self.call(self.count(ours, 0, 1), x, weight, **conv.way, algorithm=self.algorithm)
            y, statistics = self.call(operator.getitem, made, 0, like=n), self.call(operator.getitem, made, 1)
            if conv.groups == 1:
                self._share_input(conv, x, made)
        else:
            function = self.count(functional.conv3x3 if conv.groups == 1 else functional.grouped_conv2d, 0, 1)
            y = self.call(function, x, weight, **conv.way, algorithm=self.algorithm, like=n)
        if absorbs and reader is not None:  # the batch's mean takes it out again
            self._biases[reader.norm.node] = bias
        elif bias is not None:
            y = self.call(add_bias, y, bias, like=n)
        if measures and statistics is not None and (bias is None or absorbs):
            self._statistics[n] = statistics
        return y

    def _reader(self, conv: Conv) -> Chain | None:
        """The chain that normalises a convolution's output by the batch's statistics, where that may take them."""
        readers = [c for c in self.chains if c.norm.training and c.norm.x is conv.node]
        reader = max(readers, key=lambda c: self.memory.position[c.norm.node], default=None)  # the last: they share
        written = self.memory.storages([conv.node])
        if reader is not None and self.memory.is_written_between(written, conv.node, reader.norm.node):
            return None
        return reader

    def _absorbs(self, conv: Conv, reader: Chain) -> bool:
        """Whether a convolution's bias may be left out where the batch's mean takes it out again: nobody else reads the
        output, and the bias is still the same where it moves the running mean.
        """
        norm, bias = reader.norm.node, self.memory.storages([conv.bias])
        if conv.bias is None or only_user(conv.node) is not norm:
            return False
        by_norm = self.memory.overlap(self.memory.writes(norm), bias)
        return not by_norm and not self.memory.is_written_between(bias, conv.node, reader.last)

    def _share_input(self, conv: Conv, x: Node, made: Node) -> None:
        """Let later readers of a convolution's input read it out of the convolution's results: their gradients are
        added where it writes its own.
        """
        at, given, y = self.memory.position, value(conv.x), value(conv.node)
        if given is None or y is None or not (given.requires_grad and y.requires_grad and given.dtype == y.dtype):
            return
        later = [user for user in x.users if at.get(user, -1) > at[conv.node]]
        alike = all(user in self.claimed or user.target in _READERS for user in later)
        if later and alike and all(n.op != "output" for n in later) and self.memory.stays(conv.x, conv.node):
            same = self.call(operator.getitem, made, 2, like=conv.x)
            for user in later:
                user.replace_input_with(x, same)
            self._now[x] = same

    def _move_mean(self, norm: Norm) -> None:
        conv_bias, running_mean = self._biases.get(norm.node), self.current(norm.params.running_mean)
        if conv_bias is not None and running_mean is not None:
            self.call(move_running_mean, running_mean, conv_bias, norm.params.momentum)

    def run(self) -> GraphReport:
        """Rewrite the graph, and say what became of it."""
        nodes = self.memory.nodes
        self.report.norms += sum(map(is_norm, nodes))
        self.report.convolutions = sum(map(is_conv, nodes))
        self.find()
        ends = {chain.last: chain for chain in self.chains}
        for node in nodes:
            with self.graph.inserting_before(node):
                new = self._replacement(node, ends)
            if new is not None:
                new.meta.update(node.meta)
                self._now[node] = new
                self.claimed.add(node)
                node.replace_all_uses_with(new)
        for node in filter(self.claimed.__contains__, reversed(nodes)):
            self.graph.erase_node(node)
        frozen.erase_unused(self.graph, self.frozen.values())
        return self.report

    def _replacement(self, node: Node, ends: dict[Node, Chain]) -> Node | None:
        if node in ends:
            return self.write(ends[node])
        if node in self.claimed:
            return None
        if node in self.frozen:
            return self._write_arithmetic(node, self.frozen[node])
        y = value(node)
        if is_norm(node) and y is not None and y.requires_grad and self.memory.writes(node):
            arguments = [self.current(argument) for argument in node.args]
            keywords = {name: self.current(argument) for name, argument in node.kwargs.items()}
            return self.call(batch_norm_beside_ours, *arguments, like=node, **keywords)
        pool = pools.pool_of(node)
        if pool is not None and pools.pays_alone(node, self.smallest):
            x = self.current(bind(node, {"input": None})["input"])
            return self.call(self.count(functional.max_pool2d), x, *pool, like=node)
        if not is_conv(node):
            return None
        conv = any_conv_of(node)
        reason = conv if isinstance(conv, str) else convolutions.why_not_ours(conv, self.requested)
        if reason is None and not isinstance(conv, str) and conv.kernel == 1 and self._reader(conv) is None:
            reason = "it has no normalisation beside it"
        if reason is None and not isinstance(conv, str):
            return self.convolve(conv)
        if covers_image(node):
            given = bind(node, CONV)
            operands = (self.current(given[name]) for name in ("input", "weight", "bias"))
            channels_last = y is not None and is_channels_last(y)
            return self.call(self.count(linear_of_image, convs=1), *operands, channels_last, like=node)
        self.leave("convolution", node, str(reason))
        return None


# --------------------------------------------------------------------------------------- calls that only a graph makes


def add_zero_gradient(norm_bias: Tensor | None, conv_bias: Tensor) -> Tensor:
    """A normalisation's bias, with a gradient of 0 for the bias of a convolution that the batch's mean takes out."""
    return conv_bias * 0 if norm_bias is None else norm_bias + conv_bias * 0


def batch_norm_beside_ours(
    input: Tensor, running_mean: Tensor, running_var: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """F.batch_norm in training. It keeps its running statistics for a backward that does not read them, and moves them
    without autograd's notice; ours are noticed, and would make that backward impossible.
    """
    if not torch.compiler.is_compiling():
        running_mean, running_var = running_mean.data, running_var.data
    return F.batch_norm(input, running_mean, running_var, *args, **kwargs)


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """A convolution's bias, added to its new output in place."""
    return y.add_(bias.to(y.dtype).reshape(-1, 1, 1))


@torch.no_grad()
def move_running_mean(running_mean: Tensor, conv_bias: Tensor, momentum: float) -> None:
    """The running mean of an output with its convolution's bias, after that of the output without it was stored."""
    running_mean.add_(conv_bias, alpha=momentum)
