#!/bin/bash
set -e
cd /data/m3i-scale
GLOO_SOCKET_IFNAME=lo LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 \
  NCCL_SOCKET_IFNAME=lo OMP_NUM_THREADS=8 RANK=0 WORLD_SIZE=2 /data/venv/bin/python -u -m m3i_scale train m3i \
  data.datasets.main.path=/data/shards/train output_dir=/data/runs/first &
GLOO_SOCKET_IFNAME=lo LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 \
  NCCL_SOCKET_IFNAME=lo OMP_NUM_THREADS=8 RANK=1 WORLD_SIZE=2 /data/venv/bin/python -u -m m3i_scale train m3i \
  data.datasets.main.path=/data/shards/train output_dir=/data/runs/first &
code=0
for one in $(jobs -p); do wait "$one" || code=$?; done
exit "$code"
