#!/bin/bash
#SBATCH --job-name=hasten
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --partition=cpu
#SBATCH --no-kill
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=4
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Each host's agent has to know whether the others meet at it.
# shellcheck disable=SC2016
srun --no-kill --kill-on-bad-exit=0 bash -c 'exec python -m torch.distributed.run --nnodes=2:4 --nproc-per-node=2 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint="$1":29400 --rdzv-id=$SLURM_JOB_ID --rdzv-conf=is_host=$((SLURM_NODEID == 0)),join_timeout=600,last_call_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=3 -m "${@:2}"' agent "${hosts[0]}" hasten.cli run launch.min_nodes=2 store.folder=/hasten/store model=mlp 'target.engines=[eager,onnxruntime]' trainer.epochs=3 trainer.threads=4 distributed=hybrid distributed.devices=8 'name="it'"'"'s $mine"'
