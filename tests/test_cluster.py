"""Who a process is, which GPUs it takes, and whether any device lies idle: what a machine and its variables say."""

import http.server
import subprocess
import sys
import threading

import pytest

from comi_jax import train
from comi_jax.devices import census, cluster, machine
from comi_jax.devices.census import Seen
from comi_jax.devices.cluster import Member
from comi_jax.errors import ConfigError

STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a[3-5,9],b1", "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_NODEID": "2", "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip
THREE = {"COMI_COORDINATOR": "host:1", "COMI_PROCESSES": "2", "COMI_PROCESS": "1"}


def test_one_process_needs_nothing():
    assert cluster.find({"PATH": "/bin", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    assert cluster.find(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) is None


def test_a_batch_script_is_no_step():
    """Slurm tells it how many tasks its job may start, and that it is the first."""
    assert cluster.find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None


def test_three_variables_say_who_a_process_is():
    assert cluster.find(THREE) == cluster.find(THREE | STEP) == Member("host:1", 2, 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"COMI_PROCESS": ""}, "COMI_COORDINATOR, COMI_PROCESSES is set; set .* together"),
        ({"COMI_PROCESS": "2"}, "COMI_PROCESS=2 is out of range: it must be below COMI_PROCESSES=2"),
        ({"COMI_PROCESSES": "two"}, "COMI_PROCESSES=two is not a whole number"),
        ({"COMI_COORDINATOR": "host"}, "COMI_COORDINATOR=host is not HOST:PORT"),
        ({"COMI_COORDINATOR": "host:99999"}, "is not HOST:PORT"),
    ],
)
def test_variables_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        cluster.find(THREE | changes)


def test_slurm_says_who_a_process_is():
    member = cluster.find(STEP)
    host, port = cluster.address(member.coordinator)
    assert (host, member.count, member.index, member.gpus) == ("a3", 4, 2, None) and 61440 <= port < 65536
    assert cluster.find(STEP | {"SLURM_STEP_ID": "1"}).coordinator != member.coordinator


@pytest.mark.parametrize(
    "nodes, first",
    [("n1", "n1"), ("n1,n2", "n1"), ("n[001-015],x", "n001"), ("n[1,7-9]", "n1"), ("r[2-3]n[4-5],s1", "r2n4")],
)
def test_the_first_node_of_a_list(nodes, first):
    assert cluster.first_host(nodes) == first


@pytest.mark.parametrize(
    "changes, visible, own",
    [
        ({}, 8, None),  # one task drives all
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 8, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_LOCALID": "1"}, 8, (4, 5, 6, 7)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_LOCALID": "3", "SLURM_GPUS_ON_NODE": "8"}, 8, (3,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_LOCALID": "3", "SLURM_GPUS_ON_NODE": "8"}, 1, None),  # bound
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": "8"}, 4, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_LOCALID": "1", "SLURM_GPUS_PER_TASK": "2"}, 2, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_LOCALID": "1", "JAX_LOCAL_DEVICE_IDS": "5"}, 8, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_LOCALID": "1"}, 0, None),
    ],
)
def test_a_process_takes_all_gpus_it_sees_or_its_share_of_them(changes, visible, own):
    assert cluster.own_gpus(STEP | changes, visible) == own


def test_gpus_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ConfigError, match="8 GPUs do not divide evenly among the 3 tasks"):
        cluster.own_gpus(STEP | {"SLURM_STEP_TASKS_PER_NODE": "3(x4)"}, 8)


VISIBLE = """
import jax, sys
from jax._src import xla_bridge
from comi_jax.devices import distributed
distributed.start()
print(jax.process_count(), xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""


@pytest.mark.parametrize("changes, visible", [({}, "all"), ({"SLURM_STEP_TASKS_PER_NODE": "2"}, "0,1")])
def test_jax_is_not_left_to_take_one_gpu_of_a_slurm_task(changes, visible, free_port):
    """What jax.distributed.initialize leaves in jax_cuda_visible_devices, as a process alone in a step of two nodes,
    and as one of two tasks of a node with four GPUs."""
    step = STEP | {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    step |= changes | {
        "JAX_COORDINATOR_PORT": str(free_port),
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "JAX_PLATFORMS": "cpu",
    }
    step |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "COMI_JOIN_TIMEOUT": "60"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen([sys.executable, "-c", VISIBLE], env=step | own, **pipes)
        for own in (
            {"SLURM_PROCID": "0", "SLURM_NODEID": "0"},
            {"SLURM_PROCID": "1", "SLURM_NODEID": "0" if changes else "1", "SLURM_LOCALID": "1" if changes else "0"},
        )
    ]
    (said, errors), _ = (process.communicate(timeout=100) for process in both)
    assert said.split() == ["2", visible], errors


# --- TPU --------------------------------------------------------------------------------------------------------------


def test_tpu_hosts_under_kubernetes():
    hosts = {"TPU_WORKER_HOSTNAMES": "t0.x,t1.x", "TPU_WORKER_ID": "1"}
    assert cluster.find(hosts) == Member("t0.x:8482", 2, 1)
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "m0:99"}
    assert cluster.find(hosts | slices) == Member("m0:8482", 6, 5)
    with pytest.raises(ConfigError, match="TPU_WORKER_ID \\(the index of this host\\) is not set"):
        cluster.find({"TPU_WORKER_HOSTNAMES": "t0.x,t1.x"})


@pytest.fixture
def metadata():
    """A TPU VM's metadata server, and what it says."""
    said = {
        "worker-network-endpoints": "u:1:10.0.0.4,u:2:10.0.0.5",
        "agent-worker-number": "1",
        "tpu-env": "TYPE: 'V5'\n",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            known = name in said and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(said.get(name, "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}", "COMI_DISTRIBUTED": "auto"}, said
        server.shutdown()


def test_a_tpu_pod_is_asked_for_its_hosts(metadata):
    environment, said = metadata
    assert cluster.find(environment) == Member("10.0.0.4:8482", 2, 1)
    said["worker-network-endpoints"] = "t0,t1,t2"
    said["tpu-env"] = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9'\n"
    assert cluster.find(environment) == Member("10.9.9.9:8482", 6, 4)
    said.pop("agent-worker-number")
    with pytest.raises(ConfigError, match="no Slurm variables are set and the TPU metadata server does not answer"):
        cluster.find(environment)


# --- devices that lie idle --------------------------------------------------------------------------------------------


@pytest.fixture
def eight(tmp_path):
    """A PATH on which nvidia-smi shows eight GPUs, the first of them cut in two."""
    program = tmp_path / "nvidia-smi"
    lines = ["GPU 0: NVIDIA H100 (UUID: GPU-0)", "  MIG 3g.40gb Device 0:", *(f"GPU {n}: NVIDIA" for n in range(1, 8))]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    "changes, count, source",
    [
        ({}, 8, "nvidia-smi -L"),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, 2, "CUDA_VISIBLE_DEVICES"),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, 4, "SLURM_GPUS_ON_NODE"),
        ({"JAX_PLATFORMS": "cpu", "SLURM_GPUS_ON_NODE": "4"}, 0, ""),
        ({"JAX_LOCAL_DEVICE_IDS": "1"}, 1, "JAX_LOCAL_DEVICE_IDS"),
    ],
)
def test_what_a_machine_shows(eight, changes, count, source):
    assert machine.accelerators(eight | changes) == (count, source)


def test_tpu_chips_that_a_machine_shows(monkeypatch):
    monkeypatch.setattr(machine.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, None))
    assert machine.accelerators({"PATH": ""}) == (4, "PCI bus")
    assert machine.accelerators({"PATH": "", "TPU_VISIBLE_CHIPS": "0,1"}) == (2, "TPU_VISIBLE_CHIPS")


def seen(host="n1", devices=8, kind="gpu", shown=8, nodes=1):
    return Seen(host, devices, kind, shown, "nvidia-smi -L", nodes)


def test_all_devices_of_all_hosts_in_use():
    census.check([seen(), seen("n2")])
    census.check([seen(devices=2)] * 4)
    census.check([seen(devices=1, kind="cpu", shown=0)])
    census.check([seen(nodes=2), seen("n2", nodes=2)])
    assert census.sentence([seen(), seen("n2")]) == "2 hosts, 2 processes, 8 gpu devices per process"
    assert census.sentence([seen(devices=1, kind="cpu")]) == "1 host, 1 process, 1 cpu device per process"
    assert "4 gpu devices, 8 gpu devices per process, not the same in all" in census.sentence([seen(), seen("n2", 4)])


@pytest.mark.parametrize(
    "all_seen, message",
    [
        (
            [seen(), seen("n2", devices=1)],
            "uses 1 of the 8 accelerators of n2 \\(nvidia-smi -L\\); fix this, or pass --allow",
        ),
        ([seen(devices=2)] * 3, "uses 6 of the 8 accelerators of n1 \\(nvidia-smi"),
        ([seen(devices=1, kind="cpu")], "uses 0 of the 8 accelerators of n1 .* JAX is on the CPU: is '.\\[cuda\\]' or"),
        ([seen(nodes=2)], "Slurm allocated 2 nodes, but this run has processes on only 1; start it with srun"),
    ],
)
def test_devices_that_lie_idle_are_refused(all_seen, message):
    with pytest.raises(ConfigError, match=message):
        census.check(all_seen)


def test_the_command_says_what_it_has_and_refuses_less_than_there_is(monkeypatch, capsys):
    monkeypatch.setattr(machine, "accelerators", lambda environment: (8, "nvidia-smi -L"))
    with pytest.raises(SystemExit, match="this run uses 0 of the 8 accelerators of .* \\(nvidia-smi -L\\); JAX is on"):
        train.main(["--config=qwen2"])
    assert "1 host, 1 process, 4 cpu devices per process" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="data.train is not set"):
        train.main(["--config=qwen2", "--allow-fewer-devices"])
