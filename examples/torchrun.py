"""DistributedDataParallel: `torchrun --standalone --nproc-per-node=2 examples/torchrun.py`, on CPUs or GPUs."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastres import FusedResNet18

rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
dist.init_process_group("nccl" if on_gpu else "gloo")


def main() -> None:
    torch.manual_seed(0)  # the same weights in every process
    model = FusedResNet18(num_classes=10, width=0.25).to(device)
    if on_gpu:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    replica = DistributedDataParallel(model, device_ids=[rank] if on_gpu else None)
    if not on_gpu:  # the constructor refuses SyncBatchNorm on a CPU, where fused blocks compute it
        replica.module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(replica.module)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.05)

    torch.manual_seed(1 + rank)  # images of its own for each
    images, labels = torch.randn(8, 3, 32, 32, device=device), torch.randint(10, (8,), device=device)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(replica(images), labels).backward()
        optimizer.step()

    norms = torch.stack([p.detach().norm() for p in model.parameters()])
    sums = norms.clone()
    dist.all_reduce(sums)
    assert torch.allclose(sums, dist.get_world_size() * norms)  # all processes hold the same weights
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes trained one network")


main()
# Now nothing else holds the group, and its end waits for its threads: gloo's abort a Python that ends before them.
dist.destroy_process_group()
