"""The backend's function: what torch.compile calls with each graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.fx import GraphModule

from fastres.backend.memory import owned_storages
from fastres.backend.report import GraphReport, note
from fastres.backend.rewriter import Rewriter
from fastres.backend.values import value
from fastres.ops.algorithms import known_algorithm, requested_algorithm

_OPTIONS = ("inner", "conv_algorithm")
# What the changed graph runs by. In training AOTAutograd's backward is one function, which frees what it has used as it
# goes; measured on ResNet-18 at batch 16 and 64 it took 12 % less processor time than autograd's own walk.
TRAINING_INNER, INFERENCE_INNER = "aot_eager", "eager"
# (what is looked for, what computes it)
PATTERNS = [
    ("normalisation, residual, activation, dropout", "batch_norm_act, with the residual's own normalisation"),
    ("1x1 convolution and normalisation of a residual", "projection_shortcut"),
    ("3x3 convolution behind these, in training", "norm_act_conv3x3: they are its prologue"),
    ("3x3 convolution before a normalisation, in training", "conv3x3_with_statistics: taken in its epilogue"),
    ("3x3 convolution before these, in evaluation", "conv3x3_norm_act: they are its epilogue"),
    ("3x3 convolution alone", "conv3x3"),
    ("a network in NCHW", "channels_last between copies, where its convolutions gain"),
]


def _checked(options: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """(inner, conv_algorithm)."""
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise TypeError(f"options: expected a dict, got {type(options).__name__}")
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise ValueError(f"options: expected names among {_OPTIONS}, got {unknown[0]!r}")
    inner, algorithm = options.get("inner"), options.get("conv_algorithm")
    for name, given in (("inner", inner), ("conv_algorithm", algorithm)):
        if given is not None and not isinstance(given, str):
            raise TypeError(f"options[{name!r}]: expected a string or None, got {type(given).__name__}")
    if inner == "fastres":
        raise ValueError("options['inner']: expected another backend, got 'fastres' itself")
    return inner, None if algorithm is None else known_algorithm("options['conv_algorithm']", algorithm)


def _parts(module: GraphModule) -> list[GraphModule]:
    """The graphs that higher-order operators of this one run, such as the parts of a checkpointed network."""
    found = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            part = getattr(module, str(node.target), None)
            if isinstance(part, GraphModule):
                found += [part, *_parts(part)]
    return found


def _default_inner(module: GraphModule) -> str:
    # A checkpointed part does not run as it stands, for it counts batches in place.
    if _parts(module):
        return "aot_eager"
    (output,) = module.graph.find_nodes(op="output")
    differentiable = any(t is not None and t.requires_grad for t in map(value, output.all_input_nodes))
    return TRAINING_INNER if differentiable else INFERENCE_INNER


def rewrite(module: GraphModule, conv_algorithm: str | None = None) -> GraphReport:
    """Put calls of fastres into a graph of Dynamo's, in place, and say what became of it."""
    requested = requested_algorithm(conv_algorithm)
    report = GraphReport()
    owned = owned_storages(module.graph)
    for part in (module, *_parts(module)):
        report.add(Rewriter(part.graph, owned, conv_algorithm, requested).run())
        part.graph.lint()
        part.recompile()
    return report


def fastres(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """A backend of torch.compile: normalisations, convolutions and what lies between them by fastres's operators.

    Args:
        gm, example_inputs: from Dynamo.
        options: "inner", the name of the backend that gets the changed graph, and "conv_algorithm", as in
            `fastres.fuse`. Without an inner backend a graph with gradients goes to "aot_eager", and one without runs as
            it is; neither needs a C++ compiler.
        mode: of torch.compile; it is the inner backend "inductor" that it is for.
    Returns:
        The compiled graph.
    Raises:
        TypeError, ValueError: an option is of the wrong type, or unknown; a mode that the inner backend does not have.
    """
    inner, conv_algorithm = _checked(options)
    if inner is None:
        inner = _default_inner(gm) if mode in (None, "default") else "inductor"
    keywords: dict[str, Any] = {}
    if mode not in (None, "default"):
        if inner != "inductor":
            raise ValueError(f"mode: expected None with the inner backend {inner!r}, got {mode!r}")
        keywords["mode"] = mode
    report = rewrite(gm, conv_algorithm)
    report.inner = inner
    note(report)
    if inner == "eager":
        return gm.forward
    return torch._dynamo.lookup_backend(inner)(gm, list(example_inputs), **keywords)


def compile(model: nn.Module | Callable[..., Any], **keywords: Any) -> Any:
    """`torch.compile(model, backend="fastres", **keywords)`: any network, trained and evaluated with our operators.

    Args:
        model: a module or function.
        keywords: of torch.compile; `options={"inner": "inductor"}` names the backend that gets the changed graph.
    Raises:
        TypeError: a backend is among the keywords.
    """
    if "backend" in keywords:
        raise TypeError("backend: expected none, for this is the backend 'fastres'; name others in options['inner']")
    return torch.compile(model, backend=fastres, **keywords)
