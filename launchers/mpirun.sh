#!/bin/bash
set -e
cd /data/m3i-scale
GLOO_SOCKET_IFNAME=eth0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NCCL_SOCKET_IFNAME=eth0 \
  OMPI_MCA_btl_tcp_if_include=eth0 OMPI_MCA_oob_tcp_if_include=eth0 OMP_NUM_THREADS=8 \
  PMIX_MCA_ptl_tcp_if_include=eth0 PRTE_MCA_prte_if_include=eth0 mpirun -n 16 --hostfile \
  /data/m3i-scale/launchers/deepspeed/hostfile --wdir /data/m3i-scale --bind-to none -x GLOO_SOCKET_IFNAME -x \
  NCCL_SOCKET_IFNAME -x OMP_NUM_THREADS -x MASTER_ADDR -x MASTER_PORT /data/venv/bin/python -u -m m3i_scale \
  train m3i data.sources.main.shards=/data/shards/train output_dir=/data/runs/first
