"""Bytes that the backend's graphs move, by the byte budget of docs/kernels.md."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.compiled import inductor_bytes

# A bit an element, written once and read in both passes of backward.
BITS = 1 / 32


@pytest.mark.parametrize(
    ("pattern", "forward", "backward"),
    [
        ("relu(bn(x))", 3, 5),
        ("relu(bn(x) + r)", 4 + BITS, 6 + 2 * BITS),
        ("relu(bn(x) + bn(r))", 5 + BITS, 8 + 2 * BITS),
        ("dropout(relu(bn(x) + r))", 4 + BITS, 6 + 2 * BITS),
    ],
)
def test_our_graphs_move_what_the_byte_budget_says(pattern, forward, backward):
    size = math.prod(inductor_bytes.SHAPE) * 4
    found = [count / size for count in inductor_bytes.of_ours(pattern, torch.float32)]
    assert found == pytest.approx([forward, backward], rel=1e-3)
