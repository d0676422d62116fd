"""The one question that a fused module asks before it takes its faster way: would anybody see the difference?

A fused block keeps torchvision's children with torch's own meaning. Its faster way leaves their calls out, which is
exact as long as every child is what its class says and no more, and nobody watches or transforms the single operators.
The question is asked of the block as it stands, at each call; otherwise it runs child by child, as torchvision's does.
"""

import logging
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastres import ordinary
from fastres.activations import Activation, module_classes

_Module = TypeVar("_Module", bound=nn.Module)

_log = logging.getLogger(__name__)

# Tensors whose operators are PyTorch's own; another subclass may give each operator a meaning of its own.
_TENSORS = (Tensor, nn.Parameter, FakeTensor)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Attributes that, set on a module itself, take the place of a method behind its call.
_METHODS = ("forward", "_conv_forward", "_check_input_dim")


def _functions() -> tuple[Any, ...]:
    """What torch's modules call; profilers and tools put functions of their own in these places."""
    return (
        nn.Conv2d.__call__,
        nn.BatchNorm2d.__call__,
        nn.ReLU.__call__,
        nn.Conv2d.forward,
        nn.Conv2d._conv_forward,
        nn.BatchNorm2d.forward,
        nn.ReLU.forward,
        F.conv2d,
        F.batch_norm,
        F.relu,
    )


_FUNCTIONS = _functions()


def _called_by(activation: type[nn.Module]) -> tuple[Any, ...]:
    """The same for a class of activations: its call, its forward, and the functions of torch.nn.functional in there."""
    code = getattr(activation.forward, "__code__", None)
    names = () if code is None else code.co_names
    return (activation.__call__, activation.forward, *[getattr(F, name) for name in names if hasattr(F, name)])


# nn.SyncBatchNorm's own, asked where a child is one; its call is nn.Module's.
_SYNCHRONISED_FORWARD = nn.SyncBatchNorm.forward
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# By class, so that a call asks about its own alone; `_functions` has ReLU's.
_CALLED_BY = {activation: _called_by(activation) for activation in module_classes() if activation is not nn.ReLU}
_CALLED_BY_POOL = _called_by(nn.MaxPool2d)


def _as_released(plain: type[nn.Module], method: str) -> Any:
    """A class's method, where it is the one that its module defines; None where somebody put another in its place."""
    found = getattr(plain, method)
    named = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    return found if named == (plain.__module__, f"{plain.__qualname__}.{method}") else None


# Of torchvision's classes, which people patch for all of their objects.
_RELEASED = {
    BasicBlock: {"forward": _as_released(BasicBlock, "forward")},
    Bottleneck: {"forward": _as_released(Bottleneck, "forward")},
    ResNet: {name: _as_released(ResNet, name) for name in ("forward", "_forward_impl")},
    IntermediateLayerGetter: {"forward": _as_released(IntermediateLayerGetter, "forward")},
}


def why_replaced(plain: type[nn.Module] | None) -> str | None:
    """Which method of a class of torchvision's somebody replaced; None where each is torchvision's."""
    if plain is None or plain not in _RELEASED:
        return None
    for name, released in _RELEASED[plain].items():
        if getattr(plain, name) is not released:
            return f"{name} of {class_name(plain)} has been replaced"
    return None


class AnyActivation(nn.Module):
    """Stands in a table of children for every activation that `fastres.activations` knows, each by its exact class."""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks, forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def class_name(module_class: type) -> str:
    """torch's own classes under the name that users write, others with their module."""
    package = "torch.nn" if module_class.__module__.startswith("torch.nn.modules.") else module_class.__module__
    return f"{package}.{module_class.__qualname__}"


def why_not_exactly(module: nn.Module | None, expected: type[nn.Module]) -> str | None:
    """Why calling the module does more, or other, than the class `expected` says; None where it does exactly that.

    A subclass counts as other: normalisation that is synchronised, frozen, quantised or parametrised is one. So does a
    parameter or buffer of a class of its own (a sharded or quantised one).
    """
    if type(module) is not expected:
        found = "missing" if module is None else class_name(type(module))
        return f"is {found}, expected exactly {class_name(expected)}"
    assert module is not None
    if has_hooks(module):
        return "has hooks, which would see other values or never run"
    for method in _METHODS:
        if method in module.__dict__:
            return f"has a {method} of its own, set on the instance"
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in _TENSORS:
            return f"has {key} of the class {class_name(type(tensor))}"
    return None


def is_exactly(module: Any, expected: type[_Module]) -> TypeGuard[_Module]:
    """Whether `why_not_exactly` has nothing to say. Asked of every child of a block at every call, so it is short."""
    if (
        type(module) is not expected
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    own = module.__dict__
    if "forward" in own or "_conv_forward" in own or "_check_input_dim" in own:
        return False
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and type(tensor) not in _TENSORS:
                return False
    return True


def is_batch_norm(module: Any, expected: type[nn.Module] = nn.BatchNorm2d) -> bool:
    """Whether the module is exactly this class of batch normalisation, or what convert_sync_batchnorm makes of it."""
    if is_exactly(module, expected):
        return True
    return is_exactly(module, nn.SyncBatchNorm) and nn.SyncBatchNorm.forward is _SYNCHRONISED_FORWARD


def is_max_pool(module: Any) -> TypeGuard[nn.MaxPool2d]:
    """Whether calling the module is F.max_pool2d, and that is PyTorch's."""
    return is_exactly(module, nn.MaxPool2d) and (
        torch.compiler.is_compiling() or _called_by(nn.MaxPool2d) == _CALLED_BY_POOL
    )


def why_not_children(parent: nn.Module, children: Mapping[str, type[nn.Module]]) -> str | None:
    """Why one of these children is not exactly what its class says; None where all are."""
    modules = parent._modules
    for name, expected in children.items():
        child = modules.get(name)
        if expected is AnyActivation:
            # A replaced activation is as good as ReLU where the kernels know it.
            expected = nn.ReLU if child is None or type(child) not in module_classes() else type(child)
            if expected in _CALLED_BY and _called_by(expected) != _CALLED_BY[expected]:
                return f"its {name} calls a function that somebody replaced in torch"
        if not is_exactly(child, expected) and not (expected in _BATCH_NORMS and is_batch_norm(child, expected)):
            return f"its {name} {why_not_exactly(child, expected)}"
    return None


def activation_of(module: nn.Module) -> Activation:
    """The activation that a child does which `why_not_children` found to be `AnyActivation`."""
    found = Activation.for_module(module)
    assert found is not None
    return found


def why_not_ordinary(x: Tensor, dimensions: tuple[int, ...] = (4,), parent: nn.Module | None = None) -> str | None:
    """Why this call has to be made of PyTorch's own operators; None for an ordinary one.

    Somebody looks at each operator (tracing, exporting, hooks on all modules), transforms it (torch.func) or gives it
    another meaning (a subclass of Tensor); or PyTorch's module would refuse x. An empty batch is left to PyTorch as
    well, but for where normalisations in `parent` are synchronised: this process takes part in what the others send.
    """
    if type(x) not in _TENSORS:
        return f"its input is a {type(x).__name__}"
    if x.dim() not in dimensions or x.dtype not in _DTYPES or x.layout is not torch.strided:
        return "its input is not a batch of images in floating point"
    if x.numel() == 0 and not (x.shape[0] == 0 and parent is not None and _shares_statistics(parent)):
        return "its input is empty"
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "hooks on all modules are registered"
    if ordinary.is_exporting():
        return "it is exported"
    if x.dtype == torch.float64 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return "autocast leaves float64 alone"
    if not torch.compiler.is_compiling():
        if _functions() != _FUNCTIONS:
            return "one of PyTorch's functions has been replaced"
        if torch._C._len_torch_function_stack() > 0:
            # A default device is one of these modes, and changes nothing here.
            for mode in torch.overrides._get_current_function_mode_stack():  # type: ignore[no-untyped-call]
                if type(mode) is not DeviceContext:
                    return f"{type(mode).__name__} takes PyTorch's functions over"
    return ordinary.why_not_ordinary()


def _shares_statistics(parent: nn.Module) -> bool:
    return any(type(m) is nn.SyncBatchNorm and m.training for m in parent.modules())


class Fused(nn.Module):
    """A module with a faster way through its children. Subclasses name the children and give both ways.

    Attributes:
        exactly: child -> the class that it has to be of for the faster way.
    """

    # Typed in comments: TorchScript reads a module class's annotations, and knows few types.
    exactly = {}  # type: Mapping[str, type[nn.Module]]  # noqa: RUF012
    # The class of torchvision's whose forward this one stands for.
    stands_for = None  # type: type[nn.Module] | None
    # Numbers of dimensions of an input that the faster way takes.
    _dimensions = (4,)  # type: tuple[int, ...]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def why_not_fusable(self) -> str | None:
        """Why the module, as it stands, is computed child by child; None where it takes the faster way."""
        if "forward" in self.__dict__:
            return "it has a forward of its own, set on the instance"
        return why_replaced(self.stands_for) or why_not_children(self, self.exactly)

    def _fits(self, x: Tensor) -> bool:
        """Whether x has the channels, device and dtype of the parameters, once the children are what they should be."""
        return True

    @torch.jit.unused
    def _leaves(self, x: Tensor) -> bool:
        """Whether the call with the input x goes child by child."""
        if why_not_ordinary(x, self._dimensions, self) is not None:
            return True
        problem = self.why_not_fusable()
        if problem is None and not self._fits(x):
            return True  # PyTorch's modules say what is wrong with x
        if not torch.compiler.is_compiling():
            # Kept in the module: True once it has taken the faster way, False once the log has said that it left.
            if problem is None:
                self.__dict__.setdefault("_was_fused", True)
            elif self.__dict__.get("_was_fused"):
                self.__dict__["_was_fused"] = False
                _log.warning("a %s goes on child by child, as in plain PyTorch: %s", type(self).__name__, problem)
        return problem is not None


def renamed(function: Any, name: str) -> Any:
    """The same function under another name, which is the one that TorchScript compiles it under."""
    return FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
