"""Random networks against plain PyTorch, and the networks of ten lines that earlier ones were cut down to.

A failure prints the text of the network; `FASTRES_TEST_FUZZ=seed` runs that one alone.
"""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from tests import oracle
from tests.compiled import compare, programs
from tests.compiled.traps import Trap

SEEDS = [int(s) for s in os.environ["FASTRES_TEST_FUZZ"].split(",")] if "FASTRES_TEST_FUZZ" in os.environ else None
USUAL, MANY = 25, 500
# (training, gradients), each in a network of its own, so that one that PyTorch refuses spoils no other.
PHASES = ((True, True), (True, False), (False, False), (False, True))
STEPS = 2
FLOAT32 = 1e-5
# Of PyTorch itself in float32: one sample of such errors does not bound those of another order of summation.
ILL_CONDITIONED = 2e-5
DRAWS = 20


class Kinks(TorchDispatchMode):
    """Whether float32 may take an activation's input for one on the other side of a kink. Zeros that activations and
    fills have made are zeros in every dtype.
    """

    near = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kink in compare._KINKS.get(func._schema.name, ()):
            distance = (args[0].double() - kink).abs()
            self.near |= bool(((distance < 1e-5) & (distance != 0)).any())
        return func(*args, **(kwargs or {}))


def prepared(seed: int, attempt: int) -> tuple[programs.Program, list[Tensor]]:
    gen = oracle.generator("fuzz", seed, attempt)
    torch.manual_seed(seed)
    model = programs.Program(seed).double()
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.dim() == 1 and t.is_floating_point():
                t += (0.0 if "var" in name else 0.2) * torch.randn(t.shape, generator=gen, dtype=t.dtype)
    return model, [torch.randn(programs.SHAPE, generator=gen, dtype=torch.float64) for _ in range(2 * STEPS)]


def run(model: programs.Program, call: Any, inputs: list[Tensor], training: bool, gradients: bool) -> compare.Run:
    """What two calls give: outputs, which of them share memory, gradients where there are any, buffers, the input."""
    model.train(training)
    found = compare.Run()
    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        x, z = (t.clone() for t in inputs[2 * step :][:2])
        x.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            out = call(x, z)
            found.note(f"step {step}: output", out)
            of = [t.untyped_storage().data_ptr() for t in (*out, x, z)]
            found.note(f"step {step}: shared memory", torch.tensor([float(of.index(p)) for p in of]))
            found.note(f"step {step}: strides", torch.tensor([t.stride() for t in out], dtype=torch.float64))
            leaves = [t for t in out if t.requires_grad]
            found.note(f"step {step}: differentiable", torch.tensor([float(t.requires_grad) for t in out]))
            if leaves:
                torch.stack([(t**2).mean() for t in leaves]).sum().backward()
        for name, t in [("x", x), *model.named_parameters()]:
            if t.grad is not None:
                found.note(f"step {step}: gradient of {name}", t.grad)
        found.note(f"step {step}: z", z)
        found.note(f"step {step}: buffer", [b for b in model.buffers() if b.is_floating_point()])
        found.note(f"step {step}: count", [b.double() for b in model.buffers() if not b.is_floating_point()])
    return found


def attempt(model: programs.Program, inputs: list[Tensor], phase: tuple[bool, bool], **options: Any) -> Any:
    """(what it gave, whether an activation came close to a kink), or the error with which PyTorch refused."""
    model = copy.deepcopy(model)
    call = torch.compile(model, backend=fastres.backend.fastres, options=options) if options else model
    with Kinks() if not options else contextlib.nullcontext() as kinks:
        try:
            return run(model, call, inputs, *phase), bool(kinks and kinks.near)
        except RuntimeError as error:
            return error, False


def by_inner(inner: str, model: programs.Program, inputs: list[Tensor], phase: tuple[bool, bool]) -> compare.Run:
    """What PyTorch's backend gives without ours: AOTAutograd computes what a graph has written out of what it has
    overwritten, once more for backward (in a network that halves its buffers, for example).
    """
    model = copy.deepcopy(model)
    with compare.fresh():
        return run(model, torch.compile(model, backend=inner), inputs, *phase)


def is_refused(model: programs.Program, inputs: list[Tensor], phase: tuple[bool, bool]) -> bool:
    """Whether plain PyTorch refuses the network; under a mode, as `Kinks` is, it overlooks what foreach calls write."""
    model = copy.deepcopy(model)
    try:
        run(model, model, inputs, *phase)
    except RuntimeError:
        return True
    return False


def check(seed: int) -> None:
    """Compare a network in all phases: in float64, or in float32 and one of the layouts by our convolutions."""
    text = f"seed {seed}, FASTRES_TEST_SEED={oracle.SEED}\n{programs.text_of(seed)}"
    kind = ("float64", "nchw", "channels_last")[seed % 3]
    inner = ("eager", "aot_eager")[seed // 3 % 2]
    how = {"conv_algorithm": "torch" if kind == "float64" else "winograd", "inner": inner, "smallest": 0}
    for phase in PHASES:
        for draw in range(DRAWS):
            model, inputs = prepared(seed, draw)
            exact, near = attempt(model, inputs, phase)
            if kind == "float64" or not near:
                break
        else:
            continue
        allowed = compare.EXACT
        if kind != "float64":
            model, inputs = compare.prepared(model, [inputs], torch.float32, kind)
            inputs = inputs[0]
            eager, _ = attempt(model, inputs, phase)
            if isinstance(eager, RuntimeError):
                exact = eager  # what PyTorch refuses may depend on the layout
            elif not isinstance(exact, RuntimeError):
                error, _ = compare.worst(eager, exact)
                if error > ILL_CONDITIONED:
                    continue
                allowed = FLOAT32 + 8 * error
                exact.values |= {name: t for name, t in eager.values.items() if "strides" in name}
        with compare.fresh():
            ours, _ = attempt(model, inputs, phase, **how)
        if isinstance(exact, RuntimeError) or (isinstance(ours, RuntimeError) and is_refused(model, inputs, phase)):
            continue  # what PyTorch refuses may be refused or computed
        assert isinstance(ours, compare.Run), f"{phase}, {how}: {type(ours).__name__}: {ours}\n{text}"
        if inner != "eager":
            # AOTAutograd gives what out= has written strides of its own.
            ours.values |= {name: t for name, t in exact.values.items() if "strides" in name}
        assert ours.values.keys() == exact.values.keys(), f"{phase}: {ours.values.keys() ^ exact.values.keys()}\n{text}"
        error, where = compare.worst(ours, exact)
        if error > allowed and inner != "eager":
            exact.values |= by_inner(inner, model, inputs, phase).values
            exact.values |= {name: t for name, t in ours.values.items() if "strides" in name}
            error, where = compare.worst(ours, exact)
        assert error <= allowed, f"{phase}, {how}: {where}: error {error:.3e}, allowed {allowed:.3e}\n{text}"


@pytest.fixture(autouse=True)
def copies_cost_nothing(monkeypatch):
    """Small networks in NCHW go to channels_last as well."""
    compare.make_copies_free(monkeypatch)


@pytest.mark.parametrize("seed", SEEDS or range(USUAL))
def test_a_random_network_gives_what_pytorch_gives(seed):
    with oracle.threads(1):
        check(seed)


@pytest.mark.slow
def test_many_random_networks_give_what_pytorch_gives():
    failures = []
    with oracle.threads(1):
        for seed in range(USUAL, MANY):
            try:
                check(seed)
            except AssertionError as error:
                failures.append(str(error))
    assert not failures, f"{len(failures)} networks\n" + "\n\n".join(failures)


# ------------------------------------------------------------------------------------------------------- cut to size


class Small(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Conv2d(3, 8, 1, bias=False)


class ProjectionAfterActivation(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))) + self.second(self.projection(x))


class ResidualOfSmoothActivationOverwritten(Small):
    """Backward computes SiLU's input again out of the residual."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.other(x)
        y = F.silu(self.bn(self.conv(x)) + r)
        r.mul_(0.5)
        return y, r * 1


class IdleDropoutByName(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.dropout(input=self.bn(self.conv(x)), p=0.0))


class ShapeChangedInPlace(Small):
    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        c.unsqueeze_(2)
        bn = self.bn
        y = F.batch_norm(c, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)
        return F.relu(y)


class WrittenBetweenTwoNorms(Small):
    """The statistics that a convolution takes are the first one's only."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            c = self.conv(x)
            y = self.bn(c)
            c[:, :2].mul_(3.0)
            z = self.second(c)
        return y + z + self.other(x)


SMALL = [
    ProjectionAfterActivation, ResidualOfSmoothActivationOverwritten, IdleDropoutByName, ShapeChangedInPlace,
    WrittenBetweenTwoNorms,
]  # fmt: skip


@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize("network", SMALL, ids=lambda n: n.__name__)
def test_a_small_network_gives_what_pytorch_gives(network, winograd):
    how = {"dtype": torch.float32, "layout": "channels_last", "conv_algorithm": "winograd"} if winograd else {}
    for report in compare.check(network, [(2, 3, 8, 8)], **how):
        assert report.fused_norms == report.norms > 0


class OutputsThatShareMemory(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.bn(self.conv(x)))
        return y, y.flatten(1)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_outputs_in_nchw_share_memory_where_they_do_in_pytorch(inner):
    x = torch.randn(2, 3, 8, 8, generator=oracle.generator("shared outputs", inner))
    options = {"inner": inner, "conv_algorithm": "winograd", "smallest": 0}
    with compare.fresh():
        y, flat = torch.compile(OutputsThatShareMemory(), backend=fastres.backend.fastres, options=options)(x)
        (graph,) = fastres.compile_report()
    assert graph.operators["conv3x3_with_statistics"] == 1
    assert y.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
