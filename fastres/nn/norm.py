"""Batch normalisation with the addition, activation and dropout after it: fused, and the twins in plain PyTorch."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres.activations import IDENTITY, RELU, Activation
from fastres.contract import ORDERS
from fastres.nn.steps import check_dropout, norm_act, uses_batch_statistics
from fastres.nn.trust import AnyActivation, Fused, activation_of, renamed, why_not_ordinary

# What is read and written through to the normalisation inside.
_OF_NORM = frozenset((
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    "num_features", "eps", "momentum", "affine", "track_running_stats",
))  # fmt: skip


class _BatchNormAct(nn.Module):
    """The plain twins: normalisation, addition, activation and dropout, one operator after another."""

    _norm_class = nn.BatchNorm2d  # type: type[nn.Module]
    __jit_unused_properties__ = ["relu"]  # noqa: RUF012

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        relu: bool = True,
        act: Any = None,
        dropout: float = 0.0,
        order: str = "add_act",
    ) -> None:
        super().__init__()
        if not isinstance(relu, bool):
            raise TypeError(f"relu: expected a bool, got {type(relu).__name__}")
        if act is not None and not relu:
            raise ValueError(f"relu: expected True where act says what follows, got False with act={act!r}")
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
        self.dropout, self.order = check_dropout(dropout), order
        self.norm = self._norm_class(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.norm.register_parameter("bias", None)
        if not isinstance(act, nn.Module):
            act = Activation.of(act if act is not None else RELU if relu else IDENTITY, "act").module()
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As `FusedBatchNormAct2d.forward`."""
        y = self.norm(x)
        if residual is not None and self.order == "add_act":
            y = y + residual
        y = self.act(y)
        if self.dropout > 0.0:
            y = F.dropout(y, self.dropout, self.training)
        if residual is not None and self.order == "act_add":
            y = y + residual
        return y  # type: ignore[no-any-return]

    @property
    def relu(self) -> bool:
        """Whether the activation is ReLU; setting it makes it ReLU, or takes it away."""
        return type(self.act) is nn.ReLU

    @relu.setter
    def relu(self, value: bool) -> None:
        self.act = (RELU if value else IDENTITY).module()

    def reset_parameters(self) -> None:
        """As torch.nn.BatchNorm2d.reset_parameters."""
        norm: Any = self.norm
        norm.reset_running_stats()
        if norm.weight is not None:
            nn.init.ones_(norm.weight)
        if norm.bias is not None:
            nn.init.zeros_(norm.bias)

    def extra_repr(self) -> str:
        known = Activation.for_module(self.act)
        shown = type(self.act).__name__ if known is None else known.kind
        steps = ["batch_norm", *[shown] * (shown != "identity"), *[f"dropout({self.dropout:g})"] * (self.dropout > 0)]
        # Where the residual joins when one is passed to forward.
        steps.insert(1 if self.order == "add_act" else len(steps), "[add]")
        return f"steps={' > '.join(steps)}"

    def __getattr__(self, name: str) -> Any:
        if name in _OF_NORM and "norm" in self.__dict__.get("_modules", ()):
            return getattr(self._modules["norm"], name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_NORM and "norm" in self.__dict__.get("_modules", ()):
            setattr(self._modules["norm"], name, value)
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch.nn.Module.state_dict, under the names of a BatchNorm2d."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        inside = prefix + "norm."
        for key in [key for key in state if key.startswith(inside)]:
            state[prefix + key.removeprefix(inside)] = state.pop(key)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.norm.state_dict():
            if prefix + name in state_dict:
                state_dict[f"{prefix}norm.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "norm" not in state["_modules"]:  # pickled whole when it was a BatchNorm2d itself
            norm = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
            own = {key: state.pop(key) for key in ("relu", "dropout", "order")}
            norm.__setstate__(state)  # type: ignore[no-untyped-call]
            state = {**nn.Module().__dict__, **own, "training": norm.training, "_modules": {"norm": norm}}
        if "relu" in state:  # pickled whole when the activation was no child
            state["_modules"]["act"] = (RELU if state.pop("relu") else IDENTITY).module()
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class BatchNormAct1d(_BatchNormAct):
    """`BatchNormAct2d` over [N, C] or [N, C, L]."""

    _norm_class = nn.BatchNorm1d


class BatchNormAct2d(_BatchNormAct):
    """Batch normalisation, the addition of a residual, an activation and dropout in plain PyTorch.

    The normalisation is the child `norm`, torch's own BatchNorm2d, and the activation the child `act`: what
    synchronises, freezes, folds or counts normalisations finds it there. The state_dict has a BatchNorm2d's names
    (`weight`, where `named_parameters` says `norm.weight`), and a BatchNorm2d's attributes are read and written through
    this module.

    Args, Raises: as `FusedBatchNormAct2d`, whose plain twin it is.
    """


class BatchNormAct3d(_BatchNormAct):
    """`BatchNormAct2d` over [N, C, D, H, W]."""

    _norm_class = nn.BatchNorm3d


class _FusedBatchNormAct(Fused):
    """The faster way of the three classes below; each puts it before its plain twin."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise `x`, add `residual`, apply the activation and dropout.

        Args:
            x: [N, C, H, W] (1d: [N, C] or [N, C, L]; 3d: [N, C, D, H, W]), float32 | bfloat16 | float16 (float64 on the
                CPU); contiguous or channels_last (channels_last_3d).
            residual: shape, dtype and device of x.
        Returns:
            Shape, dtype and memory format of x.
        Raises:
            TypeError, ValueError: as `fastres.functional.batch_norm_act`.
        """
        if torch.jit.is_scripting() or self._leaves(x) or self._leaves_for(residual):  # type: ignore[attr-defined]
            return self._plain(x, residual)  # type: ignore[no-any-return]
        return self._fused(x, residual)

    @torch.jit.unused
    def _leaves_for(self, residual: Tensor | None) -> bool:
        return residual is not None and (
            why_not_ordinary(residual, self._dimensions, self) is not None or not self._fits(residual)
        )

    @torch.jit.unused
    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return norm_act(  # type: ignore[no-any-return]
            self.norm, x, residual, activation=activation_of(self.act), dropout=dropout, order=self.order
        )

    def _fits(self, x: Tensor) -> bool:
        norm = self.norm
        own: Tensor | None = norm.running_mean if norm.weight is None else norm.weight
        if own is None:
            return True
        wider = own.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
        fits = x.shape[1] == own.shape[0] and x.device == own.device
        return fits and (x.dtype == own.dtype or wider)

    def why_not_fusable(self) -> str | None:
        """As `Fused.why_not_fusable`; dropout needs the batch's statistics, too."""
        problem = super().why_not_fusable()
        if problem is None and self.dropout > 0 and self.training and not uses_batch_statistics(self.norm):
            return "its dropout acts while its normalisation is frozen"
        return problem


class FusedBatchNormAct1d(_FusedBatchNormAct, BatchNormAct1d):
    """`FusedBatchNormAct2d` over [N, C] or [N, C, L], by views onto the same kernels."""

    exactly = {"norm": nn.BatchNorm1d, "act": AnyActivation}  # noqa: RUF012
    _dimensions = (2, 3)
    _plain = renamed(_BatchNormAct.forward, "_plain")


class FusedBatchNormAct2d(_FusedBatchNormAct, BatchNormAct2d):
    """Batch normalisation, the addition of a residual, an activation and dropout in one pass.

        "add_act":  y = dropout(f(bn(x) + residual))
        "act_add":  y = dropout(f(bn(x))) + residual

    The normalisation is the child `norm`, torch's own BatchNorm2d, and f the child `act`. Where one is replaced
    (synchronised, folded) by what the kernels do not know, hooked, or frozen beside dropout, and where the call is
    traced, exported or transformed, its plain twin's forward runs.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as torch.nn.BatchNorm2d.
        relu: off leaves normalisation and addition; a shorthand for `act`.
        act: f, as a kind ("relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "elu", "identity"),
            an `fastres.Activation` or a module. A module that the kernels do not know is called by the plain twin.
        dropout: 0 <= dropout < 1, the probability of dropping an element, in training mode only.
        order: "add_act" (ResNet v1) or "act_add".
    The state_dict is BatchNorm2d's; its attributes are read and written through this module as well.
    Raises:
        TypeError, ValueError: an argument has the wrong type, dropout is outside [0, 1), order or act is unknown.
    """

    exactly = {"norm": nn.BatchNorm2d, "act": AnyActivation}  # noqa: RUF012
    _plain = renamed(_BatchNormAct.forward, "_plain")


class FusedBatchNormAct3d(_FusedBatchNormAct, BatchNormAct3d):
    """`FusedBatchNormAct2d` over [N, C, D, H, W], by views onto the same kernels."""

    exactly = {"norm": nn.BatchNorm3d, "act": AnyActivation}  # noqa: RUF012
    _dimensions = (5,)
    _plain = renamed(_BatchNormAct.forward, "_plain")


class AbsorbedReLU(nn.ReLU):
    """The ReLU behind a fused normalisation in networks that were pickled whole when blocks changed their children."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself: the normalisation before has applied the ReLU, and autograd may have saved it."""
        return x


def take_over_norm(parent: nn.Module, name: str) -> float:
    """Put the plain normalisation of a FusedBatchNormAct2d in its place, and return the dropout rate that it had."""
    norm = parent._modules.get(name)
    if type(norm) is not FusedBatchNormAct2d:
        return 0.0
    parent._modules[name] = norm.norm
    return norm.dropout
