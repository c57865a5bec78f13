#!/usr/bin/env bash
# Train on several nodes under Slurm:   sbatch launch/slurm.sh   or   sbatch --nodes=2 launch/slurm.sh --config=qwen2 ...
# To end it, saved first:   scancel --signal=TERM JOBID   (plain scancel leaves KillWait, 30 s, for the saving)
#
# ---- edit here -------------------------------------------------------------------------------------------------------
#SBATCH --job-name=comi
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive   # whole nodes: all processors, all memory, and all GPUs where there are any; else say how many, as
#SBATCH --mem=0       # in --gpus-per-node=4 --cpus-per-task=16 --mem=200G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600 # seconds before the time is up: the run saves, and the job is queued again
#SBATCH --open-mode=append
COMMAND=(--config=qwen2 model.path=models/qwen2 data.train=train.jsonl.gz data.eval=dev.jsonl.gz train.output=runs/qwen2)
RESTARTS="${COMI_RESTARTS:-10}"  # how often all are started again, from the newest checkpoint, after one was killed
REQUEUES="${COMI_REQUEUES:-100}" # how often the job is queued again
PYTHON="${PYTHON:-python}" # of an environment that every node sees, with '.[cuda]' where there are GPUs
# ----------------------------------------------------------------------------------------------------------------------
# One process a node drives all its GPUs; who the processes are stands in Slurm's variables. train.output must lie on a
# file system that all nodes share; a run that is started again goes on from its newest checkpoint.
(($#)) && COMMAND=("$@")
export COMI_HEARTBEAT="${COMI_HEARTBEAT:-60}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# A step of an exclusive job has to ask for the GPUs.
STEP=(--kill-on-bad-exit=0 --wait=$((COMI_HEARTBEAT + 30)) ${SLURM_GPUS_ON_NODE:+--gpus-per-node=$SLURM_GPUS_ON_NODE})

late=""  # whether the job's time is nearly up
asked="" # whether it was cancelled
trap 'late=1; echo "launch/slurm.sh: the time is nearly up" >&2; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'asked=1' TERM

# Queue this job again, if it ends because its time is up or a job of higher priority takes its nodes.
requeue() {
    [ -z "$asked" ] || return
    [ -n "$late" ] || scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]' || return
    if ((${SLURM_RESTART_COUNT:-0} >= REQUEUES)); then
        echo "launch/slurm.sh: queued again $REQUEUES times already (COMI_REQUEUES)" >&2
        return 1
    fi
    scontrol requeue "$SLURM_JOB_ID" && echo "launch/slurm.sh: the job is queued again" >&2
}

# Tasks that are not killed notice by themselves that another is gone, and end with 75. A run that the user has to mend
# ends with 1 or 2, one that was asked to end, and saved, with 85, asked twice with 130: these are not started again.
# --requeue is for a node that is lost.
for ((turn = 1; ; turn++)); do
    srun "${STEP[@]}" "$PYTHON" -m comi_jax.train "${COMMAND[@]}" </dev/null &
    step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends the waiting, not srun
    wait "$step"
    status=$?
    ((status >= 75)) && requeue && exit "$status" # 143, too, of a run that was not yet listening
    ((status < 75 || status == 85 || status == 130 || status == 143 || turn > RESTARTS)) && exit "$status"
    [ -z "$asked$late" ] || exit "$status"
    echo "launch/slurm.sh: srun ended with status $status; starting again ($turn of $RESTARTS)" >&2
done
