#!/usr/bin/env bash
# Try out a run of several processes on one machine: CPU devices, connected over loopback. For 2 processes:
#
#     launch/local.sh 2 -- --config=tiny
#
# When one process fails, the watchdogs of the others get time to end them, then they are killed. Unless the user has to
# fix the run, all are restarted from the newest checkpoint, up to COMI_RESTARTS times (3). A run that is stopped by a
# signal saves first and exits with 85.
set -u
count="${1:?usage: launch/local.sh PROCESSES -- --config=NAME [path=value ...]}"
shift
[ "${1:-}" = "--" ] && shift
python="${PYTHON:-python}"
export COMI_HEARTBEAT="${COMI_HEARTBEAT:-60}" COMI_PROCESSES="$count" JAX_PLATFORMS=cpu

pids=()
asked=""    # set once a signal has asked the run to stop
signal=TERM # a second signal kills without waiting for the save
trap 'asked=1; kill -$signal "${pids[@]}" 2>/dev/null; signal=KILL' INT TERM HUP

# Start all processes and wait for them. Sets "status" to the first non-zero exit status, and "again" if a restart makes
# sense: every failed process was killed or exited with 75 (a peer process is gone). Other statuses are errors that the
# user has to fix (1, 2), or requested stops (85, 130, 143).
run() {
    local i code port late=$((1 << 60))
    status=0 again=1 pids=()
    port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" || exit
    export COMI_COORDINATOR="127.0.0.1:$port"
    set -m # each in its own process group: Ctrl-C reaches only this script, which signals each process once
    for ((i = 0; i < count; i++)); do
        COMI_PROCESS=$i "$python" -m comi_jax.train "$@" &
        pids+=($!)
    done
    set +m
    [ -z "$asked" ] || kill "${pids[@]}"
    while ((${#pids[@]})); do # wait -n misses children that are killed while stopped
        sleep 0.2
        ((SECONDS < late)) || kill -KILL "${pids[@]}" # KILL also ends a stopped process
        for i in "${!pids[@]}"; do
            kill -0 "${pids[$i]}" 2>/dev/null && continue
            wait "${pids[$i]}"
            code=$?
            unset "pids[$i]"
            ((code == 0)) && continue
            ((code == 85)) || echo "launch/local.sh: process $i of $count ended with status $code$( ((code > 128 && code != 130)) && echo ", killed by signal $((code - 128))")" >&2
            ((code == 75 || (code > 128 && code != 130 && code != 143))) || again=""
            ((status)) || late=$((SECONDS + COMI_HEARTBEAT + 5))
            status=$((status == 0 ? code : status))
        done
    done
}

restarts="${COMI_RESTARTS:-3}"
for ((turn = 1; ; turn++)); do
    run "$@"
    if ((status == 0 || turn > restarts)) || [ -n "$asked" ] || [ -z "$again" ]; then
        exit "$status"
    fi
    echo "launch/local.sh: restarting all $count processes ($turn of $restarts)" >&2
done
