"""How the backend is asked for, and what torch.compile does around it."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastres
from fastres.backend import compiler
from tests import oracle
from tests.compiled import compare, networks

# Small images, too.
ALWAYS = {"smallest": 0}


@pytest.fixture(autouse=True)
def _alone():
    with compare.fresh():
        yield


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=oracle.generator("images", shape), dtype=dtype)


def test_torch_compile_knows_its_name():
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    if "fastres" not in entries.names:
        pytest.skip("the installed metadata of fastres is older than its entry point; install it again with pip")
    assert "fastres" in torch._dynamo.list_backends()
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    torch.compile(model, backend="fastres", options=ALWAYS)(images(2, 3, 4, 4, dtype=torch.float32))
    assert fastres.compile_report()[0].fused_norms == 1


INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("c++") is None, reason="inductor's CPU code needs a C++ compiler")
)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", INDUCTOR])
def test_an_inner_backend_gets_the_changed_graph(inner):
    (training, evaluation) = compare.check(lambda: networks.ResNet(networks.Basic), networks.IMAGES, inner=inner)
    assert training.inner == evaluation.inner == inner and training.fused_norms == 6


def test_an_inner_backend_that_traces_the_graph_keeps_our_operators(monkeypatch):
    """Also where torch does not say during a whole compilation that it compiles, as before 2.14."""
    monkeypatch.setattr(torch.compiler, "_compile_session_context", contextlib.nullcontext, raising=False)
    model = networks.ResNet(networks.Basic).double()
    options = ALWAYS | {"inner": "aot_eager"}
    compiled = torch.compile(model, backend=fastres.backend.fastres, options=options)

    def step() -> None:
        compiled(images(2, 3, 12, 12)).sum().backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step()
    called = {event.key: event.count for event in seen.key_averages() if event.key.startswith("fastres::")}
    # The shortcut's normalisation is added by the call that normalises its block's second convolution.
    expected = {"batch_norm_act": ("training", "backward", 5), "projection_shortcut": ("forward", "backward", 1)}
    assert called == {f"fastres::{name}_{way}": count for name, (*ways, count) in expected.items() for way in ways}, (
        called
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inductor_gets_the_rest_of_a_graph_on_a_gpu(device):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["example_value"] = torch.empty(2, 3, 4, 4, device=device)
    graph.output(x)
    expected = {"cpu": "eager", "cuda": "inductor"}[device]
    assert compiler._default_inner(torch.fx.GraphModule(nn.Module(), graph)) == expected


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"options": {"inner": 3}}, TypeError, "inner"),
        ({"options": {"smallest": 0.5}}, TypeError, "smallest"),
        ({"options": {"outer": "eager"}}, ValueError, "outer"),
        ({"options": {"inner": "fastres"}}, ValueError, "fastres"),
        ({"options": {"conv_algorithm": "fast"}}, ValueError, "fast"),
        ({"options": {"inner": "eager"}, "mode": "max-autotune"}, ValueError, "max-autotune"),
    ],
)
def test_options_are_checked(keywords, error, words):
    module = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(error, match=words):
        fastres.backend.fastres(module, [], **keywords)


def test_compile_has_a_backend_already():
    with pytest.raises(TypeError, match="backend"):
        fastres.compile(nn.ReLU(), backend="eager")


def test_the_report_names_reason_module_and_line():
    model = networks.ResNet(networks.Basic).double()
    fastres.compile(model, options=ALWAYS)(images(2, 3, 12, 12))
    (graph,) = fastres.compile_report(clear=True)
    assert len(graph.left) == graph.convolutions - graph.fused_convolutions == 5
    left = [str(line) for line in graph.left]
    assert any("blocks.1.conv1" in line and "networks.py" in line and "dtype" in line for line in left), left
    assert "6 of 6 normalisations and 1 of 6 convolutions" in str(graph)
    assert str(fastres.compile_report()) == "no graph was compiled"
    with pytest.raises(TypeError, match="clear"):
        fastres.compile_report(clear=1)  # type: ignore[arg-type]


def test_other_batch_sizes_compile_once_more_and_then_no_more():
    model = networks.ResNet(networks.Basic).double()
    plain, compiled = copy.deepcopy(model), fastres.compile(model, options=ALWAYS)
    for batch in (2, 3, 5, 7, 4):
        x = images(batch, 3, 12, 12)
        y, expected = compiled(x), plain(x)
        assert (y - expected).abs().max() < compare.EXACT
        y.sum().backward()
        expected.sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and (p.grad - q.grad).abs().max() < compare.EXACT
    assert len(fastres.compile_report()) == 2


class Broken(nn.Module):
    """Two graphs, with a break between a normalisation and the ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        torch._dynamo.graph_break()
        return F.relu(self.last(F.relu(y)))


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x[x[:, 0, 0, 0] > 0])))
        return F.max_pool2d(y, 2).sum(0)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_shape_that_depends_on_data_is_left(inner):
    model = Chosen().eval().to(memory_format=torch.channels_last)
    compiled = fastres.compile(model, options=ALWAYS | {"inner": inner, "conv_algorithm": "winograd"})
    for seed in range(3):
        x = images(8, 3, 6 + seed, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled(x), model(x))
    left = [line.reason for line in fastres.compile_report()[0].left]
    assert set(left) == {"its input's shape depends on data"}


class InItsOwnStrides(nn.Module):
    """PyTorch's normalisation gives what is neither contiguous nor channels_last contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.bn = nn.BatchNorm1d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
        columns = x.transpose(1, 3).contiguous(memory_format=torch.contiguous_format).transpose(1, 3)
        return F.relu(self.flat(rows)), F.relu(self.bn(x.transpose(2, 3))), F.silu(self.bn(columns) + columns)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_strides_are_those_of_a_normalisation_whatever_it_reads(layout):
    for report in compare.check(InItsOwnStrides, [(2, 6, 4, 5)], layout=layout):
        assert report.fused_norms == 0 and len(report.left) == report.norms == 3


def test_graph_breaks():
    reports = compare.check(Broken, networks.IMAGES)
    assert [r.fused_norms for r in reports] == [1, 1, 1, 1] and [r.pointwise for r in reports] == [0, 1, 0, 1]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 8, 3, padding=1), networks.Basic(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.block, F.relu(self.bn(self.conv(x))), use_reentrant=False)
        return torch.sigmoid(y)


def test_a_checkpointed_part_is_rewritten_and_counts_as_torch_compile_counts_it():
    model = Checkpointed().double()
    plain, x = copy.deepcopy(model), images(2, 3, 8, 8)
    compiled, peer = fastres.compile(model, options=ALWAYS), torch.compile(plain, backend="aot_eager")
    for _ in range(2):
        y, expected = compiled(x), peer(x)
        y.sum().backward()
        expected.sum().backward()
        assert (y - expected).abs().max() < compare.EXACT
    for (name, t), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert (t.double() - other.double()).abs().max() < compare.EXACT, name
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and (p.grad - q.grad).abs().max() < compare.EXACT
    report = fastres.compile_report()[0]
    assert report.fused_norms == 3 and report.pointwise == 4 and report.inner == "aot_eager"


def test_a_copy_of_a_compiled_network_is_one_of_its_own():
    compiled = fastres.compile(networks.ResNet(networks.Basic).double(), options=ALWAYS)
    x = images(2, 3, 12, 12)
    compiled(x)
    clone = copy.deepcopy(compiled)
    before = {name: t.clone() for name, t in compiled.state_dict().items()}
    clone(x + 1)
    after = compiled.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert int(clone.state_dict()["_orig_mod.bn1.num_batches_tracked"]) == 2


class Aliased(nn.Module):
    """Two inputs that may be views of one tensor; no guard says that they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        y = self.bn(x)
        r.mul_(2.0)
        return F.relu(y)


def test_inputs_may_share_memory_in_a_later_call():
    model = Aliased().double().eval()
    compiled = fastres.compile(model, options=ALWAYS)
    with torch.no_grad():
        compiled(images(2, 3, 4, 4), images(2, 3, 4, 4))
        base = images(2, 3, 4, 4)
        expected = model(base.clone(), torch.zeros(2, 3, 4, 4, dtype=torch.float64))
        assert (compiled(base.view(2, 3, 4, 4), base.view(2, 3, 4, 4)) - expected).abs().max() < compare.EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["basic", "unet_bias"])
def test_autocast(name, dtype):
    make, shapes = networks.NETWORKS[name]
    training, evaluation = compare.check(
        make, shapes, dtype=torch.float32, layout="channels_last", autocast=dtype, conv_algorithm="winograd"
    )
    assert training.fused_norms == training.norms == evaluation.fused_norms
    assert (training.fused_convolutions > 1) is (dtype == torch.bfloat16)


def test_dropout_is_part_of_the_operator():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.25)).double()
    x = images(4, 3, 8, 8)
    compiled = fastres.compile(model, options=ALWAYS)
    y = compiled(x)
    expected = model[:3](x) / 0.75
    dropped = y == 0
    assert torch.allclose(y[~dropped], expected[~dropped], atol=compare.EXACT)
    assert abs(float(dropped[expected > 0].double().mean()) - 0.25) < 0.1
    assert fastres.compile_report()[0].pointwise == 2
    model.eval()
    assert (compiled(x) - model(x)).abs().max() < compare.EXACT


def test_a_transform_of_functorch_is_right():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double().eval()
    x = images(4, 2, 3, 4, 4)
    mapped = torch.func.vmap(model)
    assert (fastres.compile(mapped, options=ALWAYS)(x) - mapped(x)).abs().max() < compare.EXACT


def test_small_normalisations_are_left_to_pytorch():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    x = images(2, 3, 4, 4, dtype=torch.float32)
    assert torch.equal(fastres.compile(model)(x), model(x))
    (graph,) = fastres.compile_report()
    assert graph.fused_norms == 0 and "96 elements" in graph.left[0].reason
