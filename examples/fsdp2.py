"""FSDP2: `torchrun --standalone --nproc-per-node=2 examples/fsdp2.py`, on CPUs or GPUs."""

import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastres import FusedResNet18
from fastres.nn import FusedBasicBlock

rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
dist.init_process_group("nccl" if on_gpu else "gloo")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

torch.manual_seed(0)  # the same weights in every process, of which each keeps its shard
model = FusedResNet18(num_classes=10, width=0.25).to(device)
for module in model.modules():
    if isinstance(module, FusedBasicBlock):
        fully_shard(module, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # after sharding: it holds the shards

torch.manual_seed(1 + rank)
images, labels = torch.randn(8, 3, 32, 32, device=device), torch.randint(10, (8,), device=device)
for _ in range(3):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
if dist.get_rank() == 0:
    print(f"{dist.get_world_size()} processes, loss of this one's images {loss.item():.3f}")
time.sleep(0.1)  # for gloo's threads to put down what the last step sent: they abort a Python that ends before them
dist.destroy_process_group()
