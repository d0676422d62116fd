#!/bin/sh
# Two machines with four GPUs each. Run the same on both; HOST is the first one's name. docs/distributed.md
#   HOST=node0 sh docs/examples/torchrun.sh
set -eu
exec torchrun \
    --nnodes=2 --nproc-per-node=4 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="${HOST:?name of the first machine}:29400" --rdzv-id=resnet18 \
    -m fastres.train \
    --model resnet18 --dataset cifar10 --data-dir "${DATA:-data}" --output-dir "${RUN:-runs/resnet18}" \
    --batch-size 1024 --sync-bn --amp bf16
