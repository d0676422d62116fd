"""Max pooling in channels_last: at the end of a chain, as part of its call, or by itself.

At the end of a chain the activation is neither written nor kept. By itself it pays in training, where PyTorch reads
eight bytes an output on the way back and writes the gradient twice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.fx import Node

from fastres.backend.calls import DTYPES
from fastres.backend.chains import Chain
from fastres.backend.memory import Memory
from fastres.backend.values import bind, depends_on_data, elements, is_channels_last, is_transformed, only_user, value
from fastres.contract import Pool
from fastres.ops.max_pool import MOST

_POOL = {
    "input": None, "kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False,
    "return_indices": False,
}  # fmt: skip


def pool_of(node: Node) -> Pool | None:
    """The windows of a max pooling in channels_last on the CPU that ours compute; None for another call."""
    if node.op != "call_function" or node.target not in (F.max_pool2d, torch.max_pool2d) or is_transformed(node):
        return None
    given = bind(node, _POOL)
    x, y = value(given["input"]), value(node)
    if x is None or y is None or x.dtype not in DTYPES or x.device.type != "cpu" or x.dim() != 4:
        return None
    if depends_on_data(x):
        return None
    pool = Pool.of(given["kernel_size"], given["stride"], given["padding"], given["dilation"])
    if pool is None or pool.kernel > MOST or given["ceil_mode"] or given["return_indices"]:
        return None
    return pool if is_channels_last(x) and is_channels_last(y) else None


def pays_alone(node: Node, smallest: int) -> bool:
    """Whether backward will follow a max pooling of at least so many elements."""
    x, y = value(bind(node, _POOL)["input"]), value(node)
    return x is not None and y is not None and y.requires_grad and elements(x) >= smallest


def with_pool(chain: Chain, memory: Memory, claimed: set[Node]) -> Chain:
    """The chain with the max pooling that alone reads its result, unless a convolution has the chain as its own."""
    user, y = only_user(chain.nodes[-1]), value(chain.nodes[-1])
    is_alone = chain.before is None and chain.after is None and chain.residual is None and chain.dropout_p == 0
    if not is_alone or user is None or y is None:
        return chain
    pool = pool_of(user)
    if pool is None or user.args[:1] != (chain.nodes[-1],) or (y.requires_grad and not chain.norm.training):
        return chain
    longer = replace(chain, nodes=(*chain.nodes, user), pool=pool)
    return longer if claimed.isdisjoint(longer.own) and memory.may_move(longer.own) else chain
