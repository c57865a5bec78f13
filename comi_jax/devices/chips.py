"""What the chips of today can do, from their makers' data sheets; every prediction and utilisation is held against it.

Peaks are of dense bfloat16 products and of main memory; ``link`` is what one chip can send to the others of its slice
or node, all its links together, one way; ``network`` what it can send to other nodes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    name: str
    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s of main memory
    link: float  # bytes/s to the other chips of its node or slice, one way
    network: float  # bytes/s to other nodes; of a TPU slice, whose chips are all linked, the same as ``link``


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

# What JAX calls them (``device_kind``); the first that is part of the lower-cased name counts.
KINDS = (
    ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5p", "v5p"), ("v5", "v5p"), ("v6 lite", "v6e"), ("v6e", "v6e"), ("v4", "v4"),
    ("h100", "h100"), ("h200", "h200"), ("h20", "h20"), ("a100", "a100"),
)  # fmt: skip


def find(device_kind: str) -> Chip | None:
    """The chip that JAX calls ``device_kind`` ("TPU v5 lite", "NVIDIA H100 80GB HBM3"); None for one not listed."""
    kind = device_kind.lower()
    return next((CHIPS[name] for part, name in KINDS if part in kind), None)
