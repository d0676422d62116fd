"""What a tape makes of a call: the place that each argument of a kernel came from, or why it cannot be repeated."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from fastres.kernels import tape


def compiled(kinds: dict[str, str], **metadata: Any) -> Any:
    plain = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": 0,
                 "profile_scratch_size": 0, "num_warps": 4, "shared": 0}  # fmt: skip
    return types.SimpleNamespace(
        src=types.SimpleNamespace(signature=kinds), metadata=types.SimpleNamespace(**plain | metadata), function=1234
    )


def written(*values: Any, kinds: dict[str, str] | None = None, **metadata: Any) -> tape.Tape:
    kinds = kinds or {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    return tape.Tape([tape.Launched(compiled(kinds, **metadata), (1, 1, 1), values)])


def test_a_recipe_says_where_each_argument_comes_from():
    x, y = torch.zeros(4), torch.ones(4)
    found = tape.recipe([x, 0.5, None], [y], written(x, y, 7, 64))
    assert found.results == [0] and found.updated == [] and found.counters == 0 and found.device == x.device
    assert found.launches == [
        (1234, (1, 1, 1), 128, 0, [(tape.INPUT, 0, b""), (tape.MADE, 0, b""), (tape.VALUE, 0, b"\x07\0\0\0")])
    ]
    assert found.made[0].shape == (4,) and found.made[0].is_meta


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("two arguments", "two arguments are one tensor"),
        ("a view", "shares its memory"),
        ("its argument", "shares its memory"),
        ("num_ctas", "attributes"),
        ("launch_pdl", "attributes"),
        ("global_scratch_size", "scratch memory"),
        ("a value too few", "3 values for a signature of 4"),
        ("gap", "a launch is tuned"),
    ],
)
def test_what_cannot_be_repeated_leaves_no_recipe(change, words):
    x, y = torch.zeros(4), torch.ones(4)
    arguments, results, values, metadata = [x], [y], (x, y, 7, 64), {}
    if change == "two arguments":
        arguments = [x, x]
    elif change == "a view":
        values = (x[:2], y, 7, 64)
    elif change == "its argument":
        results = [x]
    elif change == "a value too few":
        values = (x, y, 7)
    elif change != "gap":
        metadata = {change: 2}
    made = written(*values, **metadata)
    made.gap = "a launch is tuned" if change == "gap" else ""
    with pytest.raises(tape.Gap, match=words):
        tape.recipe(arguments, results, made)
