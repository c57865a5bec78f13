#!/usr/bin/env bash
# Train on several nodes under Slurm:   sbatch launch/slurm.sh
#
# ---- edit here -------------------------------------------------------------------------------------------------------
#SBATCH --job-name=comi
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@600  # before the time is up: the run saves and ends
#SBATCH --open-mode=append
COMMAND=(--config=qwen2 model.path=models/qwen2 data.train=train.jsonl.gz data.eval=dev.jsonl.gz train.output=runs/qwen2)
RESTARTS="${COMI_RESTARTS:-10}" # how often all are started again, from the newest checkpoint, after one was killed
PYTHON="${PYTHON:-python}" # of an environment that every node sees, with '.[cuda]'
# ----------------------------------------------------------------------------------------------------------------------
# JAX reads from Slurm who the processes are. One process a node drives all its GPUs. train.output must lie on a file
# system that all nodes share; a run that is started again goes on from its newest checkpoint.
export COMI_HEARTBEAT="${COMI_HEARTBEAT:-60}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Tasks that are not killed notice by themselves that another is gone, and end with 75. A run that the user has to mend
# ends with 1 or 2, one that was asked to end with 0, 130 or 143: these are not started again. --requeue is for a node
# that is lost.
for ((turn = 1; ; turn++)); do
    srun --kill-on-bad-exit=0 --wait=$((COMI_HEARTBEAT + 30)) "$PYTHON" -m comi_jax.train "${COMMAND[@]}"
    status=$?
    ((status < 75 || status == 130 || status == 143 || turn > RESTARTS)) && exit "$status"
    echo "launch/slurm.sh: srun ended with status $status; starting again ($turn of $RESTARTS)" >&2
done
