"""What whole networks do: operator calls and saved bytes of a training step, and the graphs that torch.compile makes.

The networks that are compiled are short ones: a graph takes seconds, and a block is compiled like the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.fx import GraphModule
from torchvision.models.resnet import Bottleneck, ResNet

import fastres
from benchmarks.gate.figures import Counted
from benchmarks.memory import FUSED, Network, saved_for_backward, training_step
from benchmarks.networks import Unet
from benchmarks.operators import operator_calls
from fastres import models
from fastres.backend import compile_report
from fastres.backend import fastres as fastres_backend

NETWORKS = (Network("resnet18", "cifar", 32, 32), Network("resnet50", "imagenet", 2, 224))
"""Fused ones whose training steps are counted."""
IMAGES = (2, 3, 32, 32)
COMPILED: dict[str, Callable[[], nn.Module]] = {
    "WRN-10-2": lambda: models.create("wrn10-2", num_classes=10, fused=True),
    "ResNet of four bottlenecks": lambda: fastres.fuse(ResNet(Bottleneck, [1, 1, 1, 1])),
    "FastNet": lambda: models.create("fast", num_classes=10),
}
"""Fused ones that torch.compile traces."""
REWRITTEN: dict[str, Callable[[], nn.Module]] = {
    "plain WRN-10-2": lambda: models.create("wrn10-2", num_classes=10, fused=False),
    "U-Net": lambda: Unet((8, 16, 32)),
}
"""Plain ones whose graphs the compiler's backend rewrites."""
OURS = "fastres::"


def torch_version() -> str:
    """Without what it was built for, which is not what figures depend on."""
    return torch.__version__.partition("+")[0]


def calls_of_steps(networks: tuple[Network, ...]) -> dict[str, int]:
    """ "network: operator" -> calls in its second training step; the first one makes the momentum."""
    figures: dict[str, int] = {}
    for network in networks:
        step, _ = training_step(network, FUSED)
        step()
        figures |= {f"{network.words}: {name}": count for name, count in sorted(operator_calls(step).items())}
    return figures


def count_calls(networks: tuple[Network, ...] = NETWORKS) -> dict[str, Counted]:
    """Two groups of the baseline: our operators, whose calls no version changes, and PyTorch's."""
    found = calls_of_steps(networks)
    ours = {name: count for name, count in found.items() if f": {OURS}" in name}
    others = {name: count for name, count in found.items() if name not in ours}
    return {"calls of fastres": Counted({}, ours), "calls of PyTorch": Counted({"torch": torch_version()}, others)}


def saved_of_step(network: Network) -> int:
    """Bytes that a training step's forward keeps for its backward."""
    step, model = training_step(network, FUSED)
    return saved_for_backward(model, step)


def count_saved(networks: tuple[Network, ...] = NETWORKS) -> Counted:
    """The group of the baseline."""
    return Counted({"torch": torch_version()}, {f"{n.words}: bytes": saved_of_step(n) for n in networks})


def _modes(
    networks: Mapping[str, Callable[[], nn.Module]], function: Callable[[nn.Module, Tensor], dict[str, int]]
) -> dict[str, int]:
    """What a function finds of each network in training and in evaluation."""
    figures: dict[str, int] = {}
    for name, make in networks.items():
        model = make().to(memory_format=torch.channels_last)
        images = torch.randn(IMAGES).to(memory_format=torch.channels_last)
        for mode in ("training", "evaluation"):
            model.train(mode == "training")
            torch.compiler.reset()
            with torch.set_grad_enabled(mode == "training"):
                found = function(model, images)
            torch.compiler.reset()
            figures |= {f"{name}, {mode}: {kind}": value for kind, value in found.items()}
    return figures


def graphs(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Graphs and graph breaks of a call under torch.compile."""
    found = torch._dynamo.explain(model)(images)
    return {"graphs": found.graph_count, "breaks": found.graph_break_count}


def count_graphs(networks: Mapping[str, Callable[[], nn.Module]] = COMPILED) -> Counted:
    """The group of the baseline."""
    return Counted({"torch": torch_version()}, _modes(networks, graphs))


def rewritten(model: nn.Module, images: Tensor) -> dict[str, int]:
    """What the compiler's backend makes of a network: graphs, what it leaves to PyTorch, and the calls that are run."""
    calls: list[str] = []

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = fastres_backend(graph, inputs, options={"smallest": 0})
        # The graph that it was given is the one that it has changed.
        calls.extend(node.op for node in graph.graph.nodes if node.op.startswith("call_"))
        return compiled

    compile_report(clear=True)
    torch.compile(model, backend=backend)(images)
    report = compile_report(clear=True)
    return {
        "graphs": len(report),
        "normalisations left": sum(graph.norms - graph.fused_norms for graph in report),
        "convolutions left": sum(graph.convolutions - graph.fused_convolutions for graph in report),
        "calls": len(calls),
    }


def count_rewritten(networks: Mapping[str, Callable[[], nn.Module]] = REWRITTEN) -> Counted:
    """The group of the baseline."""
    return Counted({"torch": torch_version()}, _modes(networks, rewritten))


def count() -> dict[str, Counted]:
    """Every group of networks, by name."""
    compiled = {"graphs": count_graphs(), "the backend's graphs": count_rewritten()}
    return count_calls() | {"saved for backward": count_saved()} | compiled
