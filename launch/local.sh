#!/usr/bin/env bash
# N processes of one run on this machine, over loopback, on CPU; what a cluster does, for trying it out:
#
#     launch/local.sh 2 -- --config=tiny
#
# When one ends badly the others are given the time in which they notice by themselves, then they are ended.
set -u
count="${1:?how many processes}"
shift
[ "${1:-}" = "--" ] && shift
python="${PYTHON:-python}"
export COMI_HEARTBEAT="${COMI_HEARTBEAT:-60}" COMI_PROCESSES="$count" JAX_PLATFORMS=cpu
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" || exit
export COMI_COORDINATOR="127.0.0.1:$port"

pids=()
for ((i = 0; i < count; i++)); do
    COMI_PROCESS=$i "$python" -m comi_jax.train "$@" &
    pids+=($!)
done
reaper=""
signal=TERM # a second one does not wait until the run is saved
trap 'kill -$signal "${pids[@]}" 2>/dev/null; signal=KILL' INT TERM

status=0
for ((left = count; left > 0; left--)); do
    ended=""
    until [ -n "${ended:-}" ]; do # a signal to this script interrupts the waiting
        wait -n -p ended "${pids[@]}"
        code=$?
        ((code == 127)) && break 2
    done
    for i in "${!pids[@]}"; do
        [ "${pids[$i]}" = "${ended:-}" ] && index=$i && unset "pids[$i]"
    done
    if ((code != 0)); then
        echo "launch/local.sh: process $index of $count ended with status $code$( ((code > 128)) && echo ", killed by signal $((code - 128))")" >&2
        if ((status == 0 && left > 1)); then
            status=$code
            # KILL also reaches a process that was stopped.
            (sleep $((COMI_HEARTBEAT + 5)); kill -KILL "${pids[@]}") >/dev/null 2>&1 &
            reaper=$!
        fi
        status=$((status == 0 ? code : status))
    fi
done
[ -n "$reaper" ] && kill "$reaper" 2>/dev/null
exit "$status"
