#!/bin/bash
# Not tested: it needs a cluster with Slurm. What it starts, multi_node.yaml, is.
# Two nodes with 8 GPUs each, restarted after pre-emption: sbatch training/accelerate_configs/slurm.sh RECIPE.yaml
# Slurm sends SIGTERM to all processes two minutes before the end; they save a checkpoint and end, the job is queued
# again, and resume_from_checkpoint: auto goes on from there.
#SBATCH --job-name=l2d
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

export FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RECIPE=$1

srun bash -c 'accelerate launch --config_file training/accelerate_configs/multi_node.yaml \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * 8))" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$FIRST_NODE" -m training.train --config "$RECIPE" --resume_from_checkpoint auto'

# A run that was stopped has left no final model.
output=$(sed -n 's/^output_dir: *//p' "$RECIPE")
[ -e "$output/train_results.json" ] || scontrol requeue "$SLURM_JOB_ID"
