"""FLOP, memory traffic and communication of a compiled program, counted from its HLO text with loop trip counts.

    total = sum over instructions of cost(instruction) x trip counts of the enclosing loops

XLA's ``cost_analysis`` counts the body of a loop once and nothing inside a fused kernel. Here the trip count is read
from the loop's condition, and attention kernels (splash, cuDNN) are counted by their shapes. A loop with a
data-dependent end counts ``open_trips`` times if it is the outermost such loop (generation), else once (the search for
redundant tokens); ``open_loops`` is the number of such loops.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from comi_jax.devices.chips import Chip
from comi_jax.planning.hlo_text import Computation, Instruction, parse, trip_count

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# T x S x H matrix products per head in an attention kernel; the model's are 2 forward and 4 backward.
ATTENTION = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4, "fmhaSoftmaxBackward": 5, "fmhaSoftmax": 2,
}  # fmt: skip
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "copy-start", "copy-done", "async-start", "async-update", "async-done",
}  # fmt: skip


@dataclasses.dataclass
class Counts:
    """Counts per device of one execution of a program."""

    flops: float = 0.0  # of matrix products and attention kernels
    traffic: float = 0.0  # bytes read from and written to main memory
    sent: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes by kind of collective
    sent_outside: float = 0.0  # of these, inter-node bytes per device
    open_loops: int = 0  # loops with a data-dependent end
    kernels: set[str] = dataclasses.field(default_factory=set)  # names of the attention kernels


def count(text: str, devices_per_node: int | None = None, open_trips: int = 1) -> Counts:
    """The counts of the module ``text``; ``devices_per_node`` None: all devices are in one node."""
    computations, entry = parse(text)
    counts = Counts()
    for instruction, computation, times, fused in walk(computations, entry, counts, open_trips):
        counts.flops += times * _flops(instruction, computation)
        if (kernel := _kernel(instruction)) is not None:
            counts.kernels.add(kernel)
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            name, size, outside = _sent(kind, instruction, computation, fused, devices_per_node)
            counts.sent_outside += times * size * outside
            counts.sent[name] = counts.sent.get(name, 0.0) + times * size
        if not fused and instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
            counts.traffic += times * _traffic(instruction, computation, computations)
    return counts


def lower_bounds(counts: Counts, chip: Chip) -> dict[str, float]:
    """Seconds for FLOP, main memory and communication (within and between nodes), each at its peak."""
    return {
        "compute": counts.flops / chip.flops,
        "memory": counts.traffic / chip.bandwidth,
        "link": max(sum(counts.sent.values()) / chip.link, counts.sent_outside / (chip.network or chip.link)),
    }


def walk(
    computations: dict[str, Computation],
    entry: str,
    counts: Counts,
    open_trips: int = 1,
    times: float = 1.0,
    fused: bool = False,
) -> Iterator[tuple[Instruction, Computation, float, bool]]:
    """Every executed instruction, with its computation, its number of executions, and whether it is in a fusion."""
    for instruction in computations[entry].values():
        yield instruction, computations[entry], times, fused
        inner, repeat, inside, within = [], times, fused, open_trips
        if instruction.opcode == "while":
            trips = trip_count(instruction, computations)
            counts.open_loops += trips is None
            inner, repeat = instruction.called("body"), times * (open_trips if trips is None else trips)
            within = 1 if trips is None else open_trips
        elif instruction.opcode == "conditional":
            inner = instruction.called("branch_computations", "true_computation", "false_computation")
        elif instruction.opcode == "call":
            inner = instruction.called("to_apply", "calls")
        elif instruction.opcode == "fusion":
            inner, inside = instruction.called("calls"), True
        elif instruction.opcode == "async-start":
            inner = instruction.called("calls")
        elif instruction.opcode == "custom-call":
            inner, inside = instruction.called("called_computations"), True
        for name in inner:
            yield from walk(computations, name, counts, within, repeat, inside)


# --- operations -------------------------------------------------------------------------------------------------------


def _flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode == "dot":
        lhs = computation[instruction.operands[0]].shapes[0].dims
        return 2.0 * math.prod(instruction.shapes[0].dims) * _contracted(lhs, instruction.text)
    if instruction.opcode == "convolution":
        return _convolution(instruction, computation)
    if instruction.opcode == "custom-call" and "__cublas" in instruction.text:
        lhs = computation[instruction.operands[0]].shapes[0].dims
        return 2.0 * math.prod(instruction.shapes[0].dims) * _contracted(lhs, instruction.text)
    if (kernel := _kernel(instruction)) is not None:
        return ATTENTION[kernel] * _attention_product(instruction, computation)
    return 0.0


def _kernel(instruction: Instruction) -> str | None:
    """The attention kernel that an instruction calls, or None."""
    if instruction.opcode != "custom-call":
        return None
    named = f"{instruction.name} {instruction.text}"
    return next((part for part in ATTENTION if part in named), None)


def _contracted(lhs: tuple[int, ...], text: str) -> int:
    """The product of the contracted dimensions of a dot or a cuBLAS call."""
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', text)
    dims = re.findall(r"\d+", found[1]) if found else []
    return math.prod(lhs[int(d)] for d in dims)


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """FLOP of a convolution, as which a TPU runs matrix products, with batch dimensions as spatial ones. Products with
    padding are not counted."""
    lhs, rhs = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    left, right, out = instruction.found(r"dim_labels=(\w+)_(\w+)->(\w+)").groups()
    result = instruction.shapes[0].dims
    groups = int((re.search(r"batch_group_count=(\d+)", instruction.text) or [0, 1])[1])
    total = 2.0 * result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")] / groups
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in (letter for letter in left if letter.isdigit()):
        dimension = int(axis)

        def field(name, default, dimension=dimension):
            return fields[name].split("x")[dimension] if name in fields else default

        size, stride = int(field("size", "1")), int(field("stride", "1"))
        low = int(field("pad", "0_0").split("_")[0])
        spread, dilation = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
        reach = (lhs[left.index(axis)] - 1) * spread + 1
        at = np.arange(result[out.index(axis)])[:, None] * stride + np.arange(size)[None, :] * dilation - low
        total *= int(((at >= 0) & (at < reach) & (at % spread == 0)).sum())
    return total


def _attention_product(instruction: Instruction, computation: Computation) -> float:
    """T S H for each query head: half of 2 T S H, as all attention here is causal. Queries are the first 16-bit
    operand, keys the second."""
    arrays = [shape for name in instruction.operands for shape in computation[name].shapes]
    floats = [shape.dims for shape in arrays if shape.dtype in ("bf16", "f16") and len(shape.dims) >= 3]
    queries, keys = floats[:2]
    if "fmha" in instruction.text:  # rows, tokens, heads, width
        return float(math.prod(queries) * keys[1])
    return float(math.prod(queries) * keys[-2])


# --- bytes ------------------------------------------------------------------------------------------------------------


def _sent(
    kind: str, instruction: Instruction, computation: Computation, fused: bool, per_node: int | None
) -> tuple[str, float, float]:
    """The kind of a collective, the bytes that a device sends in the best ring, and the fraction of these that counts
    as inter-node traffic per device: a ring leaves each node once, and the devices of a node share its NICs."""
    devices = group(instruction.text)
    size = len(devices)
    given = float(sum(computation[name].bytes for name in instruction.operands if name in computation))
    nodes = 1 if per_node is None else len(set(devices // per_node))
    outside = nodes / size if nodes > 1 else 0.0
    ring = (size - 1) / max(size, 1)
    if kind == "all-reduce" and fused and any(i.root and i.opcode == "dynamic-slice" for i in computation.values()):
        return "reduce-scatter", given * ring, outside  # on TPU: an all-reduce fused with taking one's own slice
    if kind == "all-gather":
        return kind, given * (size - 1), outside
    if kind == "collective-permute":
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", _pairs(instruction.text))]
        crossing = [per_node is not None and a // per_node != b // per_node for a, b in pairs]
        return kind, given, float(any(crossing))
    return kind, given * ring * (2 if kind == "all-reduce" else 1), outside


def _pairs(text: str) -> str:
    """The {source,target} pairs of a collective-permute."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    return found[1] if found else ""


def group(text: str) -> np.ndarray:
    """The devices of a collective's first replica group; one device if the text names no groups."""
    if "replica_groups=" not in text:
        return np.zeros(1, int)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array([int(n) for n in found[1].split(",")])
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[\d+,(\d+)\]<={iota}", text):
        return _iota(*found.groups()[1:]).reshape(-1, int(found[1]))[0]
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? \{{([^}}]*)\}}", text):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        total = math.prod(axes.values())
        devices = _iota(found[2] or str(total), found[3]).reshape(tuple(axes.values()))
        for dimension, (name, size) in enumerate(axes.items()):  # an axis that is not used contributes its index 0
            used = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", found[4])
            before, taken = (int(used[1] or 1), int(used[2] or size)) if used else (1, 1)
            devices = np.moveaxis(devices, dimension, 0)
            devices = np.moveaxis(devices.reshape(before, taken, -1, *devices.shape[1:])[0, :, 0], 0, dimension)
        return devices.reshape(-1)
    raise ValueError(f"cannot read the groups of a collective: {text[text.index('replica_groups=') :][:200]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """The flat device order of XLA's iota notation: an iota of shape ``dims``, transposed by ``order``."""
    sizes = [int(n) for n in dims.split(",")]
    counted = np.arange(math.prod(sizes)).reshape(sizes)
    return (counted.transpose([int(n) for n in order.split(",")]) if order else counted).reshape(-1)


def _traffic(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that an instruction reads and writes in main memory. An operand that is only sliced, or updated in a slice,
    counts by the slice."""
    inside = computations[instruction.called("calls")[0]] if instruction.opcode == "fusion" else None
    if instruction.opcode == "dynamic-slice" or instruction.opcode == "gather":
        return 2.0 * _main(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * _main(computation[instruction.operands[1]])
    parameters = {} if inside is None else {int(i.value): i for i in inside.values() if i.opcode == "parameter"}
    total = 0.0
    for number, name in enumerate(instruction.operands):
        whole = _main(computation[name]) if name in computation else 0
        users = [] if inside is None else [i for i in inside.values() if parameters[number].name in i.operands]
        if users and all(i.opcode in ("dynamic-slice", "gather") for i in users):
            whole = min(whole, sum(i.bytes for i in users))
        elif users and all(
            i.opcode == "dynamic-update-slice" and i.operands[0] == parameters[number].name for i in users
        ):
            whole = 0
        total += whole
    written = _main(instruction)
    inner = {} if inside is None else inside
    for update in (i for i in inner.values() if i.opcode == "dynamic-update-slice"):
        if update.shapes[0].dims in [shape.dims for shape in instruction.shapes]:
            written -= update.bytes - inner[update.operands[1]].bytes
    return total + max(written, 0)


def _main(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if shape.main)
