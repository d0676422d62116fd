"""Networks of timm, torchvision and transformers: what was found in them, and that they train as in plain PyTorch."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests import oracle
from tests.compiled import compare, libraries
from tests.compiled.test_networks import counts

# Network -> in float64, training and evaluation where they differ.
EXPECTED: dict[str, tuple[str, ...]] = {
    "resnet18": ("15/15 4/15 16 batch_norm_act:7 projection_shortcut:4",),
    "seresnet18": ("15/15 10/25 14 batch_norm_act:15 linear_of_image:10",),
    "resnet50d": ("22/22 4/22 23 batch_norm_act:14 projection_shortcut:4",),
    "resnetv2_50": ("10/10 1/13 10 batch_norm_act:10 linear_of_image:1",),
    "vgg11_bn": ("4/4 2/6 4 batch_norm_act:4 linear_of_image:2",),
    "densenet121": ("11/11 0/10 11 batch_norm_act:11",),
    "regnety_002": ("23/23 16/35 25 batch_norm_act:15 linear_of_image:12 projection_shortcut:4",),
    "repvgg_a0": ("12/12 5/10 12 batch_norm_act:2 projection_shortcut:5",),
    "dla34": ("29/29 2/30 38 batch_norm_act:27 linear_of_image:1 projection_shortcut:1",),
    "convnext_atto": ("0/0 3/16 0 linear_of_image:3",),
    "mobilenetv3_small_050": ("34/34 19/53 30 batch_norm_act:34 linear_of_image:19",),
    "efficientnet_b0": ("49/49 32/81 42 batch_norm_act:49 linear_of_image:32",),
    "transformers_basic": ("8/8 1/8 10 batch_norm_act:6 projection_shortcut:1",),
    "transformers_bottleneck": ("12/12 2/12 13 batch_norm_act:8 projection_shortcut:2",),
    "inception": ("13/13 0/13 13 batch_norm_act:13",),
    "googlenet": ("57/57 0/57 57 batch_norm_act:57",),
    "mobilenet_v2": ("10/10 0/10 8 batch_norm_act:10",),
    "fcn_resnet50": ("10/10 2/11 10 batch_norm_act:6 projection_shortcut:2",),
    # Its normalisations are a multiplication and an addition.
    "fasterrcnn_trunk": ("9/9 2/13 9 batch_norm_act:5 projection_shortcut:2",),
}
# In float32, channels_last and by Winograd's convolutions: training, evaluation.
BY_OUR_CONVOLUTIONS: dict[str, tuple[str, str]] = {
    "resnet18": (
        "15/15 14/15 17 batch_norm_act:1 batch_norm_act_max_pool2d:1 conv3x3_with_statistics:5 norm_act_conv3x3:5"
        " projection_shortcut:4",
        "15/15 14/15 17 batch_norm_act_max_pool2d:1 conv3x3:4 conv3x3_norm_act:6 projection_shortcut:4",
    ),
    "seresnet18": (
        "15/15 20/25 15 batch_norm_act:9 batch_norm_act_max_pool2d:1 conv3x3_with_statistics:5 linear_of_image:10"
        " norm_act_conv3x3:5",
        "15/15 20/25 15 batch_norm_act:4 batch_norm_act_max_pool2d:1 conv3x3_norm_act:10 linear_of_image:10",
    ),
    "resnetv2_50": (
        "10/10 4/13 10 batch_norm_act:7 linear_of_image:1 max_pool2d:1 norm_act_conv3x3:3",
        "10/10 4/13 10 batch_norm_act:7 conv3x3_norm_act:3 linear_of_image:1",
    ),
    "vgg11_bn": (
        "4/4 6/6 7 batch_norm_act_max_pool2d:3 conv3x3_with_statistics:3 linear_of_image:2 norm_act_conv3x3:1",
        "4/4 6/6 4 conv3x3_norm_act:4 linear_of_image:2",
    ),
    "densenet121": (
        "11/11 4/10 12 batch_norm_act:6 batch_norm_act_max_pool2d:1 norm_act_conv3x3:4",
        "11/11 4/10 12 batch_norm_act:10 batch_norm_act_max_pool2d:1 conv3x3:4",
    ),
    "dla34": (
        "29/29 24/30 38 batch_norm_act:15 conv3x3_with_statistics:10 linear_of_image:1 max_pool2d:5"
        " norm_act_conv3x3:12 projection_shortcut:1",
        "29/29 24/30 38 batch_norm_act:6 conv3x3:1 conv3x3_norm_act:21 linear_of_image:1 projection_shortcut:1",
    ),
    "transformers_bottleneck": (
        "12/12 5/12 14 batch_norm_act:4 batch_norm_act_max_pool2d:1 norm_act_conv3x3:3 projection_shortcut:2",
        "12/12 5/12 14 batch_norm_act:4 batch_norm_act_max_pool2d:1 conv3x3_norm_act:3 projection_shortcut:2",
    ),
    "inception": (
        "13/13 5/13 13 batch_norm_act:9 conv3x3_with_statistics:1 norm_act_conv3x3:4",
        "13/13 5/13 13 batch_norm_act:8 conv3x3_norm_act:5",
    ),
    "fcn_resnet50": (
        "10/10 5/11 11 batch_norm_act:3 batch_norm_act_max_pool2d:1 conv3x3_with_statistics:1 norm_act_conv3x3:2"
        " projection_shortcut:2",
        "10/10 5/11 11 batch_norm_act:2 batch_norm_act_max_pool2d:1 conv3x3_norm_act:3 projection_shortcut:2",
    ),
}
# The same by our convolutions in groups. Of hardswish and ReLU6 too many inputs lie at a kink.
IN_GROUPS: dict[str, tuple[str, str]] = {
    "regnety_002": (
        "23/23 22/35 25 batch_norm_act:15 grouped_conv2d_with_statistics:6 linear_of_image:12 projection_shortcut:4",
        "23/23 22/35 25 batch_norm_act:15 grouped_conv2d:6 linear_of_image:12 projection_shortcut:4",
    ),
    "efficientnet_b0": (
        "49/49 48/81 42 batch_norm_act:49 grouped_conv2d_with_statistics:16 linear_of_image:32",
        "49/49 48/81 42 batch_norm_act:49 grouped_conv2d:16 linear_of_image:32",
    ),
}


def check(name, **how):
    """(training, evaluation): what was found in the network."""
    package, make, shape = libraries.NETWORKS[name]
    try:
        importlib.import_module(package)
    except ImportError as error:
        pytest.skip(f"{package}: {error}")
    with oracle.threads(1):  # there is too little to do for more
        training, evaluation = compare.check(make, [shape], **how)
    return counts(training), counts(evaluation)


def marked(names):
    return [pytest.param(n, marks=pytest.mark.slow if n in libraries.SLOW else ()) for n in names]


def test_every_network_has_its_counts():
    assert set(EXPECTED) == set(libraries.NETWORKS)
    assert set(libraries.SLOW) <= set(EXPECTED)


@pytest.mark.parametrize("name", marked(EXPECTED))
def test_values_are_those_of_pytorch(name):
    assert check(name) == (EXPECTED[name][0], EXPECTED[name][-1])


@pytest.mark.parametrize("name", BY_OUR_CONVOLUTIONS)
def test_values_are_those_of_pytorch_by_our_convolutions(name):
    how = {"dtype": torch.float32, "layout": "channels_last", "off_zero": True}
    found = check(name, conv_algorithm="winograd", **how)
    assert found == BY_OUR_CONVOLUTIONS[name]


@pytest.mark.parametrize("name", marked(IN_GROUPS))
def test_values_are_those_of_pytorch_by_our_convolutions_in_groups(name):
    how = {"dtype": torch.float32, "layout": "channels_last", "off_zero": True}
    assert check(name, conv_algorithm="grouped", **how) == IN_GROUPS[name]
