"""The Triton launchers in the interpreter against PyTorch in float64: outputs, running statistics, every gradient.

The fewest cases that run every line of the kernels with every compile-time flag.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import activations, contract
from fastres.activations import Activation, Kind
from fastres.contract import PLAIN, Act, Norm, NormParams, Residual, Statistics, Sums
from tests import backend
from tests.oracle import LAYOUTS, activation, assert_close, double_norm, generator, near_zero, norm

pytestmark = pytest.mark.skipif(backend.NAME != "triton", reason="not the process of Triton's interpreter")

if backend.NAME == "triton":
    from fastres.kernels import batch_norm_act as launchers

# Whole tiles in both formats; and nothing that divides.
SHAPES = [(4, 8, 8, 8), (3, 37, 5, 7)]
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "elu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
ALPHAS = {"leaky_relu": 0.2, "elu": 0.7}
SEED = torch.tensor([-(2**61) - 12345])


class Case(NamedTuple):
    """One forward and backward pass."""

    kind: str
    residual: str
    order: str
    dropout_p: float
    two_gradients: bool
    training: bool
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype

    @property
    def act(self) -> Act:
        return Act(self.kind, ALPHAS.get(self.kind, 0.0), self.dropout_p, self.order)

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in self)


# A residual that is not there has no order.
PLACES = [("none", "add_act"), *itertools.product(("plain", "normalised"), contract.ORDERS)]


def cases() -> list[Case]:
    """Everything that is a branch of its own for one kind of each sort, and for the others every residual once.

    Formats, dtypes and shapes are drawn for each case: they meet all the rest over a few runs.
    """
    draw = random.Random(str(generator("cases").initial_seed()))
    found = []
    for kind in activations.KINDS:
        whole = kind in ("identity", "relu", "leaky_relu", "silu")
        for (residual, order), dropout_p, two in itertools.product(PLACES, (0.0, 0.3), (False, True)):
            if whole or (dropout_p > 0) == two:
                training = whole or order == "add_act"
                found.append(
                    Case(
                        kind, residual, order, dropout_p * training, two, training, draw.choice(SHAPES),
                        draw.choice(list(LAYOUTS)), draw.choice(backend.GPU_DTYPES),
                    )
                )  # fmt: skip
    return found


def preactivation(x: Tensor, r: Tensor | None, act: Act) -> Tensor:
    return x if r is None or act.order == "act_add" else x + r


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_pass_is_pytorch_s_in_float64(case):
    check(case)


def check(case: Case) -> None:
    act, gen = case.act, generator(str(case))
    x, dy, dy2, r = (activation(case.shape, case.dtype, case.layout, gen) for _ in range(4))
    own, other = (norm(case.shape[1], case.dtype, gen) for _ in range(2))
    names = ["x", "weight", "bias"] + ["r"] * (case.residual != "none")
    names += ["r_weight", "r_bias"] * (case.residual == "normalised")

    # The oracle.
    exact_own, exact_other = double_norm(own), double_norm(other)
    exact_x, exact_r = (t.double().requires_grad_() for t in (x, r))
    found = [exact_x, exact_own.weight, exact_own.bias, exact_r, exact_other.weight, exact_other.bias]
    inputs = dict(zip(names, found, strict=False))
    z = batch_norm(exact_x, exact_own, case.training)
    added = None
    if case.residual != "none":
        added = batch_norm(exact_r, exact_other, case.training) if case.residual == "normalised" else exact_r
    into_f = preactivation(z, added, act)
    expected = act.activation.forward(into_f)
    if case.dropout_p > 0:
        keep = contract.dropout_keep(x.shape, SEED, case.dropout_p)
        expected = torch.where(keep, expected / (1 - case.dropout_p), 0)
    if added is not None and act.order == "act_add":
        expected = expected + added
    for kink in KINKS.get(case.kind, ()):
        # Which side an element is on, float32 cannot tell.
        doubtful = near_zero(into_f.detach() - kink, case.dtype)
        dy, dy2 = (torch.where(doubtful, torch.zeros((), dtype=case.dtype), t) for t in (dy, dy2))
    whole = dy.double() + dy2.double() if case.two_gradients else dy.double()
    gradients = dict(zip(inputs, torch.autograd.grad(expected, list(inputs.values()), whole), strict=True))

    # The launchers.
    own, other = (NormParams(*(t.detach() for t in n[:4]), n.momentum, n.eps) for n in (own, other))
    value = None if case.residual == "none" else r
    other = other if case.residual == "normalised" else None
    if case.training:
        y, mean, rstd, r_mean, r_rstd, bits = launchers.training(x, own, None, value, other, None, SEED, act)
        for n, e, t in ((own, exact_own, "norm"), (other, exact_other, "residual_norm")):
            if n is not None:
                assert_close(n.running_mean, e.running_mean, f"{t}.running_mean", length=x.numel())
                assert_close(n.running_var, e.running_var, f"{t}.running_var", length=x.numel())
    else:
        y, bits = launchers.inference(x, own, value, other, act, True)
        mean, rstd = constants(own)
        r_mean, r_rstd = constants(other or own)
    saves_bits = act.saves_bits(value is not None) if case.training else act.gated
    assert bits.numel() == (contract.bits_size(x) if saves_bits else 0)
    assert_close(y, expected.detach(), "y")
    residual = Residual(r) if value is not None and act.reads_residual() else None
    if other is not None:
        residual = Residual(r, r_mean, r_rstd, other.weight, other.bias)
    dx, dr, *sums = launchers.backward(
        dy, dy2 if case.two_gradients else None, x, Norm(mean, rstd, own.weight, own.bias), residual, bits, act,
        case.training, [True, value is not None, True],
    )  # fmt: skip
    results = dict(zip(("x", "weight", "bias", "r", "r_weight", "r_bias"), (dx, *sums[:2], dr, *sums[2:]), strict=True))
    # Where the first launch stores the sum of two gradients, the second starts from what was rounded.
    stored = 0.5 * torch.finfo(case.dtype).eps * case.two_gradients * float(whole.abs().max()) / (1 - case.dropout_p)
    for name, exact in gradients.items():
        noise = 4 * stored if name in ("x", "r") else 0.0
        assert_close(results[name], exact, f"gradient of {name}", length=x.numel() // x.shape[1], noise=noise)


def batch_norm(x: Tensor, n: NormParams, training: bool) -> Tensor:
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, training, n.momentum, n.eps)


def constants(n: NormParams) -> tuple[Tensor, Tensor]:
    return n.running_mean, torch.rsqrt(n.running_var + n.eps)


# -------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("kind", activations.KINDS)
def test_nan_and_infinity_pass_as_in_pytorch(kind):
    """By an identity of a normalisation, so that z is x: the kernels' f and f' alone, in float32."""
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 6.0, -3.0, 3.0])
    x = special.view(1, 1, 1, 8).expand(1, 8, 8, 8).contiguous()
    act = Act(kind, ALPHAS.get(kind, 0.0), 0.0, "add_act")
    one, zero = torch.ones(8), torch.zeros(8)
    y, bits = launchers.apply(x, Norm(zero, one, None, None), None, None, act, True)
    # In float32 PyTorch's own vector loops make NaN of gelu(inf).
    torch.testing.assert_close(y, act.activation.forward(x.double()).float(), equal_nan=True)
    dx, *_ = launchers.backward(
        torch.ones_like(x), None, x, Norm(zero, one, None, None), None, bits, act, False, [True, False, False]
    )
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(act.activation.forward(leaf).sum(), leaf)
    finite = x.isfinite()
    torch.testing.assert_close(dx[finite], expected[finite])
    if act.gated:
        # PyTorch's own backward of relu6 is of two minds about NaN: in its vector loop it does not pass.
        assert torch.equal(dx, act.activation.gradient(x))


@pytest.mark.parametrize("kind", [k for k, v in activations.KINDS.items() if v.passes is None and k != "identity"])
def test_functions_keep_their_precision_over_their_whole_range(kind):
    """f and f' at 4,096 points against float64, where exponentials under- and overflow as well."""
    x = torch.cat([torch.linspace(-100, 100, 2048), torch.logspace(-8, 0, 1024), -torch.logspace(-8, 0, 1024)])
    x = x.view(1, 8, 16, 32)
    act = Act(kind, ALPHAS.get(kind, 0.0), 0.0, "add_act")
    own = Norm(torch.zeros(8), torch.ones(8), None, None)
    y, _ = launchers.apply(x, own, None, None, act, True)
    dx, _ = launchers.backward_apply(torch.ones_like(x), x, own, None, None, None, None, act, [True, False])
    for name, actual, expected in (
        ("f", y, act.activation.forward(x.double())),
        ("f'", dx, act.activation.gradient(x.double())),
    ):
        eps = 2**-23
        allowed = 16 * eps * expected.abs() + 4 * eps * x.double().abs().clamp(max=1)
        assert ((actual.double() - expected).abs() <= allowed + 4 * eps * (name == "f'")).all(), name


if backend.NAME == "triton":
    import triton
    import triton.language as tl

    @triton.jit
    def _softsign(z, alpha):
        return z / (alpha + tl.abs(z))

    @triton.jit
    def _softsign_gradient(z, alpha):
        return alpha / ((alpha + tl.abs(z)) * (alpha + tl.abs(z)))


@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
def test_an_activation_from_outside_the_package_needs_an_entry_in_two_tables(residual, monkeypatch):
    from fastres.kernels.activations import FUNCTIONS, Functions

    definition = Kind(lambda z, a: z / (a + z.abs()), lambda z, a: a / (a + z.abs()).square(), compiled=True)
    monkeypatch.setitem(ALPHAS, "softsign", 1.5)
    monkeypatch.setitem(FUNCTIONS, "softsign", Functions(_softsign, _softsign_gradient))
    activations.register("softsign", definition)
    try:
        check(Case("softsign", residual, "add_act", 0.3, False, True, SHAPES[1], "channels_last", torch.float32))
    finally:
        activations.unregister("softsign")


def test_a_kind_without_functions_is_refused_by_name():
    x, own = torch.zeros(1, 8, 2, 2), Norm(torch.zeros(8), torch.ones(8), None, None)
    activations.register("softsign", Kind(lambda z, _: F.softsign(z), lambda z, _: (1 + z.abs()) ** -2))
    try:
        with pytest.raises(ValueError, match=r"kind: expected one of .*silu.*got 'softsign'"):
            launchers.apply(x, own, None, None, Act("softsign", 0.0, 0.0, "add_act"), True)
    finally:
        activations.unregister("softsign")


# ----------------------------------------------------------------------------------------------- statistics in parts


@pytest.mark.parametrize("residual", ["none", "normalised"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_uneven_parts_of_a_batch_reduce_to_the_whole(layout, residual):
    """Statistics of all parts with their count go into each part's forward, sums of all parts into its backward."""
    gen, act = generator("parts", layout, residual), Act("silu", 0.0, 0.0, "add_act")
    x, dy, r = (activation((5, 10, 4, 3), torch.float32, layout, gen) for _ in range(3))
    own, other = (norm(10, torch.float32, gen) for _ in range(2))
    exact_x, exact_r, exact_own, exact_other = x.double(), r.double(), double_norm(own), double_norm(other)
    inputs = [exact_x.requires_grad_(), exact_r.requires_grad_()]
    z = batch_norm(exact_x, exact_own, True)
    normed = residual == "normalised"
    expected = F.silu(z + batch_norm(exact_r, exact_other, True) if normed else z)
    gradients = torch.autograd.grad(expected, inputs[: 1 + normed], dy.double())

    parts = [[p.contiguous(memory_format=LAYOUTS[layout]) for p in t.split([2, 3])] for t in (x, dy, r)]
    shared = []
    for values in (parts[0], parts[2]):
        statistics = [launchers.stats(p) for p in values]
        shared.append(Statistics.combined([Statistics(mean, m2, count) for count, mean, m2 in statistics]))
    outputs, calls = [], []
    for part, d, rest in zip(*parts, strict=True):
        mine, theirs = (NormParams(*(t.detach().clone() for t in n[:4]), n.momentum, n.eps) for n in (own, other))
        given = (rest, theirs, shared[1]) if normed else (None, None, None)
        y, mean, rstd, r_mean, r_rstd, bits = launchers.training(part, mine, shared[0], *given, None, act)
        for n, e in ((mine, exact_own), (theirs, exact_other))[: 1 + normed]:
            assert_close(n.running_mean, e.running_mean, "running_mean")
            assert_close(n.running_var, e.running_var, "running_var")
        added = Residual(rest, r_mean, r_rstd, theirs.weight, theirs.bias) if normed else None
        outputs.append(y)
        calls.append((d, part, Norm(mean, rstd, mine.weight, mine.bias), added, bits))
    assert_close(torch.cat(outputs), expected.detach(), "y")
    reduced = [launchers.backward_reduce(d, None, *rest, act) for d, *rest in calls]
    sums = [sum(values) for values in zip(*reduced, strict=True)][:4]
    through = Sums(*sums) if normed else Sums(*sums[:2])
    results = [launchers.backward_apply(*c, through, shared[0].count, act, [True, normed]) for c in calls]
    for i, exact in enumerate(gradients):
        assert_close(torch.cat([part[i] for part in results]), exact, f"gradient {i}", length=60)


@pytest.mark.parametrize("given", ["x", "residual", "both"])
def test_given_statistics_without_a_count_are_those_of_the_tensor(given):
    gen, act = generator("given", given), Act("relu", 0.0, 0.0, "add_act")
    # Of several programs the first alone stores what is given.
    x, r = (activation((8, 18, 16, 16), torch.float32, "channels_last", gen) for _ in range(2))
    results = []
    for known in (False, True):
        norms = [NormParams(torch.zeros(18), torch.ones(18), None, None, 0.3, 0.05) for _ in range(2)]
        statistics = [
            Statistics(*launchers.stats(t)[1:]) if known and given in (name, "both") else None
            for name, t in (("x", x), ("residual", r))
        ]
        out = launchers.training(x, norms[0], statistics[0], r, norms[1], statistics[1], None, act)
        results.append([*out[:5], *norms[0][:2], *norms[1][:2]])
    for a, b in zip(*results, strict=True):
        assert_close(a, b.double(), "with given statistics", length=2048)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, r"dy: expected shape \(2, 8, 2, 2\) and strides", {"dy": torch.ones(1, 8, 2, 2)}),
        (TypeError, r"dy2: expected dtype torch.float32, got torch.float16", {"dy2": torch.ones(2, 8, 2, 2).half()}),
        (ValueError, r"vector: expected size \(8,\)", {"norm": Norm(torch.zeros(9), torch.ones(8), None, None)}),
        (TypeError, r"vector: expected dtype", {"norm": Norm(torch.zeros(8).double(), torch.ones(8), None, None)}),
        (ValueError, r"bits: expected 16 bytes, got 15", {"bits": torch.zeros(15, dtype=torch.uint8)}),
    ],
)
def test_what_would_leave_a_tensor_is_refused_by_name(error, message, changed):
    x, own = torch.ones(2, 8, 2, 2), Norm(torch.zeros(8), torch.ones(8), None, None)
    arguments = {"dy": x, "dy2": None, "x": x, "norm": own, "residual": None, "bits": None, "act": PLAIN} | changed
    with pytest.raises(error, match=message):
        launchers.backward_reduce(**arguments)


def test_a_malformed_count_is_refused_by_name():
    x, own = torch.ones(2, 8, 2, 2), NormParams(None, None)
    statistics = Statistics(torch.zeros(8), torch.ones(8), torch.ones(1))
    with pytest.raises(ValueError, match=r"statistics_count: expected one element of dtype torch.int64, got 1 of"):
        launchers.training(x, own, statistics, None, None, None, None, Act("relu", 0.0, 0.0, "add_act"))


# ------------------------------------------------------------------------------------------------- stages, and needs


@pytest.mark.parametrize("order", contract.ORDERS)
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_the_second_stage_takes_what_the_first_wrote(kind, order):
    """The stages one by one, with dz in dy's place, are the fused backward to the last bit."""
    gen, act = generator("stages", kind, order), Act(kind, 0.0, 0.3, order)
    x, dy, dy2, r = (activation(SHAPES[1], torch.float32, "nchw", gen) for _ in range(4))
    own = NormParams(None, None, torch.ones(37), torch.zeros(37), 0.1, 0.05)
    _, mean, rstd, r_mean, r_rstd, bits = launchers.training(x, own, None, r, own, None, SEED, act)
    saved = (x, Norm(mean, rstd, *own[2:4]), Residual(r, r_mean, r_rstd, *own[2:4]))
    whole = launchers.backward(dy, dy2, *saved, bits, act, True, [True, True, True])
    *sums, dz = launchers.backward_reduce(dy, dy2, *saved, bits, act)
    follows = (None, Sums(*sums), None, PLAIN) if order == "add_act" else (bits, Sums(*sums), None, act)
    staged = launchers.backward_apply(dz, *saved, *follows, [True, True])
    for a, b in zip(whole, (*staged, *sums), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("two_gradients", [False, True])
def test_nothing_is_made_that_nobody_needs(needs, two_gradients):
    gen, act = generator("needs", needs), Act("silu", 0.0, 0.0, "add_act")
    x, dy, dy2, r = (activation(SHAPES[0], torch.float32, "nchw", gen) for _ in range(4))
    own = Norm(torch.zeros(8), torch.ones(8), None, None)
    arguments = (dy, dy2 if two_gradients else None, x, own, Residual(r), None, act, needs[2])
    everything = launchers.backward(*arguments, [True, True, True])
    some = launchers.backward(*arguments, list(needs))
    for needed, a, b in zip((*needs[:2], needs[2], needs[2], False, False), everything, some, strict=True):
        assert torch.equal(a, b) and a.numel() > 0 if needed else b.numel() == 0


def test_the_kinds_are_those_of_the_contract():
    from fastres.kernels.activations import FUNCTIONS

    assert set(FUNCTIONS) == {kind for kind, definition in activations.KINDS.items() if definition.compiled}
    for kind, functions in FUNCTIONS.items():
        assert (functions.passes is None) == (activations.KINDS[kind].passes is None), kind
        assert Activation.of(kind).kind == kind
