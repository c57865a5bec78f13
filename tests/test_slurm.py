"""launch/slurm.sh under a real Slurm, of two nodes that are hosts of their own (hosts_fixtures.py)."""

import os
import re
import signal
from pathlib import Path

import hosts_fixtures
import pytest
from hosts_fixtures import until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.fault]
FOR_EVER = "train.steps=100000"


class Cluster(hosts_fixtures.Hosts):
    """n1 and n2 as nodes of a Slurm cluster."""

    def __init__(self, folder, **variables):
        hosts_fixtures.skip_without(*hosts_fixtures.HOSTS, *hosts_fixtures.SLURM)
        variables |= {"SLURM_CONF": str(folder / "slurm.conf")}
        super().__init__(folder, str(hosts_fixtures.TESTS / "slurm_cluster.sh"), str(folder), **variables)
        until((folder / "up").exists, 60, self.told)

    def submit(self, output, *more, options=(), **variables):
        """A job of slurm.sh that trains into ``output``."""
        words = hosts_fixtures.settings(self.folder, f"train.output={output}", *more)
        script = hosts_fixtures.ROOT / "launch" / "slurm.sh"
        return Job(self, self.batch("--nodes=2", *options, script, *words, **variables))

    def batch(self, *words, **variables):
        return self.run("sbatch", "--parsable", f"--chdir={self.folder}", *words, **variables).strip()


class Job:
    """A job and what it says."""

    def __init__(self, cluster, number):
        self.cluster, self.number = cluster, number
        self.path = cluster.folder / f"slurm-{number}.out"

    def said(self):
        return self.path.read_text() if self.path.exists() else ""

    def about(self, name):
        return re.search(rf"\b{name}=(\S+)", self.cluster.run("scontrol", "--oneliner", "show", "job", self.number))[1]

    def until(self, words, count=1, seconds=400):
        until(lambda: self.said().count(words) >= count, seconds, self.said)

    def ends(self, seconds=400):
        """Its state and its status."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.about("JobState") in over, seconds, self.said)
        return self.about("JobState"), self.about("ExitCode").split(":")[0]

    def finish(self):
        """End it as the header of slurm.sh says."""
        self.cluster.run("scancel", "--signal=TERM", self.number)
        return self.ends()

    def processes(self, word="comi_jax.train"):
        """The process ids of its tasks, by their numbers."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                    variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                known = dict(line.split("=", 1) for line in variables if "=" in line)
                if word in words and known.get("SLURM_JOB_ID") == self.number and words[0].endswith("python"):
                    found[int(known["SLURM_PROCID"])] = int(entry.name)
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(made):
    """Behind a test that failed, its jobs are ended."""
    yield made
    made.run("scancel", "--signal=KILL", "--full", "--user=root", "--state=RUNNING")
    made.run("scancel", "--user=root")


def test_it_trains_to_the_closing_table_over_two_nodes(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", "train.steps=4")
    assert job.ends() == ("COMPLETED", "0"), job.said()
    said = job.said()
    assert "2 hosts, 2 processes, 1 cpu device per process" in said
    assert said.count("compression ratio") == 1 and said.count("step 4/4") == 1
    assert (tmp_path / "run" / "results.json").exists()


def test_scancel_with_a_signal_saves_and_what_waits_for_its_end_does_not_begin(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", FOR_EVER)
    next_one = Job(cluster, cluster.batch(f"--dependency=afterok:{job.number}", f"--wrap=touch {tmp_path / 'begun'}"))
    job.until("step 3/")
    assert job.finish() == ("FAILED", "85"), job.said()
    assert "stopped by SIGTERM after step" in job.said() and "requeued" not in job.said()
    until(lambda: next_one.about("Reason") == "DependencyNeverSatisfied", 60)
    assert not (tmp_path / "begun").exists()
    cluster.run("scancel", next_one.number)


def test_plain_scancel_saves_too(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", FOR_EVER)
    job.until("step 3/")
    cluster.run("scancel", job.number)
    assert job.ends()[0] == "CANCELLED"
    job.until("stopped by SIGTERM after step", seconds=30)
    assert "requeued" not in job.said()


def wrapper(folder, text):
    """A program in the place of Python."""
    path = folder / "python"
    path.write_text(f'#!/usr/bin/env bash\n{text}\nexec "$REAL" "$@" $(cat "{folder}/words" 2>/dev/null)\n')
    path.chmod(0o755)
    return {"PYTHON": str(path), "REAL": hosts_fixtures.sys.executable}


def test_before_the_time_is_up_it_queues_itself_again_and_goes_on_to_the_end(cluster, tmp_path):
    job = cluster.submit(
        tmp_path / "run", FOR_EVER, options=("--time=1", "--signal=B:USR1@20"), **wrapper(tmp_path, "")
    )
    job.until("job requeued")
    reached = re.findall(r"stopped by SIGTERM after step ([0-9]+)", job.said())
    (tmp_path / "words").write_text(f"train.steps={int((reached or [0])[-1]) + 4} --allow-config-change")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")
    assert job.ends() == ("COMPLETED", "0"), job.said()
    assert "the time limit is near" in job.said() and job.said().count("compression ratio") == 1
    assert not reached or f"resuming from step {reached[-1]} of" in job.said()


def test_a_job_of_higher_priority_takes_its_nodes_and_it_goes_on_afterwards(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", FOR_EVER)
    job.until("step 3/")
    urgent = Job(cluster, cluster.batch("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2"))
    job.until("job requeued", seconds=60)
    assert urgent.ends()[0] == "COMPLETED"
    job.until("resuming from step")
    assert job.about("Restarts") == "1" and job.finish() == ("FAILED", "85"), job.said()


@pytest.mark.parametrize("task, named", [(0, "n1: task 0: Killed"), (1, "process 1 of 2 (n2, pid ")])
def test_a_task_that_is_killed(cluster, tmp_path, task, named):
    """The other names it, srun the first one, whose end JAX notices sooner; and slurm.sh starts both again."""
    job = cluster.submit(tmp_path / "run", FOR_EVER)
    job.until("step 4/")
    os.kill(job.processes()[task], signal.SIGKILL)
    job.until("restarting (1 of 10)", seconds=120)
    assert named in job.said(), job.said()
    job.until("resuming from step")
    assert job.finish() == ("FAILED", "85"), job.said()


def test_a_coordinator_that_cannot_be_reached_is_said_at_once_and_not_tried_again(cluster, tmp_path):
    program = wrapper(tmp_path, "export COMI_PROCESS=$SLURM_PROCID")
    where = {"COMI_COORDINATOR": "nowhere.invalid:1234", "COMI_PROCESSES": "2", "COMI_JOIN_TIMEOUT": "5"}
    job = cluster.submit(tmp_path / "run", FOR_EVER, **program, **where)
    assert job.ends() == ("FAILED", "1"), job.said()
    assert job.said().count("could not reach process 0 at nowhere.invalid:1234 within 5 s: ") == 2
    assert "restarting" not in job.said() and "Check failure" not in job.said()


def test_a_wrong_setting_is_not_tried_again(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", "train.batch_size=7")
    assert job.ends() == ("FAILED", "1"), job.said()
    assert "train.batch_size" in job.said() and "restarting" not in job.said()


@pytest.mark.hosts
def test_a_cable_that_is_cut_and_heals(cluster, tmp_path):
    """The launcher goes on by itself."""
    job = cluster.submit(tmp_path / "run", FOR_EVER)
    job.until("step 4/")
    cluster.cable("n2", "down")
    try:
        job.until("process 1 of 2 (n2, pid ", seconds=60)
    finally:
        cluster.cable("n2", "up")
    job.until("restarting (1 of 10)", seconds=120)
    job.until("resuming from step")
    assert job.finish() == ("FAILED", "85"), job.said()


@pytest.mark.hosts
def test_a_node_that_is_lost(cluster, tmp_path):
    """Slurm itself queues the job again, and it goes on once there are two nodes."""
    job = cluster.submit(tmp_path / "run", FOR_EVER)
    job.until("step 4/")
    cluster.cable("n2", "down")
    try:
        until(lambda: job.about("JobState") == "PENDING", 200, job.said)
    finally:
        cluster.cable("n2", "up")
    job.until("resuming from step", seconds=300)
    assert job.finish() == ("FAILED", "85"), job.said()


# --- GPUs that are none -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("gpus"), GPUS="1")
    yield made
    made.close()


def test_a_task_is_given_all_gpus_of_its_node_and_says_if_it_cannot_use_them(gpus, tmp_path):
    """The script as shipped asks for whole nodes. JAX, without a driver, is on the CPU."""
    script = 'echo "$SLURM_PROCID has $SLURM_GPUS_ON_NODE: $CUDA_VISIBLE_DEVICES"; unset JAX_PLATFORMS'
    job = gpus.submit(tmp_path / "run", FOR_EVER, **wrapper(tmp_path, script), TPU_SKIP_MDS_QUERY="1")
    assert job.ends() == ("FAILED", "1"), job.said()
    for task in (0, 1):
        assert f"{task} has 2: 0,1" in job.said()
    assert "this run uses 0 of the 2 accelerators of n1 (SLURM_GPUS_ON_NODE); JAX is on the CPU" in job.said()
