"""Each trap gives what plain PyTorch gives, and as much of it is fused as may be."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fastres
from fastres.backend.compiler import rewrite
from tests import oracle
from tests.compiled import compare, traps
from tests.compiled.test_networks import counts

IMAGES = [(2, 3, 8, 8)]
# Trap -> in training; in evaluation where that differs.
EXPECTED: dict[type[traps.Trap], tuple[str, ...]] = {
    traps.OldNameAfterInPlaceReLU: ("1/1 0/1 1 batch_norm_act:1",),
    traps.ViewBeforeInPlaceReLU: ("1/1 0/1 0 batch_norm_act:1",),
    traps.OldNameAfterInPlaceAddition: ("1/1 0/2 0 batch_norm_act:1",),
    traps.AdditionIntoTheInput: ("1/1 0/1 0 batch_norm_act:1",),
    traps.ResidualOverwrittenAfter: ("1/1 0/2 1 batch_norm_act:1",),
    traps.ResidualMadeInPlaceBetween: ("1/1 0/2 2 batch_norm_act:1",),
    traps.InputOverwrittenBehind: ("1/1 0/2 0 batch_norm_act:1",),
    traps.RunningMeanReadBetween: ("1/1 0/1 0 batch_norm_act:1", "1/1 0/1 1 batch_norm_act:1"),
    traps.RunningMeanWrittenBetween: ("1/1 0/2 0 batch_norm_act:1",),
    traps.OneNormTwice: ("2/2 0/2 2 batch_norm_act:2", "2/2 0/2 2 batch_norm_act:1"),
    traps.SharedRunningStatistics: ("2/2 0/2 2 batch_norm_act:2", "2/2 0/2 2 batch_norm_act:1"),
    traps.WrittenBeforeReturned: ("1/1 0/1 1 batch_norm_act:1",),
    traps.ConvolutionWrittenBeforeNorm: ("1/1 0/1 1 batch_norm_act:1",),
    traps.ConvolutionBiasWritten: ("1/1 0/1 1 batch_norm_act:1",),
    traps.RunningMeanAsBias: ("0/1 0/1 0 ", "1/1 0/1 1 batch_norm_act:1"),
    traps.RunningMeanAsFactor: ("0/1 0/2 0 ", "1/1 0/2 2 batch_norm_act:1"),
    traps.RunningStatisticsMoved: ("2/2 0/2 3 batch_norm_act:2",),
    traps.NormBiasWritten: ("0/2 0/2 0 ", "2/2 0/2 2 batch_norm_act:1"),
    traps.PartsOfTensors: ("1/3 0/2 1 batch_norm_act:1",),
    traps.OutIsAnAlias: ("1/1 0/2 2 batch_norm_act:1",),
    traps.ScaledELU: ("2/2 0/2 0 batch_norm_act:2",),
    traps.OutArgument: ("1/1 0/1 0 batch_norm_act:1",),
    traps.ListOfTensors: ("1/1 0/2 1 batch_norm_act:1",),
    traps.Clamp: ("2/2 0/2 0 batch_norm_act:2", "2/2 0/2 3 batch_norm_act:2"),
    traps.WithoutGradients: ("2/2 0/2 1 batch_norm_act:2", "2/2 0/2 2 batch_norm_act:2"),
    traps.GradientsSwitchedBetween: ("1/1 0/1 0 batch_norm_act:1",),
    traps.Broadcast: ("2/2 0/2 0 batch_norm_act:2",),
    traps.AddedToItself: ("1/1 0/1 0 batch_norm_act:1",),
    traps.ReadInBetween: ("1/1 0/2 0 batch_norm_act:1",),
    traps.ActivationBeforeResidual: ("2/2 0/2 2 batch_norm_act:1",),
    traps.TwoActivations: ("1/1 0/1 1 batch_norm_act:1",),
    traps.InPlaceOnInput: ("1/1 0/2 0 batch_norm_act:1",),
    traps.Hooked: ("1/1 0/1 0 batch_norm_act:1",),
    traps.Frozen: ("2/2 0/2 2 batch_norm_act:2", "2/2 0/2 2 batch_norm_act:1"),
    traps.DetachedAlias: ("1/1 0/1 0 batch_norm_act:1",),
    traps.SplitViews: ("1/1 0/1 1 batch_norm_act:1",),
    traps.ConstantNorm: ("3/3 0/2 2 batch_norm_act:2",),
    traps.ConstantNormOfWhatIsOverwritten: ("1/2 0/2 0 batch_norm_act:1",),
    traps.SmoothAfterConstantNormOfWhatIsOverwritten: ("0/1 0/1 0 ", "1/1 0/1 1 batch_norm_act:1"),
    traps.ConstantsWrittenBetween: ("0/2 0/2 0 ",),
    traps.ConstantsReadElsewhere: ("1/1 0/1 1 batch_norm_act:1",),
    traps.ShapedByName: ("0/0 0/1 0 ",),
    traps.ConstantsWrittenBehind: ("0/1 0/1 0 ", "1/1 0/1 1 batch_norm_act:1"),
    traps.AlmostConstantNorm: ("0/0 0/2 0 ",),
}
# Those in which a convolution of ours has statistics, an input or a residual that may go stale; in training.
BY_OUR_CONVOLUTIONS = {
    traps.OldNameAfterInPlaceAddition: "1/1 1/2 2 batch_norm_act:1 conv3x3_with_statistics:1",
    traps.ConvolutionWrittenBeforeNorm: "1/1 1/1 1 batch_norm_act:1 conv3x3:1",
    traps.ConvolutionBiasWritten: "1/1 1/1 1 batch_norm_act:1 conv3x3_with_statistics:1",
    traps.RunningMeanAsBias: "0/1 1/1 0 conv3x3:1",
    traps.InputOverwrittenBehind: "1/1 1/2 0 batch_norm_act:1 conv3x3_with_statistics:1",
    traps.SplitViews: "1/1 1/1 1 batch_norm_act:1 conv3x3_with_statistics:1",
}


def test_every_trap_is_laid():
    assert set(EXPECTED) == set(traps.TRAPS) - {traps.Uncounted}


@pytest.mark.parametrize("trap", EXPECTED, ids=lambda t: t.__name__)
def test_values_are_those_of_pytorch(trap):
    training, evaluation = compare.check(trap, IMAGES)
    assert (counts(training), counts(evaluation)) == (EXPECTED[trap][0], EXPECTED[trap][-1])


@pytest.mark.parametrize("trap", BY_OUR_CONVOLUTIONS, ids=lambda t: t.__name__)
def test_values_are_those_of_pytorch_by_our_convolutions(trap):
    training, _ = compare.check(trap, IMAGES, dtype=torch.float32, layout="channels_last", conv_algorithm="winograd")
    assert counts(training) == BY_OUR_CONVOLUTIONS[trap]


def test_normalisation_by_constants_is_the_epilogue_of_a_convolution():
    _, evaluation = compare.check(
        traps.ConstantNorm, IMAGES, dtype=torch.float32, layout="channels_last", conv_algorithm="winograd"
    )
    assert counts(evaluation) == "3/3 1/2 2 batch_norm_act:1 conv3x3_norm_act:1"


def test_arithmetic_with_constants_stays_what_it_was_where_it_does_not_become_ours():
    model, graphs, reports = traps.ConstantNorm().eval(), [], []
    x = torch.randn(2, 3, 8, 8, generator=oracle.generator("constants"))

    def backend(graph, _):
        graphs.append(graph)
        reports.append(rewrite(graph))
        return graph.forward

    with compare.fresh(), torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert counts(reports[0]) == "0/3 0/2 0 "
    assert sum("too few for a call" in left.reason for left in reports[0].left) == 3
    targets = [node.target for node in graphs[0].graph.nodes]
    assert F.batch_norm not in targets
    # Each of the three has six, and the residual is added.
    assert sum(targets.count(t) for t in (operator.mul, operator.add, operator.sub)) == 3 * 6 + 1


def test_normalisation_by_constants_of_another_dtype_is_left():
    reports = compare.check(traps.ConstantNorm, IMAGES, dtype=torch.float32, autocast=torch.bfloat16)
    reasons = {left.reason for left in reports[1].left if left.call == "normalisation"}
    assert "its input is torch.bfloat16, its output torch.float32 and its scale torch.float32" in reasons


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_of_an_evaluation_that_moves_its_statistics(inner):
    """AOTAutograd may compute what a graph has written out of what it has overwritten, once more for backward."""
    model = traps.RunningStatisticsMoved().double().eval()
    gen = oracle.generator("moved statistics")
    for module in (model.bn, model.second):
        nn.init.normal_(module.running_mean, generator=gen)
        nn.init.normal_(module.weight, generator=gen)
    x = torch.randn(IMAGES[0], generator=gen, dtype=torch.float64)

    def gradients(call):
        return torch.autograd.grad(call(x).square().mean(), list(model.parameters()))

    start = copy.deepcopy(model.state_dict())
    expected = gradients(model)
    model.load_state_dict(start)
    with compare.fresh():
        found = gradients(torch.compile(model, backend="fastres", options={"inner": inner, "smallest": 0}))
        (report,) = fastres.compile_report()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert counts(report) == "0/2 0/2 0 "
    assert {left.reason for left in report.left if left.call == "normalisation"} == {
        "something writes to its running statistics, which backward reads"
    }


IN_ANOTHER_FORMAT = (
    traps.ViewBeforeInPlaceReLU,
    traps.OldNameAfterInPlaceAddition,
    traps.InPlaceOnInput,
    traps.ListOfTensors,
    traps.WithoutGradients,
)


@pytest.mark.parametrize("trap", IN_ANOTHER_FORMAT, ids=lambda t: t.__name__)
def test_values_are_those_of_pytorch_in_another_memory_format(trap, monkeypatch):
    compare.make_copies_free(monkeypatch)
    training, _ = compare.check(trap, IMAGES, dtype=torch.float32, conv_algorithm="winograd")
    assert training.channels_last > 0


def test_statistics_that_are_not_kept_or_averaged_over_all_batches():
    """A cumulative average reads the number of batches, at which Dynamo breaks the graph."""
    training, *_ = compare.check(traps.Uncounted, IMAGES)
    assert training.fused_norms == 1
