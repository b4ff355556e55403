"""``hpo-fused-bench compile``: what it counts, holds against limits, predicts and shows; no kernel is compiled here
but one in the last tests (``test_compile.py`` compiles them all)."""

from __future__ import annotations

import dataclasses
import doctest
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rich", reason="needs the bench extra")
pytest.importorskip("typer", reason="needs the bench extra")

from hpo_fused.bench import compile_report, compile_table, gpus, occupancy, roofline, traffic
from hpo_fused.bench.compile_document import SCHEMA_VERSION, document
from hpo_fused.bench.compile_limits import SWEEPS, broken_limits, instruction_limit
from hpo_fused.bench.compile_plan import (
    CAPPED,
    CORE,
    DEFAULT,
    FULL_TARGETS,
    TARGETS,
    Job,
    coverage,
    covering_variants,
    plan,
)
from hpo_fused.bench.compile_report import Report
from hpo_fused.bench.gpus import GPUS, REFERENCE
from hpo_fused.bench.instruction_classes import AMD_CLASSES, NVIDIA_CLASSES, instruction_class
from hpo_fused.bench.machine_code import Instruction, main_loops, read_amdgcn
from hpo_fused.bench.occupancy import LIMITS, Occupancy
from hpo_fused.bench.roofline import padding, predict
from hpo_fused.bench.traffic import USABLE, row_traffic

Invoke = Callable[..., Any]
LAUNCH = SimpleNamespace(lanes=1024, vec=8, unroll=4, rows_in_flight=132)


def record(**changes: Any) -> dict[str, Any]:
    """A kernel of both sweeps within every limit; for AMD with AMD's classes."""
    amd = changes.get("target", "").startswith("gfx")
    rest = {"vector": 5.2, "scalar": 1.5} if amd else {"fp": 5.2, "integer": 1.5}
    statistics = {
        "role": "statistics", "elements": 32, "instructions": 8.0, "load_bytes": 16, "store_bytes": 0,
        "counts": {"mufu": 1.03, **rest, "memory": 0.12, "control": 0.15},
    }  # fmt: skip
    gradient = {
        "role": "gradient", "elements": 32, "instructions": 5.0, "load_bytes": 16, "store_bytes": 16,
        "counts": {"mufu": 1.0, **{name: count / 2 for name, count in rest.items()}, "memory": 0.25, "control": 0.4},
    }  # fmt: skip
    values = {
        "kernel": "fused_policy_loss", "variant": "bf16/entropy/log_fidelity", "dtype": "bf16", "target": "sm_90",
        "softcap": False, "entropy": True, "aligned_out": True, "num_warps": 32, "programs_per_processor": 1,
        "registers": 64, "spills": 0, "shared_bytes": 128, "widest_load": 16, "widest_store": 16, "instructions": 1900,
        "occupancy": {"programs": 1, "share": 0.5, "limited_by": "registers"}, "loops": [gradient, statistics],
    }  # fmt: skip
    return {**values, **changes}


def loops(role: str, **changes: Any) -> list[dict[str, Any]]:
    """The main loops of :func:`record`, one changed; ``mufu`` stands for its count."""
    mufu = changes.pop("mufu", None)
    found = [{**each, **changes} if each["role"] == role else each for each in record()["loops"]]
    if mufu is not None:
        found = [
            {**each, "counts": {**each["counts"], "mufu": mufu}} if each["role"] == role else each for each in found
        ]
    return found


# ---------------------------------------------------------------------------------------------------------------
# the plan


def test_every_kernel_is_compiled_for_every_target() -> None:
    jobs = plan(TARGETS)
    assert {(job.target, job.variant.kernel) for job in jobs} == {(t, k) for t in TARGETS for k in SWEEPS}
    assert len(set(jobs)) == len(jobs)
    for target in FULL_TARGETS:
        assert [job.variant for job in jobs if job.target == target] == covering_variants()
    assert {target[:2] for target in FULL_TARGETS} == {"sm", "gf"}
    assert {DEFAULT, CAPPED} <= set(CORE) <= set(covering_variants())


def test_all_of_what_is_asked_for_is_compiled() -> None:
    assert {job.variant.full_name for job in plan(["sm_80"], "token_statistics")} == {
        variant.full_name for variant in covering_variants() if variant.kernel == "token_statistics"
    }
    assert len(plan(["sm_80"], every=True)) == len(covering_variants())
    assert plan(TARGETS, "nothing") == []


def test_coverage_is_told() -> None:
    text = coverage(plan(TARGETS))
    every, core = len(covering_variants()), len(CORE)
    assert f"{every} of {every} variants on sm_90, gfx942" in text
    assert f"{core} of {every} variants on sm_80, sm_100, sm_120, gfx950" in text


# ---------------------------------------------------------------------------------------------------------------
# machine code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MUFU.EX2 R1, R2", "mufu"),
        ("@!P0 MUFU.RSQ R1, R2", "mufu"),
        ("FFMA R1, R2, R3, R4", "fp"),
        ("FMNMX3 R1, R2, R3, R4, !PT", "fp"),
        ("@P1 FSEL R1, R2, -INF , P0", "fp"),
        ("HFMA2 R1, R2, R3, R4", "fp"),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "fp"),
        ("IMAD.U32 R1, R2, 0x10000, RZ", "integer"),
        ("LOP3.LUT R1, R2, 0xffff0000, RZ, 0xc0, !PT", "integer"),
        ("SHF.L.U32 R1, R2, 0x10, RZ", "integer"),
        ("@UP0 UIADD3 UR4, UR4, 0x1, URZ", "integer"),
        ("R2UR UR4, R2", "integer"),
        ("LDG.E.128 R4, [R2.64]", "memory"),
        ("STS [R2], R3", "memory"),
        ("ULDC.64 UR4, c[0x0][0x118]", "memory"),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "control"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "control"),
        ("@P0 BRA 0x1230", "control"),
        ("S2R R0, SR_TID.X", "control"),
        ("v_exp_f32_e32 v1, v2", "mufu"),
        ("v_rcp_iflag_f32_e32 v1, v2", "mufu"),
        ("v_pk_add_f32 v[0:1], v[2:3], v[4:5]", "vector"),
        ("v_cvt_pk_bf16_f32 v1, v2, v3", "vector"),
        ("s_add_u32 s0, s1, s2", "scalar"),
        ("s_and_saveexec_b64 s[0:1], vcc", "scalar"),
        ("buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", "memory"),
        ("s_load_dwordx2 s[0:1], s[2:3], 0x0", "memory"),
        ("ds_read_b32 v1, v2", "memory"),
        ("s_cbranch_scc1 .LBB0_4", "control"),
        ("s_waitcnt vmcnt(0)", "control"),
        ("s_nop 0", "control"),
    ],
)
def test_instruction_classes(text: str, expected: str) -> None:
    assert instruction_class(text) == expected


def code(*lines: str) -> list[Instruction]:
    """Instructions at 0, 1, 2, ...; "BRA n" jumps to n."""
    return [
        Instruction(address, line, int(line.split()[-1]) if "BRA" in line else None)
        for address, line in enumerate(lines)
    ]


def test_main_loop_is_counted_without_the_block_of_the_sampled_token() -> None:
    (loop,) = main_loops(
        code(
            "MUFU.EX2 R1, R2", "LDG.E.128 R4, [R2.64]", "@!P0 BRA 4", "FSEL R1, R1, R2, P1", "MUFU.EX2 R1, R2",
            "FFMA R1, R2, R3, R4", "IADD3 R1, R2, R3", "@P0 BRA 1", "EXIT",
        ),
        vec=8,
    )  # fmt: skip
    assert (loop.role, loop.elements, loop.load_bytes, loop.store_bytes) == ("statistics", 8, 16, 0)
    assert loop.instructions == pytest.approx(6 / 8)
    assert loop.counts == {"mufu": 0.125, "fp": 0.125, "integer": 0.125, "memory": 0.125, "control": 0.25}
    assert tuple(loop.counts) == NVIDIA_CLASSES


def test_narrow_accesses_of_a_loop_are_seen() -> None:
    (loop,) = main_loops(
        code("LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4", "STG.E.U16 [R2.64], R4", "@P0 BRA 0"), vec=8
    )
    assert (loop.role, loop.load_bytes, loop.store_bytes) == ("gradient", 16, 2)


def test_a_remainder_loop_is_not_counted_beside_the_unrolled_one() -> None:
    rest = ("LDG.E.128 R4, [R2.64]", "FFMA R1, R2, R3, R4", "FFMA R1, R2, R3, R4", "@P0 BRA 0")
    unrolled = ("LDG.E.128 R4, [R2.64]", "LDG.E.128 R4, [R2.64]", "FFMA R1, R2, R3, R4", "@P0 BRA 4")
    (loop,) = main_loops(code(*rest, *unrolled), vec=8)
    assert (loop.elements, loop.counts["fp"]) == (16, pytest.approx(1 / 16, abs=1e-3))


def test_stored_sums_are_no_gradient() -> None:
    lines = code("LDG.E.128 R4, [R2.64]", "STG.E [R2.64], R4", "@P0 BRA 0")
    assert [(loop.role, loop.store_bytes) for loop in main_loops(lines, vec=8)] == [("gradient", 4)]
    assert [(loop.role, loop.store_bytes) for loop in main_loops(lines, 8, partial_sums=True)] == [("statistics", 0)]


def test_amd_code_is_read() -> None:
    text = """
    kernel:
     s_load_dwordx2 s[0:1], s[2:3], 0x0 ; comment
    .LBB0_1:
     buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
     v_exp_f32_e32 v1, v2
     s_waitcnt vmcnt(0)
     s_cbranch_scc1 .LBB0_1
     s_endpgm
    .Lfunc_end0:
     v_exp_f32_e32 v1, v2
      .vgpr_count:     66
      .vgpr_spill_count: 3
      .sgpr_spill_count: 2
    """
    found, registers, spills = read_amdgcn({"amdgcn": text})
    assert (len(found), registers, spills) == (6, 66, 5)
    (loop,) = main_loops(found, vec=8)
    assert loop.counts == {"mufu": 0.125, "vector": 0.0, "scalar": 0.0, "memory": 0.125, "control": 0.25}
    assert tuple(loop.counts) == AMD_CLASSES


# ---------------------------------------------------------------------------------------------------------------
# limits: each can fail


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"spills": 8}, ["spills 8 bytes"]),
        ({"spills": 8, "target": "gfx942"}, ["spills 8 registers"]),
        ({"loops": loops("statistics", load_bytes=4)}, ["statistics loads 4 bytes at a time, not 16"]),
        ({"loops": loops("statistics", load_bytes=32)}, []),
        ({"loops": loops("gradient", store_bytes=2)}, ["gradient stores 2 bytes at a time, not 16"]),
        ({"loops": loops("gradient", store_bytes=2), "aligned_out": False}, []),
        ({"loops": loops("gradient", mufu=1.5)}, ["2.53 MUFU per element, limit 2.3"]),
        ({"loops": loops("gradient", mufu=3.0), "softcap": True}, []),
        ({"loops": []}, ["main loops [], expected ['gradient', 'statistics']"]),
        ({"loops": record()["loops"][1:], "variant": "bf16/log_fidelity/loss_only"}, []),
        ({"loops": loops("gradient", instructions=13.9)}, []),
        ({"loops": loops("gradient", instructions=14.1)}, ["22.1 instructions per element, limit 22"]),
        (
            {"loops": loops("gradient", instructions=10.1), "entropy": False},
            ["18.1 instructions per element, limit 18"],
        ),
        ({"loops": loops("gradient", instructions=30.0), "softcap": True}, []),
        ({"loops": loops("gradient", instructions=14.1), "dtype": "fp32"}, ["22.1 instructions per element, limit 22"]),
        (
            {"loops": loops("gradient", instructions=14.1), "target": "gfx942"},
            ["22.1 instructions per element, limit 22"],
        ),
        ({"loops": loops("gradient", instructions=30.0), "target": "gfx942", "aligned_out": False}, []),
        (
            {"loops": loops("gradient", instructions=14.1), "aligned_out": False},
            ["22.1 instructions per element, limit 22"],
        ),
        ({"programs_per_processor": 2}, ["1 programs fit a processor (registers), the launch wants 2"]),
    ],
)
def test_broken_limits_are_named(changes: dict[str, Any], broken: list[str]) -> None:
    one = record(**changes)
    name = f"{one['target']} fused_policy_loss/{one['variant']}"
    assert broken_limits([record(), one]) == [f"{name}: {line}" for line in broken]


@pytest.mark.parametrize(
    ("kernel", "role", "mufu"),
    [("token_statistics", "statistics", 1.2), ("token_gradient", "gradient", 1.2), ("scale_gradient", "gradient", 0.1)],
)
def test_single_sweeps_have_limits_of_their_own(kernel: str, role: str, mufu: float) -> None:
    found = [loop for loop in loops(role, mufu=mufu) if loop["role"] == role]
    (line,) = broken_limits([record(kernel=kernel, variant="bf16", loops=found)])
    assert f"{mufu:.3g} MUFU per element, limit" in line
    assert instruction_limit(record(kernel=kernel, variant="bf16")) is None


def test_limits_bind_on_every_target() -> None:
    report = Report(records=[record(spills=8, target=target) for target in TARGETS])
    assert [line.split()[0] for line in document(report, TARGETS).broken] == TARGETS


# ---------------------------------------------------------------------------------------------------------------
# occupancy, traffic, roofline


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared", "expected"),
    [
        ("sm_90", 32, 64, 128, Occupancy(1, 0.5, "registers")),
        ("sm_90", 16, 64, 64, Occupancy(2, 0.5, "registers")),
        ("sm_90", 16, 65, 64, Occupancy(1, 0.25, "registers")),  # one more each and the second program waits
        ("sm_80", 16, 32, 0, Occupancy(4, 1.0, "registers")),
        ("sm_90", 1, 16, 0, Occupancy(32, 0.5, "programs")),
        ("sm_90", 4, 32, 100 * 1024, Occupancy(2, 8 / 64, "shared memory")),
        ("sm_120", 32, 32, 128, Occupancy(1, 32 / 48, "warps")),
        ("gfx942", 8, 66, 32, Occupancy(3, 0.75, "registers")),  # 72 of 512: seven wavefronts in each of four SIMDs
        ("gfx942", 8, 64, 32, Occupancy(4, 1.0, "registers")),
        ("gfx942", 4, 32, 33 * 1024, Occupancy(1, 0.125, "shared memory")),
        ("gfx950", 4, 32, 33 * 1024, Occupancy(4, 0.5, "shared memory")),
    ],
)
def test_occupancy(target: str, num_warps: int, registers: int, shared: int, expected: Occupancy) -> None:
    assert occupancy.occupancy(target, num_warps, registers, shared) == expected


def test_every_target_has_limits_and_a_gpu() -> None:
    assert set(LIMITS) == set(REFERENCE) == set(TARGETS) == {gpu.target for gpu in GPUS.values()}
    for target, name in REFERENCE.items():
        assert GPUS[name].target == target
    for gpu in GPUS.values():
        assert gpu.source
        assert 1e9 < gpu.clock_hz < 3e9
        assert 1e12 < gpu.bandwidth < 1e13
        assert gpu.special_takes_issue is (gpu.vendor == "amd")


def test_traffic_is_one_read_and_one_write_where_rows_fit() -> None:
    found = row_traffic(1000, 2, 10, 10 * 2000 / USABLE)
    assert (found.first_read, found.second_read, found.written, found.hit) == (2000, 0, 2000, 1)


@pytest.mark.parametrize(("rows", "hit"), [(10, 1.0), (20, 0.5), (40, 0.25)])
def test_traffic_grows_with_what_does_not_fit(rows: int, hit: float) -> None:
    found = row_traffic(1000, 2, rows, 10 * 2000 / USABLE)
    assert found.hit == pytest.approx(hit)
    assert found.total == pytest.approx(2000 * (2 + 1 - hit))


def test_traffic_extremes() -> None:
    assert row_traffic(1000, 4, 10, 1e9, no_reuse=True).total == 12000
    only_statistics = row_traffic(1000, 4, 10**6, 1.0, gradient=False)
    assert (only_statistics.total, only_statistics.hit) == (4000, 1.0)
    tested = doctest.testmod(traffic)
    assert (tested.failed, tested.attempted > 0) == (0, True)


def test_padding_counts_idle_lanes() -> None:
    assert padding(32768 * 4, LAUNCH) == 1.0
    # A tile of 1024 groups more, not a step of four.
    assert padding(32768 * 4 + 8, LAUNCH) == pytest.approx(4.25 / 4, rel=1e-3)
    odd = 32768 + 1  # the edge takes each lane the time of one element
    assert padding(odd, LAUNCH) == pytest.approx((32768 + 1024) / odd)


def predicted(gpu: gpus.Gpu, one: dict[str, Any] | None = None, **changes: Any) -> roofline.Prediction:
    arguments = {"shape": "s", "vocabulary": 131072, "itemsize": 2, "tokens": 132 * 64, **changes}
    return predict(gpu, one or record(target=gpu.target), LAUNCH, **arguments)


def gpu_with(**changes: Any) -> gpus.Gpu:
    """A GPU of round numbers on which 2 + 2 bytes per element take 4 ps, 13 instructions and 2.03 MUFU nothing."""
    return dataclasses.replace(
        GPUS["H200"], processors=100, clock_hz=1e15, cache_bytes=1 << 40, bandwidth=1e12, **changes
    )


def test_bandwidth_binds() -> None:
    found = predicted(gpu_with())
    assert found.ns_per_element == pytest.approx(4e-3)
    assert found.time_over_copy == pytest.approx(1.0)
    assert found.time_over_copy_no_reuse == pytest.approx(1.5)
    assert found.binding == {"statistics": "bandwidth", "gradient": "bandwidth"}
    assert found.seconds == pytest.approx(4e-12 * 131072 * 132 * 64)
    assert found.shares["bandwidth"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rates", "resource", "seconds"),
    [
        ({"special": 1, "issue": 1000}, "special", 2.03 / 1e11),
        ({"special": 1000, "issue": 1}, "issue", 13.0 / 1e11),
        ({"special": 1000, "issue": 1000, "fp32": 1}, "fp32", 7.8 / 1e11),
    ],
)
def test_each_unit_can_bind(rates: dict[str, int], resource: str, seconds: float) -> None:
    found = predicted(dataclasses.replace(gpu_with(**rates), clock_hz=1e9))
    assert found.binding == {"statistics": resource, "gradient": resource}
    assert found.ns_per_element == pytest.approx(seconds * 1e9)


def test_sweeps_are_bound_apart_and_added() -> None:
    """A gradient that takes long does not hide the statistics' reading."""
    found = predicted(gpu_with(), record(loops=loops("gradient", mufu=1e8)))
    assert found.binding == {"statistics": "bandwidth", "gradient": "special"}
    assert found.ns_per_element == pytest.approx((2e-12 + 1e8 / (100 * 1e15 * 16)) * 1e9)


def test_transcendental_instructions_block_amd_s_vector_unit() -> None:
    gpu = dataclasses.replace(GPUS["MI300X"], processors=100, clock_hz=1e9, bandwidth=1e15)
    found = predicted(gpu)
    assert found.binding["statistics"] == "issue"
    slots = (5.2 + 4 * 1.03) + (2.6 + 4 * 1.0)
    assert found.ns_per_element == pytest.approx(slots / (100 * 1e9 * 64) * 1e9)


def test_rows_that_do_not_fill_a_round_cost_arithmetic() -> None:
    gpu = dataclasses.replace(gpu_with(special=1), clock_hz=1e9)
    full, more = predicted(gpu), predicted(gpu, tokens=132 * 64 + 1)
    assert (full.idle, more.idle) == (1.0, pytest.approx(65 / (64 + 1 / 132)))
    assert more.ns_per_element == pytest.approx(full.ns_per_element * more.idle)


def test_fewer_rows_than_processors_leave_some_idle() -> None:
    gpu = dataclasses.replace(gpu_with(special=1), clock_hz=1e9, processors=528)
    assert predicted(gpu).idle == 4.0
    assert predicted(dataclasses.replace(gpu, processors=132)).idle == 1.0


def test_too_few_bytes_in_flight_bind() -> None:
    """132 rows x 64 KB arrive once in a latency; the second sweep's come from the cache."""
    found = predicted(gpu_with(latency=1e-5))
    assert found.binding == {"statistics": "latency", "gradient": "bandwidth"}
    assert found.ns_per_element == pytest.approx(2e-3 + 1e9 * 1e-5 * 2 / (132 * 65536))


def test_rows_beyond_the_cache_cost_bandwidth() -> None:
    small = dataclasses.replace(gpu_with(), cache_bytes=132 * 131072)  # 0.85 of half of what is in flight
    assert predicted(small).hit == pytest.approx(0.425)
    assert predicted(small).time_over_copy == pytest.approx(1 + 0.575 / 2)


def test_a_kernel_of_one_sweep_is_refused() -> None:
    with pytest.raises(ValueError, match="both sweeps"):
        predicted(GPUS["H200"], record(loops=record()["loops"][:1]))


# ---------------------------------------------------------------------------------------------------------------
# what is shown


def everything() -> list[dict[str, Any]]:
    """Records of every target, of long names and of one sweep."""
    found = [record(target=target) for target in TARGETS]
    longest = max((variant.name for variant in covering_variants()), key=len)
    found.append(record(variant=longest, registers=255))
    wide = {**record()["loops"][0], "instructions": 17.7, "counts": {**record()["loops"][0]["counts"], "fp": 12.6}}
    found.append(record(kernel="scale_gradient", variant="fp32", spills=128, shared_bytes=16384, loops=[wide]))
    return found


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit(width: int) -> None:
    pytest.importorskip("triton", reason="needs Triton, to compile with")
    result = document(Report(records=everything()), TARGETS, gpus=list(GPUS.values()))
    text = [line for line, _ in compile_table.lines(result.records, width)]
    assert max(map(len, text)) <= width
    (shown,) = {line for line in text if line.startswith("sm_90") and "255" in line}
    assert ("16/16" in shown) is (width == 100)
    for cells in (line.split() for line in text if line.startswith(("sm_", "gfx"))):
        assert len(cells) == (18 if width == 100 else 15), cells  # no two numbers run together
    predictions = [line for line, _ in compile_table.prediction_lines(result.predictions, width)]
    assert max(map(len, predictions)) <= width
    assert ("151936" in predictions[2]) is (width == 100)
    assert {prediction.gpu for prediction in result.predictions} == set(GPUS)


def test_document_is_json_with_a_version_and_an_environment() -> None:
    pytest.importorskip("triton", reason="needs Triton, to compile with")
    report = Report([record()], unavailable={"gfx950": "no"}, tools={"ptxas": "12.8"})
    result = document(report, ["sm_90", "gfx950"], "bf16/entropy/log_fidelity", gpus=[GPUS["H200"], GPUS["A100"]])
    content = json.loads(json.dumps(result.as_dict()))
    assert (content["schema_version"], content["kind"]) == (SCHEMA_VERSION, "compile")
    assert content["environment"]["tools"] == {"ptxas": "12.8"}
    assert content["environment"]["torch"]
    assert content["unavailable"] == {"gfx950": "no"}
    assert "gfx950" not in content["covered"]
    assert content["records"] == [record()]
    assert [gpu["name"] for gpu in content["gpus"]] == ["H200"]  # nothing was counted for an A100
    assert [p["shape"] for p in content["predictions"]] == ["qwen3", "llama3", "gemma", "gpt2"]
    assert "nothing was timed" in content["model"]


def test_markdown_says_what_is_a_prediction() -> None:
    pytest.importorskip("triton", reason="needs Triton, to compile with")
    result = document(Report([record()]), ["sm_90"], gpus=[GPUS["H200"]])
    text = compile_table.markdown(result.records, result.predictions, result.covered)
    assert compile_table.MODEL_TITLE in text
    assert "not measured" in compile_table.MODEL_TITLE
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 2
    assert "| H200 | qwen3 | 151936 |" in text
    assert "copy, measured" in text


# ---------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> Callable[[Report], None]:
    """Stands in for the compilation."""
    return lambda report: monkeypatch.setattr("hpo_fused.bench.compile_command.run_report", lambda *_: report)


@pytest.mark.parametrize(("check", "code"), [((), 0), (("--check",), 1)])
@pytest.mark.parametrize(
    ("report", "told"),
    [
        (
            Report([record(), record(spills=8)]),
            "sm_90 fused_policy_loss/bf16/entropy/log_fidelity: spills 8 bytes",
        ),
        (Report([record()], ["sm_90 scale_gradient/bf16: not compiled: ValueError: x"]), "not compiled: ValueError: x"),
    ],
)
def test_check_fails_on_a_broken_limit(
    invoke: Invoke, reported: Callable[[Report], None], report: Report, told: str, check: tuple[str, ...], code: int
) -> None:
    pytest.importorskip("triton", reason="needs Triton, to compile with")
    reported(report)
    done = invoke("compile", *check)
    assert done.exit_code == code, done.output
    assert told in done.output
    assert f"{len(report.records)} kernels compiled, 1 limits broken." in done.output


@pytest.mark.parametrize(
    ("arguments", "code"), [((), 0), (("--target", "sm_90", "--target", "gfx950"), 2), (("--target", "sm_90"), 0)]
)
def test_a_target_that_cannot_be_compiled_for(
    invoke: Invoke, reported: Callable[[Report], None], arguments: tuple[str, ...], code: int
) -> None:
    """The others are reported; only who asked for it fails."""
    pytest.importorskip("triton", reason="needs Triton, to compile with")
    reported(Report([record()], unavailable={"gfx950": "RuntimeError: unknown architecture"}))
    done = invoke("compile", "--check", *arguments)
    assert done.exit_code == code, done.output
    assert "gfx950: not covered, nothing compiles for it here: RuntimeError: unknown architecture" in done.output
    assert "1 kernels compiled: no spills" in done.output


def test_nothing_compiled_is_a_failure(invoke: Invoke, reported: Callable[[Report], None]) -> None:
    reported(Report(unavailable=dict.fromkeys(TARGETS, "OSError: no ptxas")))
    assert invoke("compile").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "missing", "expected"),
    [
        (("--target", "sm_1"), False, "unknown target 'sm_1'; expected one of sm_80"),
        (("--gpu", "H300"), False, "unknown gpu 'H300'; expected one of A100, H100"),
        (("--only", "nothing"), False, "no variant's name contains 'nothing'; there are fused_policy_loss/bf16"),
        ((), True, "compiling kernels needs triton: pip install 'hpo-fused[triton]'"),
    ],
)
def test_compile_says_what_is_wrong(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], missing: bool, expected: str
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        pytest.importorskip("triton", reason="needs Triton, to compile with")
    done = invoke("compile", *arguments)
    assert done.exit_code == 2
    assert expected in " ".join(done.output.replace("│", " ").split())


def test_one_failure_is_not_the_target_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by whether anything at all compiles there."""
    variant = pytest.importorskip("hpo_fused.bench.compile_variant", reason="needs triton")
    outcomes = iter(
        [RuntimeError("lines\nptxas fatal : last line\nRepro command: ..."), OSError("gone"), OSError("gone")]
    )

    def fail(*_: object) -> None:
        raise next(outcomes)

    class Pool:
        """Without processes."""

        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        map = staticmethod(map)

    monkeypatch.setattr(variant, "compile_variant", fail)
    monkeypatch.setattr(variant, "unavailable", lambda target: "" if target == "sm_90" else "no such thing")
    monkeypatch.setattr(compile_report, "_tools", dict)
    monkeypatch.setattr(compile_report, "ProcessPoolExecutor", Pool)
    jobs = [Job(DEFAULT, "sm_90"), Job(DEFAULT, "gfx950"), Job(CAPPED, "gfx950")]
    report = compile_report.compile_jobs(jobs)
    assert report.failures == [f"sm_90 {DEFAULT.full_name}: not compiled: RuntimeError: ptxas fatal : last line"]
    assert report.unavailable == {"gfx950": "no such thing"}


@pytest.mark.xdist_group("compile")
def test_compile_end_to_end(invoke: Invoke, tmp_path: Path) -> None:
    """The tests' own process runs the interpreter; the compiler has one of its own."""
    pytest.importorskip("triton", reason="needs Triton, to compile with")
    arguments = ("compile", "--target", "sm_90", "--only", "scale_gradient/bf16", "--check", "--json", "deep/c.json")
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stderr == "compiling for sm_90\n"
    for word in ("scale_gradient/bf16", "sm_90", "16/16", "1 kernels compiled: no spills", "Wrote deep/c.json"):
        assert word in done.stdout
    content = json.loads((tmp_path / "deep" / "c.json").read_text())
    (one,) = content["records"]
    assert (one["kernel"], one["target"], one["spills"]) == ("scale_gradient", "sm_90", 0)
    assert one["occupancy"]["programs"] >= one["programs_per_processor"]
    assert content["environment"]["tools"]["ptxas"]
