#!/usr/bin/env bash
# Train on several nodes under Slurm:  sbatch launch/slurm.sh   or  sbatch --nodes=2 launch/slurm.sh --config=qwen2 ...
# To save and stop:  scancel --signal=TERM JOBID   (plain scancel allows only KillWait, 30 s, for the save)
#
# ---- edit here -------------------------------------------------------------------------------------------------------
#SBATCH --job-name=comi
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive   # whole nodes: all processors, all memory, and all GPUs where there are any; else say how many, as
#SBATCH --mem=0       # in --gpus-per-node=4 --cpus-per-task=16 --mem=200G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600 # seconds before the time is up: the run saves, and the job is requeued
#SBATCH --open-mode=append
COMMAND=(--config=qwen2 model.path=models/qwen2 data.train=train.jsonl.gz data.eval=dev.jsonl.gz train.output=runs/qwen2)
RESTARTS="${COMI_RESTARTS:-10}"  # restarts from the newest checkpoint after a process is killed
REQUEUES="${COMI_REQUEUES:-100}" # how often the job is requeued
PYTHON="${PYTHON:-python}" # in an environment that all nodes can read, with '.[cuda]' on GPU nodes
# ----------------------------------------------------------------------------------------------------------------------
# One process per node drives all its GPUs; Slurm's variables give each process its index. train.output must be on a
# file system that all nodes share; a restarted run resumes from its newest checkpoint.
(($#)) && COMMAND=("$@")
export COMI_HEARTBEAT="${COMI_HEARTBEAT:-60}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Even in an exclusive job, a step must request the GPUs.
STEP=(--kill-on-bad-exit=0 --wait=$((COMI_HEARTBEAT + 30)) ${SLURM_GPUS_ON_NODE:+--gpus-per-node=$SLURM_GPUS_ON_NODE})

late=""  # set when the job's time limit is near
asked="" # set when the job is cancelled
trap 'late=1; echo "launch/slurm.sh: the time limit is near" >&2; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'asked=1' TERM

# Requeue this job if its time limit is near or a job of higher priority has preempted it.
requeue() {
    [ -z "$asked" ] || return
    [ -n "$late" ] || scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]' || return
    if ((${SLURM_RESTART_COUNT:-0} >= REQUEUES)); then
        echo "launch/slurm.sh: already requeued $REQUEUES times (COMI_REQUEUES)" >&2
        return 1
    fi
    scontrol requeue "$SLURM_JOB_ID" && echo "launch/slurm.sh: job requeued" >&2
}

# When a task is killed, the watchdogs of the others end them with status 75. There is no restart after 1 or 2 (an error
# that the user has to fix), 85 (stopped by a signal, after saving) or 130 (stopped by a second signal). If a node is
# lost, --requeue restarts the job.
for ((turn = 1; ; turn++)); do
    srun "${STEP[@]}" "$PYTHON" -m comi_jax.train "${COMMAND[@]}" </dev/null &
    step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal interrupts wait, not srun
    wait "$step"
    status=$?
    ((status >= 75)) && requeue && exit "$status" # also 143, from a run that had no signal handler yet
    ((status < 75 || status == 85 || status == 130 || status == 143 || turn > RESTARTS)) && exit "$status"
    [ -z "$asked$late" ] || exit "$status"
    echo "launch/slurm.sh: srun ended with status $status; restarting ($turn of $RESTARTS)" >&2
done
