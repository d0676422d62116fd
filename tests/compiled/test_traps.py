"""Each trap gives what plain PyTorch gives, and as much of it is fused as may be."""

from __future__ import annotations

import pytest
import torch

from fastres.backend import layout
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
}
# Those in which a convolution of ours has statistics, an input or a residual that may go stale; in training.
BY_OUR_CONVOLUTIONS = {
    traps.OldNameAfterInPlaceAddition: "1/1 1/2 2 batch_norm_act:1 conv3x3_with_statistics:1",
    traps.ConvolutionWrittenBeforeNorm: "1/1 1/1 1 batch_norm_act:1 conv3x3:1",
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


IN_ANOTHER_FORMAT = (
    traps.ViewBeforeInPlaceReLU,
    traps.OldNameAfterInPlaceAddition,
    traps.InPlaceOnInput,
    traps.ListOfTensors,
    traps.WithoutGradients,
)


@pytest.mark.parametrize("trap", IN_ANOTHER_FORMAT, ids=lambda t: t.__name__)
def test_values_are_those_of_pytorch_in_another_memory_format(trap, monkeypatch):
    monkeypatch.setattr(layout, "_COPY_COST", 0)  # these images are too small for the copies to pay
    training, _ = compare.check(trap, IMAGES, dtype=torch.float32, conv_algorithm="winograd")
    assert training.channels_last > 0


def test_statistics_that_are_not_kept_or_averaged_over_all_batches():
    """A cumulative average reads the number of batches, at which Dynamo breaks the graph."""
    training, *_ = compare.check(traps.Uncounted, IMAGES)
    assert training.fused_norms == 1
