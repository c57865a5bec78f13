"""The devices of this machine as its own tools show them: none of them may lie idle without a word."""

import os
import shutil
import subprocess
from collections.abc import Mapping

from jax._src import hardware_utils  # which TPUs are on the PCI bus has no public name


def accelerators(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """How many accelerators this run could use on this machine, and what says so; (0, "") for none.

    What the user named counts: a platform "cpu", CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS, JAX_LOCAL_DEVICE_IDS. Of a
    node that is not the job's alone, what Slurm gave to it.
    """
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return 0, ""
    if named := environment.get("JAX_LOCAL_DEVICE_IDS"):
        return len(named.split(",")), "JAX_LOCAL_DEVICE_IDS names"
    if (given := environment.get("SLURM_GPUS_ON_NODE", "")).isdecimal():
        return int(given), "SLURM_GPUS_ON_NODE says"
    if gpus := visible_gpus(environment):
        says = "CUDA_VISIBLE_DEVICES names" if "CUDA_VISIBLE_DEVICES" in environment else "nvidia-smi -L shows"
        return gpus, says
    for name in ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"):
        if named := environment.get(name):
            return len(named.split(",")), f"{name} names"
    chips = hardware_utils.num_available_tpu_chips_and_device_id()[0]
    return (chips, "the PCI bus shows") if chips else (0, "")


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """How many of this machine's NVIDIA GPUs a program may see."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if not program:
        return 0
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # a driver that does not answer gives JAX no GPU either
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
