"""The accelerators of this machine, counted without JAX, so that unused ones are reported."""

import os
import shutil
import subprocess
from collections.abc import Mapping

from jax._src import hardware_utils  # there is no public API that counts the TPUs on the PCI bus


def accelerators(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """The number of accelerators of this machine that the run could use, and the source of that number; (0, "") for
    none.

    The first that applies decides: JAX_PLATFORMS=cpu (none), JAX_LOCAL_DEVICE_IDS, SLURM_GPUS_ON_NODE (the allocation
    on a shared node), CUDA_VISIBLE_DEVICES, nvidia-smi, TPU_VISIBLE_CHIPS, TPU_VISIBLE_DEVICES, the PCI bus.
    """
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return 0, ""
    if named := environment.get("JAX_LOCAL_DEVICE_IDS"):
        return len(named.split(",")), "JAX_LOCAL_DEVICE_IDS"
    if (given := environment.get("SLURM_GPUS_ON_NODE", "")).isdecimal():
        return int(given), "SLURM_GPUS_ON_NODE"
    if gpus := visible_gpus(environment):
        return gpus, "CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in environment else "nvidia-smi -L"
    for name in ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"):
        if named := environment.get(name):
            return len(named.split(",")), name
    chips = hardware_utils.num_available_tpu_chips_and_device_id()[0]
    return (chips, "PCI bus") if chips else (0, "")


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The number of NVIDIA GPUs that are visible to a program on this machine."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if not program:
        return 0
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # without a working driver JAX finds no GPU either
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
