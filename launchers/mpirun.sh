#!/bin/bash
# Start this on one machine; Open MPI starts the ranks on all hosts, and the settings below are for its versions 4 and 5.
# MPICH and Intel MPI: mpiexec.hydra -n 16 -launcher ssh -f HOSTFILE -iface eth0 -genvlist NAMES, with lines `node1:8`.
# As root, Open MPI wants OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
set -e
cd /data/m3i-scale
export MASTER_ADDR=10.0.0.1 MASTER_PORT=29500
export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
export OMPI_MCA_btl_tcp_if_include=eth0 OMPI_MCA_oob_tcp_if_include=eth0
export PMIX_MCA_ptl_tcp_if_include=eth0 PRTE_MCA_prte_if_include=eth0
export OMP_NUM_THREADS=8
exec mpirun -n 16 --hostfile /data/m3i-scale/launchers/deepspeed/hostfile --wdir /data/m3i-scale --bind-to none \
  -x MASTER_ADDR -x MASTER_PORT -x GLOO_SOCKET_IFNAME -x NCCL_SOCKET_IFNAME -x OMP_NUM_THREADS \
  /data/venv/bin/python -u -m m3i_scale train m3i data.datasets.main.path=/data/shards/train \
  output_dir=/data/runs/first
