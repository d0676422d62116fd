"""How grouped arguments become an operator's flat schema, and back.

A schema knows tensors, numbers and strings, but no structs. An implementation takes NamedTuples (`fastres.contract`): a
parameter `norm: Norm` stands for the arguments norm_mean, norm_rstd, norm_weight and norm_bias, in this order.
A group that may be None has arguments that may each be None; where all of them are, so is the group. csrc/common's
arguments.h does the same in C++. Numbers may have defaults, which are those of the schema.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

Needs2 = Annotated[Sequence[bool], "bool[2]"]
Needs3 = Annotated[Sequence[bool], "bool[3]"]
Ints2 = Annotated[Sequence[int], "int[2]"]

_SCALARS: dict[Any, str] = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str"}


class _Parameter(NamedTuple):
    """One parameter of an implementation.

    Attributes:
        group: the class of a grouped one, else None.
        size: flat arguments that it stands for.
        optional: whether it may be None.
        default: as it is written, "=1" say, or empty.
    """

    name: str
    group: Any
    size: int
    optional: bool
    default: str = ""


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        return inner[0], len(inner) < len(get_args(hint))
    return hint, False


def _type(hint: Any, optional: bool) -> str:
    hint, may_be_none = _without_none(hint)
    if get_origin(hint) is Annotated:
        return str(get_args(hint)[1])
    return _SCALARS[hint] + "?" * (optional or may_be_none)


class Arguments:
    """The parameters of an implementation as a schema has them.

    Args:
        implementation: its parameters' annotations are tensors, numbers, strings, the lists above and NamedTuples of
            tensors, numbers and strings, each of them perhaps `| None`.
        mutates: the flat names of tensors that it updates.

    Attributes:
        schema: the flat parameters.
        group: a function of the flat arguments that returns the grouped ones by name.
    """

    def __init__(self, implementation: Callable[..., Any], mutates: Sequence[str]) -> None:
        hints = get_type_hints(implementation, include_extras=True)
        self.parameters: list[_Parameter] = []
        flat: list[str] = []
        marks = {name: f"({chr(ord('a') + i)}!)" for i, name in enumerate(mutates)}
        for name, parameter in inspect.signature(implementation).parameters.items():
            hint, optional = _without_none(hints[name])
            fields = getattr(hint, "_fields", None)
            if fields is None:
                default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
                self.parameters.append(_Parameter(name, None, 1, optional, default))
                flat.append(f"{_type(hint, optional)} {name}{default}")
                continue
            self.parameters.append(_Parameter(name, hint, len(fields), optional))
            of_field = get_type_hints(hint)
            for field in fields:
                type_name, full = _type(of_field[field], optional), f"{name}_{field}"
                if full in marks:
                    type_name = type_name.replace("Tensor", "Tensor" + marks[full])
                flat.append(f"{type_name} {full}")
        self.schema = ", ".join(flat)
        self.group = self._grouper()

    def caller(
        self,
        target: Callable[..., Any],
        guard: Callable[[], Any] | None = None,
        unguarded: Any = None,
        refusal: Callable[[ValueError], Exception] | None = None,
    ) -> Callable[..., Any]:
        """A function of the grouped parameters that calls `target` with the flat ones.

        It is compiled from its source, as a NamedTuple's constructor is: a loop over the groups, or one more function
        of flat arguments, would cost every call of an operator a microsecond.

        Args:
            guard: what it makes exists while `target` runs, but for where `unguarded` returns True.
            refusal: of a ValueError that `target` raises under the guard, what to raise in its place.
        """
        flat = []
        for name, group, size, optional, _ in self.parameters:
            if group is None:
                flat.append(name)
            elif optional:
                flat.append(f"*(({'None, ' * size}) if {name} is None else {name})")
            else:
                flat.append(f"*{name}")
        names, call = ", ".join(p.name + p.default for p in self.parameters), f"return _target({', '.join(flat)})"
        source = f"def call({names}):\n    {call}"
        if guard is not None:
            source = (
                f"def call({names}):\n    if _unguarded():\n        {call}\n    guard = _guard()\n"
                f"    try:\n        {call}\n    except ValueError as e:\n        raise _refusal(e) from None\n"
                "    finally:\n        del guard"
            )
        space: dict[str, Any] = {"_target": target, "_guard": guard, "_unguarded": unguarded, "_refusal": refusal}
        exec(source, space)
        return space["call"]  # type: ignore[no-any-return]

    def _grouper(self) -> Callable[..., dict[str, Any]]:
        """A function of the flat parameters that returns the grouped ones by name; compiled as `caller`'s is."""
        flat: list[str] = []
        entries = []
        space: dict[str, Any] = {}
        for name, group, size, optional, default in self.parameters:
            own = [name] if group is None else [f"{name}_{i}" for i in range(size)]
            flat += [own[0] + default, *own[1:]]
            value = name if group is None else f"_{name}({', '.join(own)})"
            if group is not None:
                space[f"_{name}"] = group
                if optional:
                    value = f"None if {' is '.join(own)} is None else {value}"
            entries.append(f"{name!r}: {value}")
        exec(f"def group({', '.join(flat)}):\n    return {{{', '.join(entries)}}}", space)
        return space["group"]  # type: ignore[no-any-return]
