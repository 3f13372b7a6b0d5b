#!/bin/bash
# On every host: bash torchrun.sh PLACE, which counts the hosts from 0, the head.
set -eu
cd /data/m3i-scale
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
export OMP_NUM_THREADS=8
slots=(8 8)
exec /data/venv/bin/python -m m3i_scale.launch.torchrun_agent --nnodes=2 --nproc-per-node="${slots[$1]}" \
  --rdzv-backend=c10d --rdzv-endpoint=10.0.0.1:29500 --rdzv-id=m3i \
  --rdzv-conf=is_host="$([ "$1" = 0 ] && echo true || echo false)" --max-restarts=0 --module m3i_scale train \
  m3i data.sources.main.shards=/data/shards/train output_dir=/data/runs/first
