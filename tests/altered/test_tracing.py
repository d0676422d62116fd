"""Modules traced, scripted, exported, compiled: the program is the plain network, computes and trains as it does."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.fx.experimental import optimization
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from tests.altered.compare import Draw, Results, descend, infer, observe, record, step
from tests.altered.subjects import (
    BLOCKS,
    BOTTLENECK,
    NETWORK,
    NORM_ACT,
    PROJECTED,
    SHORTCUT,
    SKIP,
    STEM,
    SUBJECTS,
    replace,
)
from tests.altered.table import Table, check
from tests.operators import Operators

TABLE = Table()
change, use = TABLE.change, TABLE.use
ALL = (*SUBJECTS, NETWORK)
FEW = (STEM, PROJECTED, BOTTLENECK, NORM_ACT)


def operators(graph: fx.Graph) -> Counter[str]:
    """How often a graph calls what; names of modules are those of the plain network."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


# ------------------------------------------------------------------------------------------------------------ torch.jit


@use("torch.jit.trace in evaluation", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    traced = torch.jit.trace(m.eval(), draw.x(9).detach())
    results["own operators"] = "fastres::" in str(traced.inlined_graph)
    step(traced, draw, results, "evaluation", 1)
    with torch.no_grad():
        record(results, "another size", y=traced(draw.x(2, shape=(3, draw.subject.channels, 8, 10)).detach()))
    descend(traced)
    infer(traced, draw, results, "after a step")
    return results


@use("torch.jit.trace in training", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    traced = torch.jit.trace(m.train(), draw.x(9).detach(), check_trace=False)
    results["own operators"] = "fastres::" in str(traced.inlined_graph)
    step(traced, draw, results, "training", 1)
    return results


@use("torch.jit.script", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    scripted = torch.jit.script(m)
    assert "fastres::" not in str(scripted.inlined_graph)
    return observe(scripted, draw)


@use("torch.jit.script, saved, loaded, frozen", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(m.eval()), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    infer(loaded, draw, results, "loaded")
    frozen = torch.jit.freeze(loaded)
    with torch.no_grad():
        record(results, "frozen", y=frozen(draw.x().detach()))
    return results


@use("a module around it, scripted", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    return observe(torch.jit.script(nn.Sequential(m, nn.Identity())), draw)


# ------------------------------------------------------------------------------------------------------------- torch.fx


# Alone, the layers with an optional argument need concrete_args, as every module does that asks whether one is None.
@use("torch.fx.symbolic_trace", tuple(s for s in ALL if s not in (NORM_ACT, SHORTCUT)))
def _(m: nn.Module, draw: Draw) -> Results:
    traced = fx.symbolic_trace(m)
    results = observe(traced, draw)
    results["functions"] = operators(traced.graph)
    results["modules"] = Counter(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
    return results


@use("torch.fx, relus replaced in the graph", (STEM, *BLOCKS, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    traced = fx.symbolic_trace(m)
    replace(traced, nn.ReLU, lambda old: nn.SiLU())
    traced.recompile()
    return observe(traced, draw)


@use("torch.fx.experimental.optimization.fuse", (STEM, *BLOCKS, SKIP, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    infer(optimization.fuse(m.eval()), draw, results, "folded")
    return results


@use("get_graph_node_names", (STEM, NETWORK, *BLOCKS))
def _(m: nn.Module, draw: Draw) -> Results:
    return {"names": get_graph_node_names(m)}


@use("create_feature_extractor", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> Results:
    nodes = ["relu", "layer1.0.bn1", "layer1", "layer2.0.relu", "layer3.0.conv2", "flatten"]
    return observe(create_feature_extractor(m, nodes), draw)


@use("create_feature_extractor over a block", (PROJECTED, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> Results:
    return observe(create_feature_extractor(m, ["conv1", "bn1", "relu", "relu_1"]), draw)


@use("IntermediateLayerGetter", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> Results:
    return observe(IntermediateLayerGetter(m, {"relu": "stem", "layer1": "a", "layer3": "b"}), draw)


@use("IntermediateLayerGetter of bn1", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> Results:
    return observe(IntermediateLayerGetter(m, {"bn1": "stem", "layer2": "a"}), draw)


@use("a detection backbone with a feature pyramid", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> Results:
    torch.manual_seed(2)
    dtype = next(m.parameters()).dtype
    backbone = BackboneWithFPN(m, {"layer1": "0", "layer2": "1", "layer3": "2"}, [16, 12, 12], 4).to(dtype)
    # Its new parameters start as float32 would have them.
    generator = torch.Generator().manual_seed(3)
    for p in backbone.fpn.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64).float() * 0.1)
    return observe(backbone, draw)


# ------------------------------------------------------------------------------------------------ torch.export, make_fx


def exported(m: nn.Module, draw: Draw, **options: Any) -> torch.export.ExportedProgram:
    # Its sizes are fixed: those of every draw.
    return torch.export.export(m, (draw.x(9).detach(),), **options)


@use("torch.export in evaluation", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    program = exported(m.eval(), draw)
    results["operators"] = operators(program.graph)
    step(program.module(), draw, results, "evaluation", 1)
    return results


@use("torch.export in training", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    program = exported(m.train(), draw)
    results["operators"] = operators(program.graph)
    module = program.module()
    for index in range(2):
        step(module, draw, results, f"step {index}", index)
        descend(module)
    results["parameters"] = sorted(name for name, _ in module.named_parameters())
    return results


@use("torch.export, strict", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    program = exported(m.train(), draw, strict=True)
    results["operators"] = operators(program.graph)
    step(program.module(), draw, results, "step")
    return results


@use("torch.export with any number of images", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    program = exported(m.eval(), draw, dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    for n in (1, 5):
        record(results, f"{n}", y=program.module()(draw.x(n, shape=(n, *draw.subject.shape()[1:]))))
    return results


@use("torch.export, decomposed, saved and loaded", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    program = exported(m.eval(), draw).run_decompositions()
    results["operators"] = operators(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    record(results, "loaded", y=torch.export.load(file).module()(draw.x()))
    return results


@use("torch.export after training steps", (PROJECTED, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    step(m, draw, results, "step")
    descend(m)
    record(results, "program", y=exported(m.eval(), draw).module()(draw.x(3).detach()))
    m.train()
    step(m, draw, results, "step after it", 1)
    return results


for mode in ("real", "fake", "symbolic"):

    @use(f"make_fx, {mode}", FEW)
    def _(m: nn.Module, draw: Draw, mode: str = mode) -> Results:
        results: Results = {}
        m.eval()
        with torch.no_grad():
            graph = make_fx(m, tracing_mode=mode, _allow_non_fake_inputs=True)(draw.x(9).detach())
            record(results, mode, y=graph(draw.x().detach()))
        results["operators"] = operators(graph.graph)
        return results


@use("make_fx of the gradient", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    m.eval()

    def f(x: Tensor) -> Tensor:
        return torch.autograd.grad(m(x).square().sum(), x)[0]

    graph = make_fx(f)(draw.x(9))
    record(results, "gradient", g=graph(draw.x()))
    return results


@use("torch.func.functionalize", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    m.eval()
    with torch.no_grad():
        return {"y": torch.func.functionalize(m)(draw.x().detach())}


# ----------------------------------------------------------------------------------------------------------------- ONNX


def run_onnx(model: Any, x: Tensor) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    (name,) = evaluator.input_names
    return torch.from_numpy(evaluator.run(None, {name: x.numpy()})[0])


for dynamo, columns in ((False, ALL), (True, (NETWORK,))):

    @use("ONNX" if dynamo else "ONNX by TorchScript", columns, exact=not dynamo)
    def _(m: nn.Module, draw: Draw, dynamo: bool = dynamo) -> Results:
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        file = io.BytesIO()
        torch.onnx.export(m.eval(), (draw.x(9).detach(),), file, dynamo=dynamo, verbose=False)
        model = onnx.load_from_string(file.getvalue())
        results: Results = {}
        record(results, "run", y=run_onnx(model, draw.x(layout="nchw").detach()))
        results["operators"] = Counter(node.op_type for node in model.graph.node)
        results["domains"] = sorted({node.domain for node in model.graph.node})
        return results


# -------------------------------------------------------------------------------------------------------- torch.compile


def trained_and_evaluated(m: Any, draw: Draw, when: str = "") -> Results:
    """Less than `observe`: each mode costs a compilation."""
    results: Results = {}
    step(m.train(), draw, results, f"{when}training")
    descend(m)
    infer(m, draw, results, f"{when}evaluation")
    return results


@use("torch.compile, fullgraph", (STEM, PROJECTED), exact=False)
def _(m: nn.Module, draw: Draw) -> Results:
    torch._dynamo.reset()
    return trained_and_evaluated(torch.compile(m, backend="eager", fullgraph=True), draw)


@use("torch.compile by aot_eager", (BOTTLENECK,), exact=False)
def _(m: nn.Module, draw: Draw) -> Results:
    torch._dynamo.reset()
    return trained_and_evaluated(torch.compile(m, backend="aot_eager"), draw)


def after_compile(what: str, alter: Callable[[nn.Module], Any]) -> None:
    @use(f"{what} after torch.compile", (PROJECTED,), exact=False)
    def _(m: nn.Module, draw: Draw) -> Results:
        torch._dynamo.reset()
        compiled = torch.compile(m, backend="eager")
        results = trained_and_evaluated(compiled, draw, "before: ")
        alter(m.train())
        return results | trained_and_evaluated(compiled, draw)


after_compile("relu replaced", lambda m: replace(m, nn.ReLU, lambda old: nn.SiLU()))
after_compile("weights written unseen", lambda m: [p.detach().numpy().__imul__(1.5) for p in m.parameters()])


@use("module.compile() with a replaced relu", (PROJECTED,), exact=False)
def _(m: nn.Module, draw: Draw) -> Results:
    torch._dynamo.reset()
    replace(m, nn.ReLU, lambda old: nn.LeakyReLU(0.1))
    m.compile(backend="eager")
    return trained_and_evaluated(m, draw)


# -------------------------------------------------------------------------------------------------- torch.ao in a graph


@use("torch.ao: prepare_fx", (STEM, *BLOCKS, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    results: Results = {}
    prepared = prepare_fx(m.eval(), get_default_qconfig_mapping("x86"), (draw.x(9).detach(),))
    infer(prepared, draw, results, "prepared")
    results["observers"] = len([c for c in prepared.modules() if "Observer" in type(c).__name__])
    return results


# Rounding to 8 bits may land on either side; plain float32 is the measure, through all but equal numbers.
@use("torch.ao: quantised in eager mode", (STEM, *BLOCKS), exact=False, refused=(NotImplementedError, RuntimeError))
def _(m: nn.Module, draw: Draw) -> Results:
    m = torch.ao.quantization.QuantWrapper(m.eval())
    m.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(m, inplace=True)
    m(draw.x().detach())
    torch.ao.quantization.convert(m, inplace=True)
    return {"modules": Counter(type(c).__name__ for c in m.modules() if "uantized" in type(c).__module__)}


# ---------------------------------------------------------------------------------------------------------------- tests


@TABLE.every()
def test_a_traced_module_does_what_the_plain_one_does(row, subject):
    check(row, subject)


def test_a_tracers_copy_leaves_the_module_on_its_way():
    model = NETWORK.make_fused().eval()
    x = torch.randn(NETWORK.shape())
    ran = []
    for act in (
        lambda: None,
        lambda: torch.export.export(model, (x,)),
        lambda: torch.jit.trace(model, x),
        lambda: fx.symbolic_trace(model),
    ):
        act()
        with torch.no_grad(), Operators() as seen:
            model(x)
        ran.append(seen.names)
    assert ran[0]
    assert all(names == ran[0] for names in ran)
