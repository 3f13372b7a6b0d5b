#!/bin/bash
set -e
cd /data/m3i-scale
DS_ENV_FILE=/data/m3i-scale/launchers/deepspeed/deepspeed_env \
  PDSH_SSH_ARGS_APPEND='-oBatchMode=yes -oConnectTimeout=30 -oServerAliveInterval=15 -oServerAliveCountMax=4' \
  /data/venv/bin/python -m deepspeed.launcher.runner --hostfile=/data/m3i-scale/launchers/deepspeed/hostfile \
  --master_addr=10.0.0.1 --master_port=29500 --launcher=pdsh --no_ssh_check --force_multi --no_local_rank \
  --module m3i_scale train m3i data.datasets.main.path=/data/shards/train output_dir=/data/runs/first
