"""Peak performance of each chip, from the vendors' data sheets; the base of every prediction and utilisation figure.

FLOP/s are for dense bfloat16 matrix products. ``link`` is a chip's total one-way bandwidth to the other chips of its
slice or node, ``network`` its one-way bandwidth to other nodes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """The peaks of one JAX device."""

    name: str
    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s of main memory
    link: float  # bytes/s to the other chips of its node or slice, one way
    network: float  # bytes/s to other nodes; for TPUs the same as ``link``, which connects the whole slice


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2.0**30, 1.23e12, 150e9, 150e9),
        Chip("v5e", 197e12, 16 * 2.0**30, 0.82e12, 100e9, 100e9),
        Chip("v5p", 459e12, 95 * 2.0**30, 2.77e12, 300e9, 300e9),
        Chip("v6e", 918e12, 32 * 2.0**30, 1.64e12, 224e9, 224e9),
        Chip("a100", 312e12, 80 * 2.0**30, 2.04e12, 300e9, 25e9),
        Chip("h100", 989e12, 80 * 2.0**30, 3.35e12, 450e9, 50e9),
        Chip("h200", 989e12, 141 * 2.0**30, 4.8e12, 450e9, 50e9),
        Chip("h20", 148e12, 96 * 2.0**30, 4.0e12, 450e9, 50e9),
    )
}

# Substrings of JAX's ``device_kind``, lower-cased; the first match wins.
KINDS = (
    ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5p", "v5p"), ("v5", "v5p"), ("v6 lite", "v6e"), ("v6e", "v6e"), ("v4", "v4"),
    ("h100", "h100"), ("h200", "h200"), ("h20", "h20"), ("a100", "a100"),
)  # fmt: skip


def find(device_kind: str) -> Chip | None:
    """The chip for JAX's ``device_kind`` ("TPU v5 lite", "NVIDIA H100 80GB HBM3"); None if it is not listed."""
    kind = device_kind.lower()
    return next((CHIPS[name] for part, name in KINDS if part in kind), None)
