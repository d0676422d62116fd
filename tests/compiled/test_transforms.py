"""What is done to or around a compiled network: transforms of torch.func, modes, networks within networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap

import fastres
from tests import oracle
from tests.compiled import compare

ALWAYS = {"smallest": 0}


@pytest.fixture(autouse=True)
def _alone():
    with compare.fresh():
        yield


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=oracle.generator("transforms", shape), dtype=torch.float64)


def network(*, training: bool, running: bool = True) -> nn.Module:
    torch.manual_seed(oracle.SEED % 1000)
    norms = [nn.BatchNorm2d(8, track_running_stats=running) for _ in range(2)]
    layers = [nn.Conv2d(3, 8, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 1), norms[1], nn.SiLU()]
    return nn.Sequential(*layers).double().train(training)


def same(found: object, expected: object) -> None:
    a, b = (torch.utils._pytree.tree_leaves(t) for t in (found, expected))
    assert len(a) == len(b)
    assert all((p - q).abs().max() < compare.EXACT for p, q in zip(a, b, strict=True))


def gradient_of_parameters(model, x):
    values = {name: p.detach() for name, p in model.named_parameters()}
    return list(grad(lambda p: functional_call(model, p, (x,)).square().sum())(values).values())


OVER = {
    "grad": lambda model, x: grad(lambda x: model(x).square().sum())(x),
    "grad of parameters": gradient_of_parameters,
    "vmap": lambda model, x: vmap(model)(x[:, None]),
    "jvp": lambda model, x: jvp(model, (x,), (x.cos(),)),
}


@pytest.mark.parametrize("called", [False, True], ids=["first", "called before"])
@pytest.mark.parametrize("name", OVER)
def test_a_transform_over_a_compiled_network_is_right(name, called):
    plain, x = network(training=False), images(4, 3, 6, 6)
    compiled = fastres.compile(copy.deepcopy(plain), options=ALWAYS)
    if called:
        compiled(x)
    same(OVER[name](compiled, x), OVER[name](plain, x))


WITHIN = {
    "grad": lambda model, x: grad(lambda x: model(x).square().sum())(x) + model(x).mean(),
    "jacrev": lambda model, x: jacrev(lambda x: model(x).sum((0, 2, 3)))(x),
    "vmap": lambda model, x: vmap(model)(x[:, None].expand(-1, 2, -1, -1, -1)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WITHIN)
def test_a_transform_within_a_compiled_function_is_left_to_pytorch(name, training):
    model, x = network(training=training, running=not training), images(4, 3, 6, 6)
    same(fastres.compile(lambda x: WITHIN[name](model, x), options=ALWAYS)(x), WITHIN[name](model, x))
    left = [line for graph in fastres.compile_report() for line in graph.left if "torch.func" in line.reason]
    fused = sum(graph.fused_norms for graph in fastres.compile_report())
    assert (len(left), fused) == {"grad": (4, 2), "jacrev": (4, 0), "vmap": (0, 0)}[name]


def test_running_statistics_that_a_transform_would_move_are_refused_as_in_eager():
    x = images(4, 3, 6, 6)
    for model in (network(training=True), fastres.compile(network(training=True), options=ALWAYS)):
        with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
            grad(lambda x, model=model: model(x).sum())(x)
        with pytest.raises(RuntimeError, match="running_mean or running_var"):
            vmap(model)(x[:, None])


class Nested(nn.Module):
    """A network inside another one: compiled by itself, or kept from Dynamo."""

    def __init__(self, around) -> None:
        super().__init__()
        self.inner, self.bn = network(training=True), nn.BatchNorm2d(8).double()
        self.call = around(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.call(x)))


@pytest.mark.parametrize(
    ("around", "fused"),
    [(lambda m: fastres.compile(m, options=ALWAYS), [3, 3]), (torch._dynamo.disable, [1, 1])],
    ids=["compiled", "disabled"],
)
def test_a_network_within_a_compiled_one(around, fused):
    inputs = [[images(4, 3, 6, 6) + i] for i in range(3)]
    ours, plain = Nested(around), Nested(lambda m: m)
    found = compare.train_and_evaluate(ours, fastres.compile(ours, options=ALWAYS), inputs)
    assert compare.worst(found, compare.train_and_evaluate(plain, plain, inputs))[0] < compare.EXACT
    assert [graph.fused_norms for graph in fastres.compile_report()] == fused


def test_a_mode_is_inductor_s():
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double().eval(), images(2, 3, 6, 6)
    compiled = torch.compile(model, backend=fastres.backend.fastres, mode="reduce-overhead")
    same(compiled(x), model(x))
    assert fastres.compile_report()[0].inner == "inductor"
    with pytest.raises(ValueError, match=r"mode: expected one of default, .*, got 'fast'"):
        fastres.backend.fastres(torch.fx.symbolic_trace(nn.ReLU()), [], mode="fast")
