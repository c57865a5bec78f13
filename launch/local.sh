#!/usr/bin/env bash
# N processes of one run on this machine, over loopback, on CPU; what a cluster does, for trying it out:
#
#     launch/local.sh 2 -- --config=tiny
#
# When one ends badly the others are given the time in which they notice by themselves, then they are ended. If that was
# not for something that the user has to mend, all are started again, COMI_RESTARTS times (3), from the newest checkpoint.
# A run that was asked to end, and saved, ends with 85.
set -u
count="${1:?how many processes}"
shift
[ "${1:-}" = "--" ] && shift
python="${PYTHON:-python}"
export COMI_HEARTBEAT="${COMI_HEARTBEAT:-60}" COMI_PROCESSES="$count" JAX_PLATFORMS=cpu

pids=()
asked=""    # whether a signal asked for the end
signal=TERM # a second one does not wait until the run is saved
trap 'asked=1; kill -$signal "${pids[@]}" 2>/dev/null; signal=KILL' INT TERM HUP

# Start all processes and wait for them. Sets status, that of the first that ended badly, and again: whether none ended
# with a message to the user (1, 2) or by request (85, 130, 143), but killed, or with 75, because another was gone.
run() {
    local i code port late=$((1 << 60))
    status=0 again=1 pids=()
    port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" || exit
    export COMI_COORDINATOR="127.0.0.1:$port"
    set -m # each in a group of its own: Ctrl-C reaches this script alone, which asks each of them once
    for ((i = 0; i < count; i++)); do
        COMI_PROCESS=$i "$python" -m comi_jax.train "$@" &
        pids+=($!)
    done
    set +m
    [ -z "$asked" ] || kill "${pids[@]}"
    while ((${#pids[@]})); do # wait -n forgets children that end while they are stopped
        sleep 0.2
        ((SECONDS < late)) || kill -KILL "${pids[@]}" # which also reaches one that was stopped
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
    echo "launch/local.sh: starting all $count processes again ($turn of $restarts)" >&2
done
