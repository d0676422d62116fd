"""Grouped arguments, their flat schema, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastres.contract import Act, Norm, NormParams, Residual, Statistics, Sums
from fastres.ops import (
    batch_norm_act,
    conv3x3,
    frozen_network,
    norm_act_conv3x3,
    packed_convolution,
    projection_shortcut,
)
from fastres.ops.arguments import Arguments, Ints2, Needs3


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None
    scale: float


def implementation(
    x: Tensor, pair: Pair, maybe: Pair | None, seed: Tensor | None, stride: Ints2, name: str, count: int, needs: Needs3
) -> Tensor:
    return x


ARGUMENTS = Arguments(implementation, ["pair_left", "maybe_right"])


def test_a_schema_has_every_field_of_every_group_in_order():
    assert ARGUMENTS.schema == (
        "Tensor x, Tensor(a!) pair_left, Tensor? pair_right, float pair_scale, Tensor? maybe_left,"
        " Tensor(b!)? maybe_right, float? maybe_scale, Tensor? seed, int[2] stride, str name, int count, bool[3] needs"
    )


TENSORS = st.builds(torch.full, st.just((2,)), st.integers(0, 5))
MAYBE = st.none() | TENSORS
PAIRS = st.builds(Pair, TENSORS, MAYBE, st.floats(0, 1))


@settings(deadline=None, max_examples=50)
@given(TENSORS, PAIRS, st.none() | PAIRS, MAYBE)
def test_flattening_and_grouping_are_inverse(x, pair, maybe, seed):
    values = (x, pair, maybe, seed, (1, 2), "name", 3, [True, False, True])
    flat = ARGUMENTS.caller(lambda *args: args)(*values)
    assert len(flat) == 12
    grouped = ARGUMENTS.group(*flat)
    names = ("x", "pair", "maybe", "seed", "stride", "name", "count", "needs")
    for name, value in zip(names, values, strict=True):
        again = grouped[name]
        assert type(again) is type(value)
        if isinstance(value, Pair):
            assert all(a is b for a, b in zip(again, value, strict=True))
        else:
            assert again is value
    by_name = ARGUMENTS.caller(lambda *args: args)(**dict(zip(names, values, strict=True)))
    assert all(a is b for a, b in zip(by_name, flat, strict=True))


def test_an_argument_that_is_missing_or_unknown_is_a_type_error():
    call = ARGUMENTS.caller(lambda *args: args)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'needs'"):
        call(1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        call(other=1)


def test_every_operator_is_registered_with_the_schema_of_its_fallback():
    modules = (batch_norm_act, conv3x3, frozen_network, norm_act_conv3x3, packed_convolution, projection_shortcut)
    operators = [v for module in modules for v in vars(module).values() if hasattr(v, "overload")]
    assert len(operators) == 18
    for operator in operators:
        text = str(operator.overload._schema)
        assert operator.arguments.schema in text
        # Marks apart, a name says which group and field it is.
        for group, prefix in ((Norm, "norm"), (Act, "act")):
            if f"{prefix}_{group._fields[0]}" in text:
                assert all(f"{prefix}_{field}" in text for field in group._fields)


@pytest.mark.parametrize("group", [NormParams, Norm, Residual, Statistics, Sums, Act])
def test_what_is_optional_in_a_group_comes_as_an_optional_argument(group):
    def one(g):
        return None

    one.__annotations__ = {"g": group, "return": None}
    schema = Arguments(one, ()).schema.split(", ")
    assert [entry.split()[1] for entry in schema] == [f"g_{field}" for field in group._fields]
    for entry, field in zip(schema, group._fields, strict=True):
        assert entry.split()[0].endswith("?") == ("None" in str(group.__annotations__[field]))
