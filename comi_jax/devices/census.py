"""The hosts, processes and devices of a run, and a check that no available device is left unused."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import jax

from comi_jax.devices import distributed, machine
from comi_jax.devices.cluster import number
from comi_jax.errors import ConfigError


@dataclass(frozen=True)
class Seen:
    """The devices of one process, and the accelerators of its host."""

    host: str
    devices: int  # local JAX devices of the default backend
    kind: str  # "cpu", "gpu" or "tpu"
    shown: int  # accelerators of the host that the run could use
    source: str  # where that number comes from
    nodes: int  # allocated by Slurm to the step, or to the job outside a step; 1 without Slurm


def take(environment: Mapping[str, str] = os.environ) -> list[Seen]:
    """One entry per process, ordered by process index. Every process must call this."""
    shown, source = machine.accelerators(environment)
    nodes = number(environment, "SLURM_STEP_NUM_NODES", number(environment, "SLURM_JOB_NUM_NODES", 1))
    host = environment.get("SLURMD_NODENAME") or socket.gethostname()
    own = Seen(host, jax.local_device_count(), jax.default_backend(), shown, source, nodes)
    everyone = distributed.peers()
    if everyone is None:
        return [own]
    everyone.say("seen", json.dumps(asdict(own)))
    distributed.meet("all have said what they see")
    return [Seen(**json.loads(said)) for _, said in sorted(everyone.said("seen").items())]


def sentence(seen: list[Seen]) -> str:
    """The census as one line of text."""
    kinds = {f"{one.devices} {one.kind} device{'s' * (one.devices != 1)}" for one in seen}
    hosts, each = len({one.host for one in seen}), ", ".join(sorted(kinds))
    return (
        f"{hosts} host{'s' * (hosts != 1)}, {len(seen)} process{'es' * (len(seen) != 1)}, {each} per process"
        f"{', not the same in all' * (len(kinds) != 1)}"
    )


def check(seen: list[Seen]) -> None:
    """Raises ConfigError if a host has accelerators that the run does not use, or if a Slurm node has no process."""
    hosts: dict[str, list[Seen]] = {}
    for one in seen:
        hosts.setdefault(one.host, []).append(one)
    for host, those in hosts.items():
        used = sum(one.devices for one in those if one.kind != "cpu")
        most = max(those, key=lambda one: one.shown)
        if used < most.shown:
            why = "" if used else "; JAX is on the CPU: is '.[cuda]' or '.[tpu]' installed here?"
            raise ConfigError(
                f"this run uses {used} of the {most.shown} accelerators of {host} ({most.source}){why}; fix this, or "
                "pass --allow-fewer-devices"
            )
    if len(hosts) < seen[0].nodes:
        raise ConfigError(
            f"Slurm allocated {seen[0].nodes} nodes, but this run has processes on only {len(hosts)}; start it with "
            "srun, as launch/slurm.sh does, or pass --allow-fewer-devices"
        )
