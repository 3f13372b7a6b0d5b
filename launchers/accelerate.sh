#!/bin/bash
# On every host: bash accelerate.sh PLACE, which counts the hosts from 0, the master node. All have as many ranks.
set -eu
cd /data/m3i-scale
export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
export OMP_NUM_THREADS=8
exec /data/venv/bin/python -m accelerate.commands.launch --config_file=/data/m3i-scale/launchers/accelerate.yaml \
  --machine_rank="$1" --module m3i_scale train m3i data.datasets.main.path=/data/shards/train \
  output_dir=/data/runs/first
