"""Networks that are not ours: what was found in them, and that they train and evaluate as in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from fastres.backend import GraphReport
from tests.compiled import compare, networks


def counts(report: GraphReport) -> str:
    """Normalisations, convolutions (fused / found), pointwise calls in them, and the calls of ours."""
    calls = " ".join(f"{name}:{count}" for name, count in sorted(report.operators.items()))
    norms = f"{report.fused_norms}/{report.norms} {report.fused_convolutions}/{report.convolutions}"
    return f"{norms} {report.pointwise} {calls}"


# Network -> in float64; in float32, channels_last and by Winograd's convolutions, training and evaluation.
EXPECTED: dict[str, tuple[str, ...]] = {
    "basic": (
        "6/6 1/6 7 batch_norm_act:4 projection_shortcut:1",
        "6/6 6/6 7 batch_norm_act:2 conv3x3_with_statistics:3 norm_act_conv3x3:2 projection_shortcut:1",
        "6/6 6/6 7 conv3x3:1 conv3x3_norm_act:4 projection_shortcut:1",
    ),
    "bottleneck": (
        "8/8 1/8 9 batch_norm_act:6 projection_shortcut:1",
        "8/8 4/8 9 batch_norm_act:4 conv3x3_with_statistics:1 norm_act_conv3x3:2 projection_shortcut:1",
        "8/8 4/8 9 batch_norm_act:3 conv3x3_norm_act:3 projection_shortcut:1",
    ),
    "option_a": (
        "5/5 0/5 7 batch_norm_act:5",
        "5/5 5/5 7 batch_norm_act:3 conv3x3_with_statistics:3 norm_act_conv3x3:2",
        "5/5 5/5 7 conv3x3_norm_act:5",
    ),
    "preactivation": (
        "5/5 0/6 5 batch_norm_act:5",
        "5/5 5/6 5 batch_norm_act:2 conv3x3_with_statistics:2 norm_act_conv3x3:3",
        "5/5 5/6 5 batch_norm_act:3 conv3x3:3 conv3x3_norm_act:2",
    ),
    "unet": (
        "6/6 0/7 6 batch_norm_act:6",
        "6/6 6/7 6 batch_norm_act:3 conv3x3_with_statistics:3 max_pool2d:1 norm_act_conv3x3:3",
        "6/6 6/7 6 conv3x3_norm_act:6",
    ),
    "unet_bias": (
        "6/6 0/7 6 batch_norm_act:6",
        "6/6 6/7 6 batch_norm_act:3 conv3x3_with_statistics:3 max_pool2d:1 norm_act_conv3x3:3",
        "6/6 6/7 6 conv3x3_norm_act:6",
    ),
    "perceptron": ("2/2 0/0 2 batch_norm_act:2",),
    "volume": ("2/2 0/0 2 batch_norm_act:2",),
    "autoencoder": (
        "3/3 0/2 3 batch_norm_act:3",
        "3/3 2/2 3 batch_norm_act:2 conv3x3_with_statistics:1 norm_act_conv3x3:1",
        "3/3 2/2 3 batch_norm_act:1 conv3x3_norm_act:2",
    ),
}


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_values_are_those_of_pytorch(name):
    make, shapes = networks.NETWORKS[name]
    training, evaluation = compare.check(make, shapes)
    assert counts(training) == counts(evaluation) == EXPECTED[name][0]


@pytest.mark.parametrize("name", [n for n, (_, shapes) in networks.NETWORKS.items() if len(shapes[0]) == 4])
def test_values_are_those_of_pytorch_by_our_convolutions(name):
    make, shapes = networks.NETWORKS[name]
    training, evaluation = compare.check(
        make, shapes, dtype=torch.float32, layout="channels_last", conv_algorithm="winograd"
    )
    assert (counts(training), counts(evaluation)) == EXPECTED[name][1:]


# Network -> in float32, channels_last and by our 1x1 convolutions in training.
BY_PRODUCTS = {
    "bottleneck": "8/8 5/8 9 batch_norm_act:4 conv1x1_with_statistics:2 norm_act_conv1x1:2 projection_shortcut:1",
    "preactivation": "5/5 0/6 5 batch_norm_act:5",
}


@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_values_are_those_of_pytorch_by_our_1x1_convolutions(name):
    make, shapes = networks.NETWORKS[name]
    training, evaluation = compare.check(
        make, shapes, dtype=torch.float32, layout="channels_last", conv_algorithm="gemm"
    )
    assert counts(training) == BY_PRODUCTS[name]
    assert "1x1" not in counts(evaluation)


# Network -> calls in channels_last; in training and evaluation.
IN_CHANNELS_LAST = {"basic": 19, "preactivation": 18, "unet": 22}


@pytest.mark.parametrize("name", IN_CHANNELS_LAST)
def test_a_network_in_nchw_is_computed_in_channels_last_and_keeps_its_strides(name, monkeypatch):
    compare.make_copies_free(monkeypatch)
    make, shapes = networks.NETWORKS[name]
    training, evaluation = compare.check(make, shapes, dtype=torch.float32, conv_algorithm="winograd")
    assert (counts(training), counts(evaluation)) == EXPECTED[name][1:]
    assert training.channels_last == evaluation.channels_last == IN_CHANNELS_LAST[name]


def test_small_images_in_nchw_stay_there():
    make, _ = networks.NETWORKS["basic"]
    training, _ = compare.check(make, [(2, 3, 6, 6)], dtype=torch.float32)
    assert training.channels_last == 0 and training.fused_norms == 6
