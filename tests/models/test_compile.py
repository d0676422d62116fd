from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastres import models
from fastres.fuse import unfuse
from fastres.nn import FusedBasicBlock, FusedBottleneck, FusedPreactivationBlock, ResidualBlock
from tests.parity import FORMATS, scramble, twin


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, x, target):
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("conv_algorithm", ["auto", "winograd"])
@pytest.mark.parametrize(
    ("name", "dropout"), [("resnet18", 0.2), ("article", 0.5), ("resnet20", 0.2), ("wrn10-2", 0.3)]
)
def test_a_training_step_compiles_without_a_graph_break(name, dropout, conv_algorithm):
    torch.manual_seed(0)
    model = models.create(name, num_classes=4, dropout=dropout, conv_algorithm=conv_algorithm)
    eager = twin(model)
    x, target = torch.randn(2, 3, 16, 16), torch.tensor([1, 3])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(1)
        loss = step(compiled, x, target)
        torch.manual_seed(1)
        torch.testing.assert_close(loss, step(eager, x, target))
    for (key, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=key)
    for (key, b), c in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=key)


@pytest.mark.parametrize("conv_algorithm", ["auto", "winograd"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: FusedBasicBlock(8, 8, **options),
        lambda **options: FusedBottleneck(8, 2, **options),
        lambda **options: ResidualBlock(8, 8, dropout=0.0, **options),
        lambda **options: FusedPreactivationBlock(8, 8, **options),
        lambda **options: FusedPreactivationBlock(8, 12, **options),
    ],
    ids=["basic", "bottleneck", "residual", "preactivation", "preactivation projection"],
)
def test_a_block_compiles_with_the_default_compiler(make, conv_algorithm):
    torch.manual_seed(0)
    block = make(conv_algorithm=conv_algorithm)
    eager = twin(block)
    x = torch.randn(2, 8, 6, 6)
    # Inductor draws other random numbers than eager, so what is compared is all but dropout.
    compiled = torch.compile(block, fullgraph=True)
    for module in (compiled, eager):
        module(x).square().sum().backward()
    for p, q in zip(block.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("conv_algorithm", ["auto", "winograd"])
@pytest.mark.parametrize("name", ["resnet18", "article", "resnet20", "wrn10-2"])
def test_evaluation_compiles_without_a_graph_break(name, conv_algorithm):
    torch.manual_seed(0)
    model = scramble(models.create(name, num_classes=4, conv_algorithm=conv_algorithm)).eval()
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("conv_algorithm", ["auto", "winograd"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "article"])
def test_the_evaluation_model_can_be_exported(name, no_grad, memory_format, conv_algorithm):
    torch.manual_seed(0)
    model = scramble(models.create(name, num_classes=4, conv_algorithm=conv_algorithm)).eval()
    model = model.to(memory_format=memory_format)
    x, y = (torch.randn(n, 3, 16, 16).contiguous(memory_format=memory_format) for n in (2, 5))
    with torch.set_grad_enabled(not no_grad):
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert not fastres_operators(program)
    plain = unfuse(model)
    with torch.no_grad():
        # The exported network is the plain one, to the order in which its operators sum.
        theirs, exact = plain(y), twin(plain).double()(y.double())
        assert (program.module()(y) - exact).norm() <= 2 * (theirs - exact).norm()


def fastres_operators(program):
    return [node.name for node in program.graph.nodes if "fastres" in str(node.target)]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "article", "resnet20", "wrn10-2"])
def test_an_exported_training_program_has_the_gradients_of_the_network(name, memory_format):
    torch.manual_seed(0)
    model = scramble(models.create(name, num_classes=4, dropout=0.0, conv_algorithm="winograd")).double()
    model = model.to(memory_format=memory_format)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=memory_format)
    program = torch.export.export(twin(model), (x,))
    assert not fastres_operators(program)
    exported, dy = program.module(), torch.randn(2, 4, dtype=torch.float64)
    for module in (exported, model):
        module(x).backward(dy)
    wanted = dict(model.named_parameters())
    found = dict(exported.named_parameters())
    assert found.keys() == wanted.keys()
    for key, p in found.items():
        torch.testing.assert_close(p.grad, wanted[key].grad, rtol=1e-7, atol=1e-9, msg=key)
    buffers = dict(exported.named_buffers())
    for key, b in model.named_buffers():
        torch.testing.assert_close(buffers[key], b, msg=key)
