"""One network in several processes: DistributedDataParallel or FSDP2 around it, and its state as one process has it.

Both average the processes' gradients. A process's loss is weighted with `loss_weight`, so that the average is the
gradient of the joined batch's mean loss, also where the shares differ by an image.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastres.train.config import TrainConfig
from fastres.train.distributed import Group
from fastres.train.errors import InputError
from fastres.train.optim import own_implementation, restore

# What only --fsdp needs is imported in its functions: it takes half a second, and a PyTorch with torch.distributed.


def check_job(config: TrainConfig, group: Group, resumed: dict[str, Any] | None) -> None:
    """Check a resolved configuration, and the checkpoint to go on from, against the number of processes.

    Raises:
        InputError: fewer images a batch than the processes need, an option that needs several processes or blocks that
            the network does not have, or a checkpoint of another number of processes.
    """
    if config.fsdp and group.size == 1:
        raise InputError("fsdp: expected several processes (torchrun --nproc-per-node), got one")
    if config.uses_cuda_graphs and group.size > 1:
        raise InputError(
            f"compile_mode: expected a mode without CUDA graphs in several processes, got {config.compile_mode!r}"
        )
    if config.sync_bn and group.size > 1 and config.device == "cpu" and not config.fused:
        raise InputError("sync_bn: expected --fused on a CPU, torch's nn.SyncBatchNorm is for GPUs; got --no-fused")
    if config.batch_size is not None and config.batch_size < 2 * group.size:
        raise InputError(
            f"batch_size: expected at least 2 images for each of {group.size} processes, got {config.batch_size}"
        )
    if resumed is not None:
        then = len(resumed["torch_rng"]) if isinstance(resumed["torch_rng"], list) else 1
        if then != group.size:
            raise InputError(
                f"resume: the checkpoint {config.resume} is of a job of {then} processes, which draw {then} streams of "
                f"random numbers; this job has {group.size}"
            )


def of_rank(states: Any, group: Group) -> Any:
    """This process's entry of what `by_rank` made."""
    return states[group.rank] if isinstance(states, list) else states


def by_rank(state: Any, group: Group) -> Any:
    """The states of all processes as a list, for a checkpoint; of one process its state."""
    return state if group.size == 1 else group.gather(state)


def loss_weight(group: Group, count: int) -> float:
    """What to multiply this process's mean loss with, before gradients are averaged; `count` images in all shares."""
    share = group.share(count)
    return float(share.stop - share.start) * group.size / count


def smallest_batch(group: Group, *, sync_bn: bool) -> int:
    """The fewest images of a batch that can be trained on: batch statistics need two, in each process or in all."""
    return max(2, group.size) if sync_bn else 2 * group.size


def shard(model: nn.Module, group: Group, device: torch.device, *, sync_bn: bool = False) -> nn.Module:
    """Shard each block's parameters over the processes, and the rest as one unit; in place, before the optimizer.

    A block is a member of a Sequential or ModuleList that has children of its own: the blocks of every network here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    mesh = init_device_mesh(device.type, (group.size,))
    lists = [module for module in model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    for block in dict.fromkeys(child for parent in reversed(lists) for child in parent.children()):
        if block is not model and any(True for _ in block.children()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to this module: FSDP2 adds its methods to the class."""
    return hasattr(model, "set_requires_gradient_sync")


def spread(compute: Any, group: Group, device: torch.device, *, static_graph: bool, sync_bn: bool = False) -> Any:
    """What to call in training so that gradients are averaged over the processes.

    Args:
        compute: the network, or what torch.compile made of it; sharded ones average by themselves.
        static_graph: every step uses the same parameters, and none is accumulated: DDP's reducer, which learns the
            order of the gradients in its first backward pass, fails where that one is not to be reduced.
        sync_bn: make the network's normalisation nn.SyncBatchNorm, in place; `shard` has done so with a sharded one.
    """
    if group.size == 1 or any(map(is_sharded, compute.modules())):
        return compute
    # Running statistics are rank 0's. `share_buffers` sends them before an evaluation, not at every step.
    # torch 2.14 gave the option another name.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    replica = DistributedDataParallel(
        compute,
        device_ids=[device] if device.type == "cuda" else None,
        **options,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
    )
    if sync_bn:
        # Now, since DistributedDataParallel refuses a network on a CPU that has it: torch's own runs on GPUs alone.
        nn.SyncBatchNorm.convert_sync_batchnorm(replica)  # type: ignore[no-untyped-call]
    return replica


@contextmanager
def without_reduction(compute: nn.Module) -> Iterator[None]:
    """Backward passes inside only add to the local gradients; the first one after the block sends their sum."""
    if isinstance(compute, DistributedDataParallel):
        with compute.no_sync():
            yield
        return
    sharded: list[Any] = [module for module in compute.modules() if is_sharded(module)]
    for module in sharded:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)


def share_buffers(model: nn.Module, group: Group) -> None:
    """Give every process rank 0's buffers: the running statistics, which each has of its own share of the images.

    Rank 0's own stay as they are, so it makes no difference to the run how often this happens.
    """
    if group.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def whole_model(model: nn.Module) -> dict[str, Tensor]:
    """The network's state_dict with unsharded tensors, for rank 0 to save; other ranks of a sharded one get nothing."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state_dict as of a network that is not sharded: parameters by number, tensors whole."""
    if not is_sharded(model):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    if not state:
        return {}
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


class OptimizerState:
    """Loads what `whole_optimizer` gave into an optimizer, whether its network is sharded or not."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = own_implementation(self.optimizer, state)
        if not is_sharded(self.model):
            restore(self.optimizer, state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        by_parameter = {id(parameter): name for name, parameter in self.model.named_parameters()}
        names = [by_parameter[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        if [len(g["params"]) for g in state["param_groups"]] != [len(g["params"]) for g in self.optimizer.param_groups]:
            raise ValueError("the groups of parameters differ")
        named: Any = {
            "state": {names[index]: dict(values) for index, values in state["state"].items()},
            "param_groups": [{**g, "params": [names[index] for index in g["params"]]} for g in state["param_groups"]],
        }
        set_optimizer_state_dict(self.model, self.optimizer, named, options=StateDictOptions(full_state_dict=True))
