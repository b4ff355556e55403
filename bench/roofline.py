"""What a GPU's limits and the counted instructions say a call should take: a model's prediction, not a measurement.

Per sweep and element, each resource takes its own time:

* bandwidth: the bytes of ``traffic.py`` over the memory's rate;
* issue: instructions over the schedulers' rate (AMD: vector instructions, a transcendental one counting as the four
  slots that it keeps the vector unit busy for);
* special: special functions over their units' rate;
* fp32: floating-point instructions over the lanes that run them (NVIDIA).

A sweep takes as long as its slowest resource, a row the sum of its two sweeps: programs in step, no overlap between
one row's gradient and the next one's statistics. Within a sweep everything overlaps, which is what the model is
optimistic about; the reduction between the sweeps, launch, L2 bandwidth and the masked step's comparisons are left out.

* latency (first sweep, whose loads come from memory): the bytes that all programs' loads have in flight arrive once in
  the memory's latency (Little's law).

Two losses are counted. A row is walked in whole tiles of LANES 16-byte groups, so that its last tile computes on lanes
without elements (``padding``); processors are idle in the last round of rows, and where there are fewer rows in flight
than processors (``idle``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .gpus import Gpu
from .machine_code import VECTOR
from .traffic import row_traffic

RESOURCES = ("bandwidth", "latency", "issue", "special", "fp32")


class Launch(Protocol):
    """What the model needs of a ``LaunchConfiguration``."""

    @property
    def lanes(self) -> int: ...
    @property
    def vec(self) -> int: ...
    @property
    def unroll(self) -> int: ...
    @property
    def rows_in_flight(self) -> int: ...


@dataclass(frozen=True)
class Prediction:
    """What the model says of one GPU, vocabulary and variant.

    Attributes:
        gpu, target, variant: what was predicted, from which counts.
        shape, vocabulary, itemsize, tokens: of the logits.
        rows_in_flight, hit: rows worked on at a time; share of the second sweep's read that the cache serves.
        padding, idle: factors on arithmetic, at least 1 (see above).
        ns_per_element: both sweeps; seconds: of all tokens.
        copy_seconds: of one read and one write of the logits at the same bandwidth.
        time_over_copy: the prediction over that; time_over_copy_no_reuse: if the second read never hit the cache.
        binding: of each sweep, the resource that takes longest.
        shares: of each resource, its time over both sweeps as a share of the copy's time.
    """

    gpu: str
    target: str
    variant: str
    shape: str
    vocabulary: int
    itemsize: int
    tokens: int
    rows_in_flight: int
    hit: float
    padding: float
    idle: float
    ns_per_element: float
    seconds: float
    copy_seconds: float
    time_over_copy: float
    time_over_copy_no_reuse: float
    binding: dict[str, str]
    shares: dict[str, float]


def padding(V: int, launch: Launch) -> float:
    """Elements' worth of arithmetic that a row takes, over its elements."""
    tile = launch.lanes * launch.vec
    # An edge beside the whole groups takes each lane the time of one element.
    edge = launch.lanes if V % launch.vec else 0
    return (math.ceil((V // launch.vec) * launch.vec / tile) * tile + edge) / V


def arithmetic_seconds(gpu: Gpu, loop: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per element that each unit needs for a main loop's instructions, all processors at work."""
    counts = loop["counts"]
    rate = gpu.processors * gpu.clock_hz
    slots = loop["instructions"]
    if gpu.special_takes_issue:
        slots = counts["vector"] + counts["mufu"] * gpu.issue / gpu.special
    seconds = {"issue": slots / (rate * gpu.issue), "special": counts["mufu"] / (rate * gpu.special)}
    if "fp" in counts:
        seconds["fp32"] = counts["fp"] / (rate * gpu.fp32)
    return seconds


def predict(
    gpu: Gpu, record: Mapping[str, Any], launch: Launch, *, shape: str, vocabulary: int, itemsize: int, tokens: int
) -> Prediction:
    """From the counts of ``record`` (a ``CompiledKernel`` as a dict, of both sweeps) for ``gpu.target``."""
    loops = {loop["role"]: loop for loop in record["loops"]}
    if set(loops) != {"statistics", "gradient"}:
        raise ValueError(f"record: expected both sweeps of a fused kernel, got {sorted(loops)}")
    fill = padding(vocabulary, launch)
    rounds = tokens / launch.rows_in_flight
    idle = math.ceil(rounds) / rounds * max(1.0, gpu.processors / launch.rows_in_flight)
    in_flight = launch.rows_in_flight * launch.lanes * launch.unroll * VECTOR
    latency = {"statistics": gpu.latency * itemsize / in_flight, "gradient": 0.0}

    def of_sweeps(no_reuse: bool) -> dict[str, dict[str, float]]:
        traffic = row_traffic(vocabulary, itemsize, launch.rows_in_flight, gpu.cache_bytes, no_reuse=no_reuse)
        moved = {"statistics": traffic.first_read, "gradient": traffic.second_read + traffic.written}
        return {
            role: {
                "bandwidth": moved[role] / (vocabulary * gpu.bandwidth),
                "latency": latency[role],
                **{name: fill * idle * s for name, s in arithmetic_seconds(gpu, loops[role]).items()},
            }
            for role in ("statistics", "gradient")
        }

    sweeps = of_sweeps(no_reuse=False)
    per_element = sum(max(sweep.values()) for sweep in sweeps.values())
    without_reuse = sum(max(sweep.values()) for sweep in of_sweeps(no_reuse=True).values())
    copy = 2 * itemsize / gpu.bandwidth
    elements = tokens * vocabulary
    return Prediction(
        gpu=gpu.name, target=gpu.target, variant=record["variant"], shape=shape, vocabulary=vocabulary,
        itemsize=itemsize, tokens=tokens, rows_in_flight=launch.rows_in_flight,
        hit=row_traffic(vocabulary, itemsize, launch.rows_in_flight, gpu.cache_bytes).hit, padding=fill, idle=idle,
        ns_per_element=per_element * 1e9, seconds=per_element * elements, copy_seconds=copy * elements,
        time_over_copy=per_element / copy, time_over_copy_no_reuse=without_reuse / copy,
        binding={role: max(sweep, key=lambda name: sweep[name]) for role, sweep in sweeps.items()},
        shares={name: sum(sweep.get(name, 0.0) for sweep in sweeps.values()) / copy for name in RESOURCES},
    )  # fmt: skip
