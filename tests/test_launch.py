"""The launchers, with a program in place of Python whose processes end as the test says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
# Notes its turn, then does the words of TURN_<turn>_<process>, or ends well.
PROGRAM = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 12345; exit; fi
process="${COMI_PROCESS:-$SLURM_PROCID}"
echo x >> "$NOTES/turns_$process"
turn=$(wc -l < "$NOTES/turns_$process")
echo "$COMI_COORDINATOR $*" >> "$NOTES/words"
words="TURN_${turn}_$process"
eval "${!words:-exit 0}"
"""

TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.fixture
def launcher(tmp_path):
    """Starts a launcher whose processes do what is given by (turn, process)."""
    program = tmp_path / "python"
    program.write_text(PROGRAM)
    program.chmod(0o755)

    def start(script, *words, restarts=None, terminal=False, variables=None, **turns):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(program), "NOTES": str(tmp_path)}
        environment |= {"COMI_HEARTBEAT": "1"} | ({} if restarts is None else {"COMI_RESTARTS": str(restarts)})
        environment |= variables or {}
        environment |= {f"TURN_{key}": value for key, value in turns.items()}
        # A shell cannot take over a signal that was ignored when it started, as Ctrl-C is behind nohup and in CI.
        command = ["env", "--default-signal=INT", "bash", str(LAUNCH / script), *words]
        if terminal:  # what is written to standard input is typed
            command = [sys.executable, "-c", TERMINAL, *command]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    return start


def turns(folder, process=0):
    return len((folder / f"turns_{process}").read_text().split())


def test_all_are_started_again_when_one_was_killed(launcher, tmp_path):
    """The other notices and ends with 75. The second turn goes well."""
    process = launcher("local.sh", "2", "--", "--config=tiny", **{"1_0": "sleep 0.2; exit 75", "1_1": "kill -9 $$"})
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 0, said
    assert "process 1 of 2 ended with status 137, killed by signal 9" in said
    assert said.count("restarting all 2 processes (1 of 3)") == 1
    assert turns(tmp_path, 0) == turns(tmp_path, 1) == 2
    assert set((tmp_path / "words").read_text().splitlines()) == {"127.0.0.1:12345 -m comi_jax.train --config=tiny"}


def test_a_process_that_is_stopped_is_killed_and_all_are_started_again(launcher, tmp_path):
    process = launcher("local.sh", "2", **{"1_0": "sleep 0.5; exit 75", "1_1": "kill -STOP $$; exit 0"})
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 0 and "process 1 of 2 ended with status 137" in said, said
    assert turns(tmp_path, 1) == 2


def test_a_run_that_the_user_has_to_mend_is_not_started_again(launcher, tmp_path):
    """One refuses, the other ends because that one is gone."""
    process = launcher("local.sh", "2", **{"1_0": "sleep 0.5; exit 1", "1_1": "exit 75"})
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and "again" not in said, said
    assert turns(tmp_path) == 1


def test_it_gives_up_after_so_many_turns(launcher, tmp_path):
    every = {f"{turn}_{process}": "exit 75" for turn in range(1, 9) for process in (0, 1)}
    process = launcher("local.sh", "2", restarts=2, **every)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and "(2 of 2)" in said, said
    assert turns(tmp_path, 0) == turns(tmp_path, 1) == 3


ASKED = "trap 'echo asked >> $NOTES/asked' TERM INT; echo > $NOTES/up_$process; sleep 1; sleep 1; exit 75"


def until_up(folder):
    end = time.monotonic() + 10
    while not all((folder / f"up_{index}").exists() for index in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_each_process_once_and_nothing_is_started_again(launcher, tmp_path, number):
    """Killed while saving, for instance: still, the end was asked for."""
    process = launcher("local.sh", "2", **{"1_0": ASKED, "1_1": ASKED})
    until_up(tmp_path)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and "again" not in said, said
    assert (tmp_path / "asked").read_text().split() == ["asked", "asked"]


def test_ctrl_c_at_a_terminal_reaches_each_process_once(launcher, tmp_path):
    process = launcher("local.sh", "2", terminal=True, **{"1_0": ASKED, "1_1": ASKED})
    until_up(tmp_path)
    process.stdin.write("\x03")
    process.stdin.flush()
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 75, said
    assert (tmp_path / "asked").read_text().split() == ["asked", "asked"] and turns(tmp_path) == 1


def test_one_that_was_asked_twice_is_not_started_again(launcher, tmp_path):
    process = launcher("local.sh", "2", **{"1_0": "exit 130", "1_1": "sleep 0.5; exit 130"})
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and turns(tmp_path) == 1, said


def test_a_run_that_saved_and_ended_is_not_started_again(launcher, tmp_path):
    """Somebody asked one of its processes, not the launcher."""
    process = launcher("local.sh", "2", **{"1_0": "exit 85", "1_1": "sleep 0.5; exit 85"})
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 85 and turns(tmp_path) == 1 and not said, said


SRUN = """#!/usr/bin/env bash
# Two tasks, and the largest of their statuses.
while [[ "$1" == --* ]]; do echo "$1" >> "$NOTES/options"; shift; done
worst=0
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
for task in $first $second; do wait $task; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
SCANCEL = """#!/usr/bin/env bash
# Signals the tasks.
[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat "$NOTES"/pid_*)
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$NOTES/queue"
[ "$1" = show ] && echo "   PreemptTime=${PREEMPTED:-None}"
exit 0
"""
SAVES = """trap 'exit 85' TERM
echo $$ > $NOTES/pid_$process; echo > $NOTES/up_$process
for i in {1..150}; do sleep 0.1; done"""


@pytest.fixture
def slurm(launcher, tmp_path):
    """Starts slurm.sh, with programs in the place of Slurm's."""
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(*words, variables=None, **turns):
        return launcher("slurm.sh", *words, variables={"SLURM_JOB_ID": "7"} | (variables or {}), **turns)

    return start


def asked_of_scontrol(folder):
    return (folder / "queue").read_text().splitlines() if (folder / "queue").exists() else []


@pytest.mark.parametrize(
    "status, expected, count",
    [
        ({"1_0": "exit 75", "1_1": "kill -9 $$"}, 0, 2),
        ({"1_0": "exit 1", "1_1": "exit 1"}, 1, 1),
        ({"1_0": "exit 130", "1_1": "exit 130"}, 130, 1),
        ({"1_0": "exit 85", "1_1": "exit 85"}, 85, 1),
        ({}, 0, 1),
    ],
    ids=["killed", "refused", "asked twice", "asked", "well"],
)
def test_under_slurm_too(slurm, tmp_path, status, expected, count):
    process = slurm(**status)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == expected, said
    assert turns(tmp_path, 0) == turns(tmp_path, 1) == count
    assert said.count("restarting") == count - 1
    assert (tmp_path / "options").read_text().split() == ["--kill-on-bad-exit=0", "--wait=31"] * count
    assert "requeue 7" not in asked_of_scontrol(tmp_path)


@pytest.mark.parametrize("status", [85, 143])
def test_before_its_time_is_up_a_slurm_job_saves_and_is_queued_again(slurm, tmp_path, status):
    """Also one that had only begun to start, and has died of the signal."""
    saves = SAVES.replace("85", str(status))
    process = slurm(**{"1_0": saves, "1_1": saves})
    until_up(tmp_path)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=40)[1]
    assert process.returncode == status and asked_of_scontrol(tmp_path) == ["requeue 7"], said


def test_a_slurm_job_is_not_queued_again_for_ever(slurm, tmp_path):
    process = slurm(variables={"SLURM_RESTART_COUNT": "2", "COMI_REQUEUES": "2"}, **{"1_0": SAVES, "1_1": SAVES})
    until_up(tmp_path)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=40)[1]
    assert process.returncode == 85 and "already requeued 2 times" in said
    assert asked_of_scontrol(tmp_path) == []


@pytest.mark.parametrize("preempted, queued", [("2026-01-01T00:00:00", True), ("None", False)])
def test_a_slurm_job_is_queued_again_after_a_preemption_not_after_a_request(slurm, tmp_path, preempted, queued):
    process = slurm(variables={"PREEMPTED": preempted}, **{"1_0": "exit 85", "1_1": "exit 85"})
    said = process.communicate(timeout=40)[1]
    assert process.returncode == 85, said
    assert ("requeue 7" in asked_of_scontrol(tmp_path)) == queued


def test_a_slurm_job_that_was_cancelled_is_not_queued_again(slurm, tmp_path):
    """All its processes get SIGTERM, the script too."""
    process = slurm(variables={"PREEMPTED": "2026-01-01T00:00:00"}, **{"1_0": SAVES, "1_1": SAVES})
    until_up(tmp_path)
    process.terminate()
    for index in (0, 1):
        os.kill(int((tmp_path / f"pid_{index}").read_text()), signal.SIGTERM)
    said = process.communicate(timeout=40)[1]
    assert process.returncode == 85 and "requeue 7" not in asked_of_scontrol(tmp_path), said


def test_a_slurm_step_asks_for_the_gpus_of_its_job_and_takes_the_words_given(slurm, tmp_path):
    process = slurm("--config=tiny", "train.steps=1", variables={"SLURM_GPUS_ON_NODE": "4"})
    said = process.communicate(timeout=40)[1]
    assert process.returncode == 0, said
    assert "--gpus-per-node=4" in (tmp_path / "options").read_text().split()
    assert {line.strip() for line in (tmp_path / "words").read_text().splitlines()} == {
        "-m comi_jax.train --config=tiny train.steps=1"
    }
