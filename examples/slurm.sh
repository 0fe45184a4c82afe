#!/usr/bin/env bash
#SBATCH --job-name=megazero
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=%x-%j.log
# One run over the nodes of a Slurm job; the words after the script are pretrain_gpt.py's. From the root of the repository:
#   sbatch --nodes 128 examples/slurm.sh --config examples/gpt3-175b.toml
# Ten minutes before the job's time is over the run saves and stops; submitted again, it goes on where it was.
set -euo pipefail
: "${SLURM_JOB_NUM_NODES:?start this with sbatch}"
export NODES=$SLURM_JOB_NUM_NODES RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)                       # not head: it would break the pipe
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
words=("$@")
if [ -n "${SLURM_JOB_END_TIME:-}" ]; then
    words+=(--exit-duration-in-mins "$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 10))")
fi
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash examples/multi_node.sh "$@"' srun "${words[@]}"
