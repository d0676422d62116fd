"""The single torch calls that patterns are made of, in all their spellings."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fastres.activations import KINDS, RELU, Activation
from fastres.backend.values import (
    bind,
    depends_on_data,
    has_layout_of_norm,
    hint,
    is_transformed,
    same_layout,
    same_sizes,
    value,
)
from fastres.contract import ConvProblem, NormParams
from fastres.ops.algorithms import GROUPED_KERNELS, problem_of

_DEPENDS_ON_DATA = "its input's shape depends on data"
_TRANSFORMED = "it is inside a transform of torch.func"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = ("cpu", "cuda", "meta")

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")

_NORM = {
    "input": None, "running_mean": None, "running_var": None, "weight": None, "bias": None, "training": False,
    "momentum": 0.1, "eps": 1e-5,
}  # fmt: skip
CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_DROPOUT = {"input": None, "p": 0.5, "training": True, "inplace": False}

# ------------------------------------------------------------------------------------------------------ normalisations


@dataclass(frozen=True)
class Norm:
    """A call of F.batch_norm that our operators compute.

    Attributes:
        x: what is normalised.
        params: its tensors are nodes.
        training: by the batch's own statistics.
    """

    node: Node
    x: Node
    params: NormParams
    training: bool


def is_norm(node: Node) -> bool:
    return node.op == "call_function" and node.target is F.batch_norm


def norm_of(node: Any) -> Norm | str:
    """The normalisation that a call of F.batch_norm is, or why it is none of ours."""
    given = bind(node, _NORM)
    x, y = value(given["input"]), value(node)
    if is_transformed(node):
        return _TRANSFORMED
    if x is None or y is None:
        return "its input is no tensor that Dynamo knows"
    if not 2 <= x.dim() <= 5 or x.dtype not in DTYPES or x.layout is not torch.strided:
        return f"its input has {x.dim()} dimensions and the dtype {x.dtype}"
    if x.device.type not in _DEVICES or (x.dtype == torch.float64 and x.device.type == "cuda"):
        return f"no kernel of ours takes {x.dtype} on {x.device.type}"
    if depends_on_data(x):
        return _DEPENDS_ON_DATA
    if not same_layout(x, y) or not has_layout_of_norm(x):
        return f"its input has the strides {tuple(x.stride())}, which its output does not keep"
    training, momentum, eps = given["training"], given["momentum"], given["eps"]
    if not isinstance(training, bool) or not isinstance(momentum, (int, float)) or not isinstance(eps, (int, float)):
        return "its mode, momentum or eps is computed in the graph"
    tensors = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
    if (tensors[0] is None) != (tensors[1] is None) or (not training and tensors[0] is None):
        return "it has one running statistic of two"
    if any(t is not None and value(t) is None for t in tensors):
        return "one of its parameters is no tensor that Dynamo knows"
    if any(t is not None and not same_sizes(value(t).stride(), (1,)) for t in tensors):  # type: ignore[union-attr]
        return "one of its parameters is a part of another tensor"
    return Norm(node, given["input"], norm_params(tensors, momentum, eps), training)


def norm_params(nodes: list[Any], momentum: float, eps: float) -> NormParams:
    """NormParams whose tensors are nodes: running_mean, running_var, weight and bias."""
    mean, var, weight, bias = nodes
    return NormParams(mean, var, weight, bias, momentum, eps)


# -------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class Conv:
    """A call of torch.conv2d whose padding is half its dilated kernel.

    Attributes:
        stride, dilation: of both axes; only 3x3 kernels in one group are dilated.
        groups: one, unless it is of `any_conv_of`.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    kernel: int
    stride: tuple[int, int]
    groups: int = 1
    dilation: int = 1

    @property
    def way(self) -> dict[str, Any]:
        """How it goes over its input, for the functions that compute it."""
        return {"stride": self.stride[0]} | ({"dilation": self.dilation} if self.dilation > 1 else {})

    def problem(self, *, needs_grad: bool, followed: bool = False) -> ConvProblem:
        """The problem at the sizes that Dynamo saw."""
        x, weight = value(self.x), value(self.weight)
        assert x is not None and weight is not None
        problem = problem_of(
            x, hint(weight.shape[0]), self.kernel, **self.way, needs_grad=needs_grad, followed=followed,
            groups=self.groups,
        )  # fmt: skip
        n, c, h, w = map(hint, x.shape)
        return problem._replace(dtype=self.dtype, shape=(n, c, h, w))

    @property
    def dtype(self) -> torch.dtype:
        """Of the result, which is that in which it is computed."""
        y = value(self.node)
        assert y is not None
        return y.dtype


def is_conv(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.conv2d


# Kernels of our own convolutions.
OUR_KERNELS = (3, 1)


def conv_of(node: Any, kernels: tuple[int, ...] = OUR_KERNELS) -> Conv | str:
    """The convolution in one group with a kernel of one of these sizes that a call is, or why it is none."""
    conv = _conv_of(node, kernels)
    return f"it has {conv.groups} groups" if isinstance(conv, Conv) and conv.groups != 1 else conv


def any_conv_of(node: Node) -> Conv | str:
    """The convolution, in one group or in several, with a kernel that ours have that a call is, or why it is none."""
    groups = bind(node, CONV)["groups"] if is_conv(node) else 1
    return _conv_of(node, GROUPED_KERNELS if isinstance(groups, int) and groups != 1 else OUR_KERNELS)


def _conv_of(node: Any, kernels: tuple[int, ...]) -> Conv | str:
    if not isinstance(node, Node) or not is_conv(node):
        return "it is no two-dimensional convolution"
    given = bind(node, CONV)
    x, weight, y = value(given["input"]), value(given["weight"]), value(node)
    if is_transformed(node):
        return _TRANSFORMED
    if x is None or weight is None or y is None or x.dim() != 4:
        return "its input is no batch of images"
    if y.dim() != 4:
        return "its output is given another shape in place"
    if depends_on_data(x) or depends_on_data(weight):
        return _DEPENDS_ON_DATA
    kernel = next((k for k in kernels if same_sizes(weight.shape[2:], (k, k))), None)
    if kernel is None:
        return f"its kernel is {'x'.join(str(size) for size in weight.shape[2:])}"
    stride, padding, dilation = (pair(given[name]) for name in ("stride", "padding", "dilation"))
    if not isinstance(given["groups"], int):
        return "its groups are computed in the graph"
    may_dilate = kernel == 3 and given["groups"] == 1 and stride == (1, 1) and isinstance(dilation[0], int)
    if dilation != (1, 1) and not (may_dilate and dilation[0] == dilation[1]):
        return f"its dilation is {dilation}"
    half = (kernel // 2 * dilation[0],) * 2
    if padding != half and not (padding == ("same", "same") and stride == (1, 1)):
        return f"its padding is {padding}, not half its kernel"
    if not all(isinstance(s, int) for s in stride):
        return "its stride is computed in the graph"
    return Conv(node, given["input"], given["weight"], given["bias"], kernel, stride, given["groups"], dilation[0])


def pair(given: Any) -> tuple[Any, Any]:
    """A convolution's stride, padding or dilation of both axes."""
    if isinstance(given, (tuple, list)):
        return tuple(given) if len(given) == 2 else (given[0], given[0])
    return (given, given)


# --------------------------------------------------------------------------------------------------------- activations


def _elu_in_place(node: Node) -> Activation | None:
    """ELU, but for the two more factors that this spelling takes."""
    given = bind(node, {"input": None, "alpha": 1.0, "scale": 1, "input_scale": 1})
    return _ELU(node) if (given["scale"], given["input_scale"]) == (1, 1) else None


def _fixed(activation: Activation) -> Callable[[Node], Activation | None]:
    return lambda node: activation


def _with_alpha(kind: str, name: str) -> Callable[[Node], Activation | None]:
    def found(node: Node) -> Activation | None:
        alpha = bind(node, {"input": None, name: KINDS[kind].alpha})[name]
        return Activation(kind, float(alpha)) if isinstance(alpha, (int, float)) else None

    return found


def _gelu(node: Node) -> Activation | None:
    kinds = {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}
    return kinds.get(bind(node, {"input": None, "approximate": "none"})["approximate"])


def _hardtanh(node: Node) -> Activation | None:
    given = bind(node, {"input": None, "min_val": -1.0, "max_val": 1.0})
    return Activation("relu6") if (given["min_val"], given["max_val"]) == (0, 6) else None


def _clamp(node: Node) -> Activation | None:
    """ReLU where no gradient is asked for. At 0, where a normalisation whose weight begins as 0 has all its outputs,
    clamp passes the gradient on and ReLU does not.
    """
    given = bind(node, {"input": None, "min": None, "max": None})
    y = value(node)
    if given["max"] is not None or isinstance(given["min"], Node) or given["min"] != 0:
        return None
    return RELU if y is not None and not y.requires_grad else None


_LEAKY, _ELU = _with_alpha("leaky_relu", "negative_slope"), _with_alpha("elu", "alpha")
_ACTIVATIONS: dict[Any, Callable[[Node], Activation | None]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _fixed(RELU)),
    **dict.fromkeys((torch.clamp, torch.clamp_, "clamp", "clamp_", torch.clip, "clip", "clip_"), _clamp),
    **dict.fromkeys((torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"), _clamp),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _LEAKY),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    F.elu: _ELU,
    F.elu_: _elu_in_place,
    F.relu6: _fixed(Activation("relu6")),
    F.hardswish: _fixed(Activation("hardswish")),
    F.silu: _fixed(Activation("silu")),
    F.gelu: _gelu,
}


def activation_of(node: Node) -> Activation | None:
    """The activation that a call computes of its first argument; None where it is none of ours."""
    if node.op not in ("call_function", "call_method") or "out" in node.kwargs:
        return None
    recognise = _ACTIVATIONS.get(node.target)
    return None if recognise is None else recognise(node)


# --------------------------------------------------------------------------------------------- additions and dropout


def addends_of(node: Node) -> tuple[Node, Node] | None:
    """The two tensors that a call adds, without a factor and without broadcasting; None where it does not."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    a, b, y = value(node.args[0]), value(node.args[1]), value(node)
    if a is None or b is None or y is None or not same_sizes(a.shape, b.shape):
        return None
    if a.dtype != b.dtype or a.dtype != y.dtype or a.device != b.device:
        return None
    return node.args[0], node.args[1]  # type: ignore[return-value]


def dropout_of(node: Node) -> float | None:
    """The probability with which a call drops each element, 0 where it does nothing; None where it is no dropout."""
    if node.op != "call_function" or node.target not in (F.dropout, torch.dropout, torch.dropout_):
        return None
    names = _DROPOUT if node.target is F.dropout else {"input": None, "p": 0.5, "train": True}
    given = bind(node, names)
    p, training = given["p"], given.get("training", given.get("train"))
    if not isinstance(p, (int, float)) or not isinstance(training, bool):
        return None
    return float(p) if training else 0.0
