"""Two hosts on this machine, in namespaces (two_hosts.sh), and a Slurm cluster of them (slurm_cluster.sh)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_fixtures
from xla_flags import FLAGS

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
UNSHARE = ["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--kill-child", "--mount-proc"]
HOSTS = ("unshare", "nsenter", "ip")
SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")


def skip_without(*programs):
    """Skip a test where ``programs``, or the right to make namespaces, are missing."""
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (apt-get install iproute2 slurm-wlm munge)")
    rights = subprocess.run([*UNSHARE, "sh", "-c", "ip link set lo up"], capture_output=True, text=True)
    if rights.returncode:
        pytest.skip(f"may not make namespaces: {rights.stderr.strip()}")


def until(condition, seconds, told=lambda: ""):
    """Wait for ``condition``, and give what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, told()
        time.sleep(0.1)
    return found


class Hosts:
    """n1 and n2."""

    def __init__(self, folder, *command, **variables):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environment |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
        self.environment |= {"COMI_HEARTBEAT": "8", "JAX_COMPILATION_CACHE_DIR": str(folder / "compilations")}
        self.environment |= {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
        self.environment |= {"XLA_FLAGS": FLAGS} | variables
        self.log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            [*UNSHARE, str(TESTS / "two_hosts.sh"), str(folder), *command],
            env=self.environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        until((folder / "hosts").exists, 30, self.told)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.first = children.read_text().split()[0]

    def told(self):
        return (self.folder / "log.txt").read_text()

    def command(self, *words, host=None):
        """The command line that runs ``words`` among the hosts, or on one of them."""
        inside = ["nsenter", f"--net=/run/netns/{host}", "unshare", "--uts", "sh", "-c"] if host else []
        inside += [f'hostname {host}; exec "$@"', "sh"] if host else []
        return ["nsenter", "--all", "--target", self.first, *inside, *map(str, words)]

    def run(self, *words, **variables):
        environment = self.environment | variables
        done = subprocess.run(self.command(*words), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def cable(self, host, state):
        """Plug the network of ``host`` in ("up") or out ("down")."""
        self.run("ip", "link", "set", f"port{host[1:]}", state)

    def close(self):
        """End all that is in the namespaces, which are gone with it."""
        self.process.stdin.close()
        self.process.wait(30)
        self.log.close()


def settings(folder, *more):
    """The command line of a tiny run with data in ``folder``, but for where it goes."""
    if not (folder / "lm").exists():
        train_fixtures.language_model(folder / "lm")
        train_fixtures.write(folder / "train.jsonl", train_fixtures.records(24))
        train_fixtures.write(folder / "dev.jsonl", train_fixtures.records(5, seed=1))
    words = train_fixtures.command(folder / "lm", folder / "train.jsonl", "", f"data.eval={folder / 'dev.jsonl'}")
    words = [word for word in words if not word.startswith("train.output=")]
    return [
        *words, "train.log_every=1", "train.checkpoint_every=2", "train.compare_mean_pooling=false",
        "optimizer.accumulate=2", *more,
    ]  # fmt: skip
