from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import FrozenBatchNorm2d

from fastres import contract
from fastres.fuse import fuse_report
from fastres.nn import BatchNormAct2d, FusedBatchNormAct2d
from tests.oracle import assert_close
from tests.parity import DTYPES, FORMATS, close, same_training, scramble, twin

CLASSES = [FusedBatchNormAct2d, BatchNormAct2d]
CHANNELS = 6


class Oracle(nn.Module):
    """The same in the words of torch alone, without dropout."""

    def __init__(self, *args, relu, order, **kwargs):
        super().__init__()
        self.norm = nn.BatchNorm2d(*args, **kwargs)
        self.relu, self.order = relu, order

    def forward(self, x, residual=None):
        z = self.norm(x)
        if residual is not None and self.order == "add_act":
            z = z + residual
        if self.relu:
            z = F.relu(z)
        if residual is not None and self.order == "act_add":
            z = z + residual
        return z


class WithResidual(nn.Module):
    """Calls a normalisation on the two halves of a batch, so that one input carries both."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(*x.chunk(2))


def inputs(dtype, memory_format, n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make():
        x = torch.randn(n, CHANNELS, 5, 3, generator=generator, dtype=torch.float64) * 2 + 0.7
        return x.to(dtype).contiguous(memory_format=memory_format)

    return make


def pair(cls, dtype, *, relu=True, order="add_act", **options):
    actual = scramble(cls(CHANNELS, dtype=dtype, relu=relu, order=order, **options))
    expected = Oracle(CHANNELS, dtype=dtype, relu=relu, order=order, **options)
    expected.norm.load_state_dict(actual.state_dict())
    return actual, expected


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("relu", "order"), list(itertools.product((True, False), ("add_act", "act_add"))))
@pytest.mark.parametrize("residual", [True, False])
def test_training_and_evaluation_are_those_of_batch_norm_and_relu(cls, dtype, memory_format, relu, order, residual):
    actual, expected = pair(cls, dtype, relu=relu, order=order)
    if residual:
        actual, expected = WithResidual(actual), WithResidual(expected)
    same_training(actual, expected, inputs(dtype, memory_format))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track_running_stats", [True, False])
def test_every_option_of_batch_norm_counts(cls, momentum, affine, track_running_stats):
    options = {"momentum": momentum, "affine": affine, "track_running_stats": track_running_stats, "eps": 0.1}
    actual, expected = pair(cls, torch.float64, **options)
    assert actual.state_dict().keys() == nn.BatchNorm2d(CHANNELS, **options).state_dict().keys()
    same_training(actual, expected, inputs(torch.float64, torch.channels_last))


@pytest.mark.parametrize("cls", CLASSES)
def test_bias_can_be_left_out(cls):
    norm = cls(CHANNELS, bias=False)
    assert [name for name, _ in norm.named_parameters()] == ["norm.weight"]
    x = torch.randn(2, CHANNELS, 3, 3)
    close(norm(x), F.relu(F.batch_norm(x, None, None, norm.weight, None, training=True)), 18)
    norm.reset_parameters()


def test_statistics_that_are_no_longer_tracked_stay_as_they_are():
    # torch.nn.BatchNorm2d reads the attribute at each call, whatever the constructor was told.
    actual, expected = pair(FusedBatchNormAct2d, torch.float64)
    actual.track_running_stats = expected.norm.track_running_stats = False
    before = actual.running_mean.clone()
    same_training(actual, expected, inputs(torch.float64, torch.contiguous_format))
    assert torch.equal(actual.running_mean, before)
    assert actual.num_batches_tracked == 0


def test_cumulative_average_after_two_batches_is_their_mean():
    norm = FusedBatchNormAct2d(CHANNELS, momentum=None, dtype=torch.float64)
    batches = [inputs(torch.float64, torch.contiguous_format, seed=seed)() for seed in range(2)]
    for x in batches:
        norm(x)
    expected = sum(x.mean((0, 2, 3)) for x in batches) / 2
    close(norm.running_mean, expected, batches[0].numel())
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("shape", [(1, CHANNELS, 1, 1), (4, CHANNELS), (2, CHANNELS + 1, 3, 3)])
def test_a_batch_that_batch_norm_refuses_leaves_what_it_leaves_there(shape):
    norm, plain = pair(FusedBatchNormAct2d, torch.float32)
    for module in (norm, plain):
        with pytest.raises((ValueError, RuntimeError)):
            module(torch.randn(shape))
    for a, b in zip(norm.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ["add_act", "act_add"])
def test_a_residual_of_another_shape_is_added_as_pytorch_adds_it(order):
    norm, plain = pair(FusedBatchNormAct2d, torch.float64, order=order)
    x = torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64)
    for size, fits in (((1, CHANNELS, 1, 3), True), ((2, CHANNELS, 3, 4), False)):
        r = torch.randn(size, dtype=torch.float64)
        if fits:
            close(norm(x, r), plain(x, r), x.numel())
        else:
            with pytest.raises(RuntimeError, match="must match"):
                norm(x, r)


@pytest.mark.parametrize("order", ["add_act", "act_add"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dropout_is_that_of_the_contract_in_training_and_nothing_in_evaluation(order, memory_format):
    norm, plain = pair(FusedBatchNormAct2d, torch.float64, order=order)
    norm.dropout = 0.25
    x, r = (inputs(torch.float64, memory_format, seed=seed)() for seed in range(2))
    torch.manual_seed(5)
    y = norm(x, r)
    torch.manual_seed(5)
    keep = contract.dropout_keep(x.shape, contract.draw_seed(x.device), 0.25)
    inner = r if order == "add_act" else None
    expected = torch.where(keep, plain(x, inner) / 0.75, 0) + (0 if order == "add_act" else r)
    close(y, expected, x.numel())
    norm.eval(), plain.eval()
    close(norm(x, r), plain(x, r), x.numel())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("order", ["add_act", "act_add"])
def test_dropout_goes_on_where_the_normalisation_alone_is_frozen(cls, order):
    norm, plain = pair(cls, torch.float64, order=order)
    norm.dropout = 0.5
    norm.norm.eval(), plain.eval()
    x, r = (inputs(torch.float64, torch.channels_last, n=32, seed=seed)() for seed in range(2))
    y = norm(x, r)
    inner, outer = (r, 0) if order == "add_act" else (None, r)
    kept = plain(x, inner)
    dropped = (y - outer).abs() < 1e-9
    close(torch.where(dropped, 0, y - outer), torch.where(dropped, 0, kept / 0.5), x.numel())
    share = (dropped & (kept > 0)).sum() / (kept > 0).sum()
    assert 0.4 < share < 0.6
    # The other way round, statistics are adapted and nothing is dropped.
    norm.eval(), norm.norm.train()
    close(norm(x, r), plain.train()(x, r), x.numel())
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_without_running_statistics_evaluation_uses_the_batch_and_no_dropout(cls):
    norm = cls(CHANNELS, track_running_stats=False, dropout=0.5).eval()
    x = torch.randn(4, CHANNELS, 5, 3)
    close(norm(x), F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)), x.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_module_cast_to_low_precision_computes_in_float32(dtype, training):
    low = scramble(FusedBatchNormAct2d(CHANNELS)).to(dtype).train(training)
    wide = twin(low).float()
    x = torch.randn(4, CHANNELS, 5, 3).to(dtype)
    y = low(x)
    assert y.dtype == dtype
    assert_close(y, wide(x.float()).double(), "output", length=x.numel())
    assert low.running_mean.dtype == dtype
    assert_close(low.running_mean, wide.running_mean.double(), "running_mean", length=x.numel())
    assert low.num_batches_tracked == training


def test_checkpoints_go_to_and_from_batch_norm():
    norm = scramble(FusedBatchNormAct2d(CHANNELS, dropout=0.2))
    plain = nn.BatchNorm2d(CHANNELS)
    plain.load_state_dict(norm.state_dict())
    again = FusedBatchNormAct2d(CHANNELS)
    again.load_state_dict(plain.state_dict())
    for name, value in norm.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("cls", CLASSES)
def test_it_holds_torchs_normalisation_and_reads_and_writes_through(cls):
    norm = scramble(cls(CHANNELS, eps=0.3, dropout=0.1))
    assert type(norm.norm) is nn.BatchNorm2d
    assert [name for name, _ in norm.named_parameters()] == ["norm.weight", "norm.bias"]
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(CHANNELS).state_dict())
    for name in norm.state_dict():
        assert getattr(norm, name) is getattr(norm.norm, name)
    norm.eps, norm.momentum, norm.weight = 0.7, None, nn.Parameter(torch.full((CHANNELS,), 2.0))
    assert (norm.norm.eps, norm.norm.momentum, norm.norm.weight) == (0.7, None, norm.weight)
    with pytest.raises(AttributeError, match="absent"):
        _ = norm.absent


@pytest.mark.parametrize("cls", CLASSES)
def test_inside_a_network_the_state_has_the_names_of_batch_norm(cls):
    outer = nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, CHANNELS, 1), scramble(cls(CHANNELS)))})
    plain = nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))})
    assert list(outer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(outer.state_dict())
    again = nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, CHANNELS, 1), cls(CHANNELS))})
    again.load_state_dict(plain.state_dict())
    for key, value in outer.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    state = plain.state_dict()
    del state["stem.1.running_var"]
    missing = again.load_state_dict(state | {"stem.1.more": torch.ones(1)}, strict=False)
    assert [name.removesuffix("running_var") for name in missing.missing_keys] == ["stem.1.norm."]
    assert len(missing.unexpected_keys) == 1


REPLACED = {
    "frozen": lambda n: setattr(n, "norm", FrozenBatchNorm2d(CHANNELS)),
    "folded": lambda n: setattr(n, "norm", nn.Identity()),
    "hooked": lambda n: n.norm.register_forward_hook(lambda m, args, y: y * 2),
}


@pytest.mark.parametrize("case", REPLACED)
def test_with_its_normalisation_replaced_what_follows_it_stays(case):
    norm = scramble(FusedBatchNormAct2d(CHANNELS)).eval()
    REPLACED[case](norm)
    x, r = torch.randn(2, CHANNELS, 3, 3), torch.randn(2, CHANNELS, 3, 3)
    assert list(fuse_report(norm).left) == [""]
    assert torch.equal(norm(x, r), F.relu(norm.norm(x) + r))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_has_a_normalisation_of_its_own(cls, way):
    norm = scramble(cls(CHANNELS, dropout=0.1, order="act_add"))
    again = copy.deepcopy(norm) if way == "deepcopy" else pickle.loads(pickle.dumps(norm))
    assert repr(again) == repr(norm)
    x = torch.randn(2, CHANNELS, 3, 3)
    torch.manual_seed(0)
    y = norm(x)
    torch.manual_seed(0)
    assert torch.equal(again(x), y)
    assert again.weight is again.norm.weight
    assert again.weight is not norm.weight


def test_printing_shows_the_steps_in_their_order():
    assert "steps=batch_norm > [add] > relu" in repr(FusedBatchNormAct2d(CHANNELS))
    last = FusedBatchNormAct2d(CHANNELS, dropout=0.5, order="act_add")
    assert "steps=batch_norm > relu > dropout(0.5) > [add]" in repr(last)
    assert "steps=batch_norm > [add]\n  (norm): BatchNorm2d" in repr(FusedBatchNormAct2d(CHANNELS, relu=False))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: expected 0 <= dropout < 1"),
        ({"dropout": float("nan")}, ValueError, "dropout: expected 0 <= dropout < 1"),
        ({"dropout": "0.5"}, TypeError, "dropout: expected a number, got str"),
        ({"order": "act"}, ValueError, "order: expected one of"),
        ({"relu": 1}, TypeError, "relu: expected a bool, got int"),
    ],
)
def test_a_bad_argument_is_named(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(CHANNELS, **options)
