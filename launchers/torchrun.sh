#!/bin/bash
# On every host: bash torchrun.sh PLACE, which counts the hosts from 0, the master node.
set -eu
cd /data/m3i-scale
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
export OMP_NUM_THREADS=8
slots=(8 8)
exec /data/venv/bin/python -m m3i_scale.launch.torchrun_agent --nnodes=2 --nproc-per-node="${slots[$1]}" \
  --node-rank="$1" --master-addr=10.0.0.1 --master-port=29500 --max-restarts=0 --module m3i_scale train m3i \
  data.datasets.main.path=/data/shards/train output_dir=/data/runs/first
