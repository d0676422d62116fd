"""A normalisation, and the pointwise calls after it that one operator computes with it.

    dropout(f(norm(x) + residual))   or   dropout(f(norm(x))) + residual   or   maxpool(f(norm(x)))

Each is optional; the residual may have a normalisation of its own, and that one a 1x1 convolution before it (a
projection shortcut). A chain is computed where its last call stands. So it grows by one call only where everything in
it may be computed there (`memory.Memory.may_move`), and where nobody else reads what lies between its calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from fastres.activations import IDENTITY, Activation
from fastres.backend.calls import (
    CONV,
    Conv,
    Norm,
    activation_of,
    addends_of,
    conv_of,
    dropout_of,
    is_conv,
    is_norm,
    norm_of,
)
from fastres.backend.memory import Memory
from fastres.backend.values import bind, only_user, same_sizes, value
from fastres.contract import Act, Pool


@dataclass(frozen=True)
class Chain:
    """What one call of ours will compute.

    Attributes:
        norm: the normalisation at its beginning.
        nodes: the calls from there to the last, in order, without what follows here.
        residual: what is added; where it has a normalisation, what that one normalises.
        residual_norm: the residual's own.
        order: on which side of activation and dropout the residual is added.
        projection: the 1x1 convolution that makes the normalised residual.
        before: in evaluation, the 3x3 convolution that makes x.
        after: in training, the 3x3 or 1x1 convolution that alone reads the result.
        pool: the windows of a max pooling, which is the last of `nodes` then.
    """

    norm: Norm
    nodes: tuple[Node, ...]
    residual: Node | None = None
    residual_norm: Norm | None = None
    activation: Activation = IDENTITY
    dropout_p: float = 0.0
    order: str = "add_act"
    projection: Conv | None = None
    before: Conv | None = None
    after: Conv | None = None
    pool: Pool | None = None

    @property
    def own(self) -> list[Node]:
        """All calls that it takes the place of."""
        around = (self.residual_norm, self.projection, self.before, self.after)
        return [*self.nodes, *(part.node for part in around if part is not None)]

    @property
    def last(self) -> Node:
        """The call whose place it takes."""
        return self.nodes[-1] if self.after is None else self.after.node

    @property
    def saves_residual(self) -> bool:
        """Whether backward reads the residual, out of which it computes the activation's input again."""
        y = value(self.nodes[-1])
        if self.residual is None or self.residual_norm is not None or y is None or not y.requires_grad:
            return False
        if self.after is not None:
            return True
        return self.act.reads_residual()

    @property
    def act(self) -> Act:
        return Act(*self.activation, self.dropout_p, self.order)

    @property
    def norms(self) -> list[Norm]:
        return [self.norm] if self.residual_norm is None else [self.norm, self.residual_norm]


def norm_at(node: Node, memory: Memory) -> Norm | str:
    """The normalisation that a call is, or why it is none of ours in its graph.

    Backward reads weight and bias, the bias to compute an activation's input again, where PyTorch saves none. And
    PyTorch updates running statistics without autograd's knowing, which operators of ours do not.
    """
    norm, y = norm_of(node), value(node)
    if isinstance(norm, str) or y is None or not y.requires_grad:
        return norm
    if memory.is_written_after(memory.storages([norm.params.weight, norm.params.bias]), node):
        return "something writes to its weight or bias before backward"
    running = memory.storages([norm.params.running_mean, norm.params.running_var])
    if not norm.training and memory.is_written(running):
        return "something writes to its running statistics, which backward reads"
    if norm.training and any(_may_save(reader, node) for reader in memory.readers(running)):
        return "another call with a gradient reads its running statistics"
    return norm


def _may_save(reader: Node, norm: Node) -> bool:
    """Whether a call that reads running statistics may save them for backward; one that counts a batch does not."""
    y = value(reader)
    if reader is norm or (y is not None and not y.requires_grad):
        return False
    other = norm_of(reader) if is_norm(reader) else "it is none"
    return isinstance(other, str) or not other.training


def find(norm: Norm, memory: Memory, claimed: set[Node]) -> Chain:
    """The longest chain that begins at a normalisation, around which no convolution has been looked for yet."""
    chain = Chain(norm, (norm.node,))
    while (user := only_user(chain.nodes[-1])) is not None:
        # Candidates from the longest down: the residual with its normalisation, or as it is.
        longer = next((c for c in _extensions(chain, user, memory) if _is_allowed(c, memory, claimed)), None)
        if longer is None:
            break
        chain = longer
    return chain


def _is_allowed(chain: Chain, memory: Memory, claimed: set[Node]) -> bool:
    """Whether the chain can be computed where its last call stands, in the memory format of its first."""
    first, last = value(chain.norm.node), value(chain.nodes[-1])
    if first is None or last is None or not same_sizes(first.stride(), last.stride()) or first.dtype != last.dtype:
        return False
    if chain.saves_residual and not may_save_residual(chain, memory):
        return False
    return claimed.isdisjoint(chain.own) and memory.may_move(chain.own)


def may_save_residual(chain: Chain, memory: Memory) -> bool:
    """Whether the residual may be saved for backward, which an addition in PyTorch does not do.

    Who writes to it after the call makes backward impossible: autograd refuses what has changed since it was saved. So
    nobody may: no call of the graph, and outside of it nobody who can get at its memory, an input or an output of the
    graph, except where PyTorch saves the same tensor on the way back from the chain and refuses as well.
    """
    assert chain.residual is not None
    if not memory.stays(chain.residual, chain.last):
        return False
    return not memory.is_known_outside(chain.residual) or _is_saved_before(chain.norm.node, chain.residual, memory)


def _is_saved_before(last: Node, saved: Node, memory: Memory) -> bool:
    """Whether backward from a call comes to a convolution or normalisation that has saved this tensor as its input.

    Where autocast changes the dtype it is a copy that is saved.
    """
    ahead, seen, given = [last], {last}, value(saved)
    while ahead:
        node = ahead.pop()
        result = value(node)
        if result is None or not result.requires_grad or memory.position[node] <= memory.position[saved]:
            continue
        if saved in node.args[:1] and given is not None and given.dtype == result.dtype and _saves_input(node):
            return True
        ahead += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return False


def _saves_input(node: Node) -> bool:
    """Whether PyTorch saves what a convolution or normalisation reads. Arithmetic with constants, which is written as a
    normalisation in evaluation without a gradient of its parameters, does not.
    """
    if is_conv(node):
        weight = value(bind(node, CONV)["weight"])
        return weight is not None and weight.requires_grad
    norm = norm_of(node) if is_norm(node) else "it is none"
    if isinstance(norm, str):
        return False
    learnt = [value(t) for t in (norm.params.weight, norm.params.bias)]
    return norm.training or any(t is not None and t.requires_grad for t in learnt)


def _extensions(chain: Chain, user: Node, memory: Memory) -> Iterator[Chain]:
    """The chain with one more call at its end, in the ways that there are, best first."""
    last = chain.nodes[-1]
    longer = replace(chain, nodes=(*chain.nodes, user))
    ended = chain.residual is not None and chain.order == "act_add"
    activation = activation_of(user)
    if activation is not None:
        fits = user.args[:1] == (last,) and chain.activation == IDENTITY and chain.dropout_p == 0 and not ended
        if fits:
            yield replace(longer, activation=activation)
        return
    p = dropout_of(user)
    if p is not None:
        if user.args[:1] == (last,) and chain.norm.training and chain.dropout_p == 0 and p < 1 and not ended:
            yield replace(longer, dropout_p=p)
        return
    addends = addends_of(user)
    if addends is None or chain.residual is not None:
        return
    other = addends[1] if addends[0] is last else addends[0]
    if other is last or not _may_be_overwritten(other, user, memory):
        return
    plain = chain.activation == IDENTITY and chain.dropout_p == 0
    added = replace(longer, residual=other, order="add_act" if plain else "act_add")
    yield from _with_normalised_residual(added, other, user, memory)
    yield added


def _may_be_overwritten(other: Node, user: Node, memory: Memory) -> bool:
    """Whether it makes no difference to anybody that an addition in place, other += norm(x), leaves `other` as it is:
    its memory is of the graph's own making and nobody has another name for it.
    """
    if memory.writes(user).isdisjoint(memory.storages([other])):
        return True
    earlier = [n for n in memory.sharing(other) if memory.position[n] < memory.position[user]]
    return memory.is_made_here(other) and earlier == [other]


def _with_normalised_residual(chain: Chain, other: Node, user: Node, memory: Memory) -> Iterator[Chain]:
    if not is_norm(other) or only_user(other) is not user:
        return
    norm = norm_at(other, memory)
    if isinstance(norm, str) or norm.training != chain.norm.training:
        return
    # One that is used twice counts the first batch before the second.
    written = memory.writes(norm.node) | memory.writes(chain.norm.node)
    tensors = [memory.storages([*n.params[:4]]) for n in (norm, chain.norm)]
    if written and memory.overlap(*tensors):
        return
    with_norm = replace(chain, residual=norm.x, residual_norm=norm)
    conv = conv_of(norm.x, (1,))
    # The projection's operator adds before the activation only.
    if not isinstance(conv, str) and chain.order == "add_act" and conv.bias is None and only_user(norm.x) is norm.node:
        x, y = value(conv.x), value(chain.norm.node)
        # The operator computes in the dtype of its input, and writes the memory format of the main branch.
        if x is not None and y is not None and conv.dtype == y.dtype == x.dtype:
            yield replace(with_norm, projection=conv)
    yield with_norm
