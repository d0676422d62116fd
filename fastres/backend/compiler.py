"""The backend's function: what torch.compile calls with each graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.fx import GraphModule

from fastres.backend.apart import Apart, plain_copy, where_apart
from fastres.backend.memory import owned_storages
from fastres.backend.report import GraphReport, note
from fastres.backend.rewriter import Rewriter
from fastres.backend.values import value
from fastres.ops.algorithms import known_algorithm, requested_algorithm

_OPTIONS = ("inner", "conv_algorithm", "smallest")
# On the CPU inductor behind our calls saves at most 6 % of a step, and compiles for up to 22 s (docs/compile.md). On a
# GPU the pointwise calls that are not ours are a larger share. A checkpointed part does not run as it stands, for it
# counts batches in place.
INNER, CUDA_INNER, CHECKPOINTED_INNER = "eager", "inductor", "aot_eager"
# Elements from which on a normalisation by our operators is faster than PyTorch's, call and all: forward and backward
# of norm and ReLU took 1.2 times PyTorch's time with 65,000 and a third of it with 260,000.
_SMALLEST = 100_000
# (what is looked for, what computes it)
PATTERNS = [
    ("normalisation, residual, activation, dropout", "batch_norm_act, with the residual's own normalisation"),
    ("the arithmetic of FrozenBatchNorm2d, without a gradient", "the same as a normalisation in evaluation"),
    ("1x1 convolution and normalisation of a residual", "projection_shortcut"),
    ("3x3 or 1x1 convolution behind these, in training", "norm_act_conv3x3, norm_act_conv1x1: they are its prologue"),
    (
        "3x3 or 1x1 convolution before a normalisation, in training",
        "conv3x3_with_statistics, conv1x1_with_statistics: taken in its epilogue",
    ),
    ("3x3 convolution before these, in evaluation", "conv3x3_norm_act: they are its epilogue"),
    ("3x3 convolution alone", "conv3x3"),
    ("max pooling on the CPU, behind a normalisation or alone", "batch_norm_act_max_pool2d, max_pool2d"),
    (
        "3x3, 5x5 or 7x7 convolution in groups, or of each channel",
        "grouped_conv2d; before a normalisation in training grouped_conv2d_with_statistics",
    ),
    ("a convolution whose kernel covers its image, on the CPU", "a linear layer: weights stay where they lie"),
    ("a network in NCHW", "channels_last between copies, where its convolutions gain"),
]


def _checked(options: Mapping[str, Any] | None) -> tuple[str | None, str | None, int]:
    """(inner, conv_algorithm, smallest)."""
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
    smallest = options.get("smallest", _SMALLEST)
    if isinstance(smallest, bool) or not isinstance(smallest, int):
        raise TypeError(f"options['smallest']: expected an int, got {type(smallest).__name__}")
    algorithm = None if algorithm is None else known_algorithm("options['conv_algorithm']", algorithm)
    return inner, algorithm, smallest


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
    if any(t is not None and t.is_cuda for t in map(value, module.graph.nodes)):
        return CUDA_INNER
    return CHECKPOINTED_INNER if _parts(module) else INNER


def rewrite(
    module: GraphModule, conv_algorithm: str | None = None, smallest: int = _SMALLEST, apart: Apart | None = None
) -> GraphReport:
    """Put calls of fastres into a graph of Dynamo's, in place, and say what became of it.

    Args:
        apart: where the rewriter notes which inputs the result takes to lie in different memory.
    """
    requested = requested_algorithm(conv_algorithm)
    report = GraphReport()
    owned = owned_storages(module.graph)
    for part in (module, *_parts(module)):
        report.add(Rewriter(part.graph, owned, apart, conv_algorithm, requested, smallest).run())
        part.graph.lint()
        part.recompile()
    return report


def _inductor_options(mode: str | None) -> dict[str, Any]:
    """What a mode of torch.compile means to inductor."""
    known: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode not in known:
        raise ValueError(f"mode: expected one of {', '.join(known)}, got {mode!r}")
    return known[mode]


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Within it torch.compiler.is_compiling() holds, as torch 2.14 has it for a whole compilation.

    An inner backend traces our calls. Before that version they took its tracer for make_fx, and were made of PyTorch's
    operators.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


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
        options: "inner", the name of the backend that gets the changed graph; without, it is "inductor" on a GPU, and
            on the CPU the graph runs as it is, or by "aot_eager" where parts of it are checkpointed, neither of which
            needs a C++ compiler. "conv_algorithm", as in
            `fastres.fuse`. "smallest", the elements below which a normalisation or a max pooling alone is left.
        mode: of torch.compile; it is the inner backend "inductor" that it is for.
    Returns:
        The compiled graph.
    Raises:
        TypeError, ValueError: an option is of the wrong type, or unknown; a mode that the inner backend does not have.
    """
    inner, conv_algorithm, smallest = _checked(options)
    if inner is None:
        inner = _default_inner(gm) if mode in (None, "default") else "inductor"
    keywords: dict[str, Any] = {}
    if mode not in (None, "default"):
        if inner != "inductor":
            raise ValueError(f"mode: expected None with the inner backend {inner!r}, got {mode!r}")
        keywords["config_patches"] = _inductor_options(mode)
    # A graph with checkpointed parts has no copy beside it that could run as it stands.
    apart, plain = (None, None) if _parts(gm) else (Apart(gm.graph), plain_copy(gm))
    report = rewrite(gm, conv_algorithm, smallest, apart)
    report.inner = inner
    note(report)
    compiled: Callable[..., Any] = gm.forward
    if inner != "eager":
        with _compiling():
            compiled = torch._dynamo.lookup_backend(inner)(gm, list(example_inputs), **keywords)
    if apart is None or plain is None or not apart.pairs:
        return compiled
    return where_apart(compiled, plain, apart)


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
