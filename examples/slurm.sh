#!/usr/bin/env bash
#SBATCH --job-name=megazero
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# One run over the nodes of a Slurm job; the words after the script are pretrain_gpt.py's. From the root of the repository:
#   sbatch --nodes 128 examples/slurm.sh --config examples/gpt3-175b.toml
# Ten minutes before the job's time is over Slurm sends SIGUSR1: the run saves and stops, and the job is queued again and goes on where it was.
set -euo pipefail
: "${SLURM_JOB_NUM_NODES:?start this with sbatch}"
export NODES=$SLURM_JOB_NUM_NODES RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)                       # not head: it would break the pipe
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}

again=
# one rank of this job that hears it is enough; torchrun itself, whose command line has no -u, must not
tell() {
    for rank in $(pgrep -f -- " -u .*pretrain_gpt\.py"); do
        if grep -qzx "SLURM_JOB_ID=$SLURM_JOB_ID" "/proc/$rank/environ" 2>/dev/null; then kill -USR1 "$rank" || true; fi
    done
}
trap 'again=1; tell' USR1
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash examples/multi_node.sh "$@"' srun "$@" --exit-signal-handler &
run=$!
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do                                    # a trap interrupts wait
    code=0
    wait "$run" || code=$?
done
if [ -n "$again" ] && [ "$code" = 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
