"""The limits that compiled kernels are held against: what leaves them bound by memory, and goals for instructions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# The main loops that a kernel has; the small kernels, whose work is per token, have none that is counted.
SWEEPS = {
    "fused_policy_loss": ("gradient", "statistics"),
    "token_statistics": ("statistics",),
    "combine_statistics": (),  # reads the row's edge and other programs' sums
    "token_gradient": ("gradient",),
    "scale_gradient": ("gradient",),
    "response_statistics": (),
    "computed_rows": (),
    "logprob_policy_loss": (),
}
ACCESS_BYTES = 16
# Special-function operations per element, all sweeps together, without softcap (whose tanh takes two more a sweep):
# one exp2 per sweep, and the rescaling of a thread's sums once per step.
MUFU_LIMIT = {
    "fused_policy_loss": 2.3, "token_statistics": 1.15, "combine_statistics": 0.0, "token_gradient": 1.15,
    "scale_gradient": 0.0,
}  # fmt: skip
# Instructions per element over both sweeps of the fused kernel, without softcap: in bfloat16 an H200 has issue slots
# for about 30 at full bandwidth.
INSTRUCTION_LIMIT, INSTRUCTION_LIMIT_ENTROPY = 18.0, 22.0
# What one line says that all of them held.
KEPT = "no spills, 16-byte accesses, MUFU and instructions within limits"


def record_name(record: dict[str, Any]) -> str:
    """A record in a few words; without its target it is what --only selects by."""
    return f"{record['target']} {record['kernel']}/{record['variant']}"


def instruction_limit(record: dict[str, Any]) -> float | None:
    """Of both sweeps together; None where there is none."""
    fused = record["kernel"] == "fused_policy_loss" and "loss_only" not in record["variant"]
    # AMD moves narrow stores' elements between lanes one by one, and its count includes the scalar unit's instructions,
    # which cost no vector slots.
    scattered = not record["aligned_out"] and record["target"].startswith("gfx")
    if not fused or record["softcap"] or scattered:
        return None
    return INSTRUCTION_LIMIT_ENTROPY if record["entropy"] else INSTRUCTION_LIMIT


def _broken(record: dict[str, Any]) -> Iterable[str]:
    loops = record["loops"]
    expected = ["statistics"] if "loss_only" in record["variant"] else list(SWEEPS[record["kernel"]])
    if (found := sorted(loop["role"] for loop in loops)) != expected:
        yield f"main loops {found}, expected {expected}"
    if record["spills"]:
        yield f"spills {record['spills']} {'registers' if record['target'].startswith('gfx') else 'bytes'}"
    for loop in loops:
        accesses = {"loads": loop["load_bytes"]}
        if loop["role"] == "gradient" and record["aligned_out"]:
            accesses["stores"] = loop["store_bytes"]
        for kind, size in accesses.items():
            if size < ACCESS_BYTES:
                yield f"{loop['role']} {kind} {size} bytes at a time, not {ACCESS_BYTES}"
    mufu = sum(loop["counts"]["mufu"] for loop in loops)
    if not record["softcap"] and loops and mufu > MUFU_LIMIT[record["kernel"]]:
        yield f"{mufu:.3g} MUFU per element, limit {MUFU_LIMIT[record['kernel']]}"
    instructions = sum(loop["instructions"] for loop in loops)
    if (limit := instruction_limit(record)) is not None and instructions > limit:
        yield f"{instructions:.3g} instructions per element, limit {limit:g}"
    resident, launched = record["occupancy"]["programs"], record["programs_per_processor"]
    if resident < launched:
        yield f"{resident} programs fit a processor ({record['occupancy']['limited_by']}), the launch wants {launched}"


def broken_limits(records: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each limit that a record (a ``CompiledKernel`` as a dict) breaks.

    Nothing spills; main loops access memory 16 bytes at a time, stores too where the output is aligned as the input
    is; no more special-function operations than the formulas need and no more instructions than the goal; the
    programs that a launch starts are all resident. A main loop that was not found breaks them.
    """
    return [f"{record_name(record)}: {line}" for record in records for line in _broken(record)]
