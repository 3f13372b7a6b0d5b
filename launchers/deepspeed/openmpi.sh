#!/bin/bash
# Start this on one machine: DeepSpeed's launcher starts the ranks on all hosts with Open MPI instead of pdsh.
# As root, Open MPI wants OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
set -e
cd /data/m3i-scale
export MASTER_ADDR=10.0.0.1 MASTER_PORT=29500
export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
export OMPI_MCA_oob_tcp_if_include=eth0
export PMIX_MCA_ptl_tcp_if_include=eth0 PRTE_MCA_prte_if_include=eth0
export OMP_NUM_THREADS=8
export DS_ENV_FILE=/dev/null # DeepSpeed would hand over the quotes that it puts around values of ~/.deepspeed_env
names="-x MASTER_ADDR -x MASTER_PORT -x GLOO_SOCKET_IFNAME -x NCCL_SOCKET_IFNAME -x OMP_NUM_THREADS"
exec /data/venv/bin/python -m deepspeed.launcher.runner --hostfile=/data/m3i-scale/launchers/deepspeed/hostfile \
  --master_addr=10.0.0.1 --master_port=29500 --launcher=openmpi --no_ssh_check --force_multi \
  --launcher_args="$names --mca btl_tcp_if_include eth0" --no_local_rank --module m3i_scale train m3i \
  data.datasets.main.path=/data/shards/train output_dir=/data/runs/first
