"""Reading machine code: short made-up listings, and the limits that kernels are held against."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("rich", reason="needs the bench extra")

from hpo_fused.bench.machine_code.calls import CALLS
from hpo_fused.bench.machine_code.listing import (
    LOADS,
    STORES,
    Instruction,
    Loop,
    main_loops,
    parse_sass,
    read_amdgcn,
    width,
)
from hpo_fused.bench.machine_code.report import Kernel, broken_limits, kernel_table

# A loop that loads 16 bytes of bfloat16, one special function for each of two packed halves, and a skipped block.
SASS = """
 Function : kernel
  REG:40 STACK:0 SHARED:0 LOCAL:8
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   MUFU.EX2 R8, R4 ;
        /*0030*/                   FADD R9, R8, R9 ;
        /*0040*/              @!P0 BRA 0x70 ;
        /*0050*/                   FADD R10, R10, R9 ;
        /*0060*/                   FADD R11, R10, R9 ;
        /*0070*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;
        /*0080*/              @P0  BRA 0x10    &wr=0x2 ?trans6;
        /*0090*/                   LDG.E.128 R4, [R2.64] ;
        /*00a0*/                   STG.E.64 [R2.64], R4 ;
        /*00b0*/              @P1  BRA.U 0x90 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0 ;
        /*00e0*/                   NOP ;
"""
AMDGCN = """
kernel:
; %bb.0:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v[4:5], off
	v_exp_f32_e32 v6, v0
	v_add_f32_e32 v7, v6, v7
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	s_endpgm
.Lfunc_end0:
    .sgpr_spill_count: 1
    .vgpr_count:     48
    .vgpr_spill_count: 2
"""


def test_nvidia_listing() -> None:
    code, registers, spills = parse_sass(SASS)
    assert (len(code), registers, spills) == (14, 40, 8)
    assert main_loops(code, vec=8) == [
        # The two additions that a branch skips are the step with the sampled token.
        Loop("statistics", 8, round(6 / 8, 3), round(1 / 8, 3), 16, 0, 0),
        Loop("gradient", 8, round(3 / 8, 3), 0.0, 16, 8, 0),
    ]


def test_amd_listing() -> None:
    code, registers, spills = read_amdgcn({"amdgcn": AMDGCN})
    assert (len(code), registers, spills) == (6, 48, 3)
    assert main_loops(code, vec=4) == [Loop("statistics", 4, 1.0, 0.25, 16, 0, 0)]


@pytest.mark.parametrize(
    ("text", "load", "store"),
    [
        ("LDG.E.128.CONSTANT R4, [R2.64]", 16, 0), ("@P0 LDG.E.U16 R4, [R2.64]", 2, 0), ("LDG.E R4, [R2.64]", 4, 0),
        ("STG.E.64 [R2.64], R4", 0, 8), ("LDS.128 R4, [R2]", 0, 0), ("global_load_dwordx2 v[0:1], v2, s[0:1]", 8, 0),
        ("global_store_short v0, v1, off", 0, 2), ("buffer_load_dword v0, v1, s[0:3], 0", 4, 0),
    ],
)  # fmt: skip
def test_access_widths(text: str, load: int, store: int) -> None:
    instruction = Instruction(0, text, None)
    assert (width(instruction, LOADS), width(instruction, STORES)) == (load, store)


def loop(
    role: str, instructions: float = 8.0, special: float = 1.03, load: int = 16, store: int = 16, spills: int = 0
) -> dict[str, Any]:
    return {
        "role": role, "elements": 32, "instructions": instructions, "special": special, "load_bytes": load,
        "store_bytes": store, "spills": spills,
    }  # fmt: skip


def kernel(**changes: Any) -> Kernel:
    """A kernel that keeps the limits."""
    values: dict[str, Any] = {
        "kernel": "a_kernel", "target": "sm_90", "calls": ["default"], "sweeps": True, "softcap": False,
        "entropy": True, "unaligned": False, "registers": 64, "spills": 0, "shared_bytes": 128, "widest_load": 16,
        "widest_store": 16, "loops": [loop("statistics"), loop("gradient")],
    }  # fmt: skip
    return Kernel(**{**values, **changes})


BOTH = [loop("statistics", 11.5), loop("gradient", 11.0)]  # 22.5 instructions together


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"spills": 8}, []),  # beside the main loops
        ({"spills": 40}, ["spills 40 bytes"]),
        ({"spills": 8, "loops": [loop("statistics"), loop("gradient", spills=1)]}, ["spills 8 bytes"]),
        ({"spills": 40, "loops": [], "sweeps": False, "calls": ["loss of log-probabilities"]}, ["spills 40 bytes"]),
        ({"spills": 8, "target": "gfx942"}, ["spills 8 registers"]),
        ({"loops": [loop("statistics", load=8), loop("gradient")]}, ["statistics loads 8 bytes at a time, not 16"]),
        ({"loops": [loop("statistics"), loop("gradient", store=2)]}, ["gradient stores 2 bytes at a time, not 16"]),
        ({"loops": [loop("statistics"), loop("gradient", store=2)], "unaligned": True}, []),
        ({"loops": [loop("statistics", special=2.0), loop("gradient")]}, ["2 special functions per element"]),
        ({"loops": [loop("statistics", special=3.0), loop("gradient")], "softcap": True}, []),
        ({"loops": BOTH}, ["22.5 instructions per element, limit 19"]),
        ({"loops": BOTH, "softcap": True}, []),
        (
            {"loops": [loop("statistics", 10.0), loop("gradient", 9.0)], "entropy": False},
            ["19 instructions per element"],
        ),
        ({"loops": BOTH, "target": "gfx942", "unaligned": True}, []),
        ({"loops": []}, ["no main loop found", "no main loop found for gradient and statistics"]),
        ({"loops": [loop("statistics")]}, ["no main loop found for gradient"]),
        ({"loops": [], "sweeps": False, "calls": ["loss of log-probabilities"]}, []),
    ],
)
def test_limits(changes: dict[str, Any], broken: list[str]) -> None:
    found = broken_limits([kernel(**changes)])
    assert len(found) == len(broken)
    for line, words in zip(found, broken, strict=True):
        assert words in line


def test_a_call_s_kernels_have_its_main_loops_together() -> None:
    first, second = kernel(loops=[loop("statistics")]), kernel(kernel="b_kernel", loops=[loop("gradient")])
    assert broken_limits([first, second]) == []
    assert broken_limits([first, kernel(target="sm_80", loops=[loop("gradient")])]) == [
        "sm_90 default: no main loop found for gradient", "sm_80 default: no main loop found for statistics",
    ]  # fmt: skip


def test_kernels_are_told() -> None:
    table = kernel_table([kernel().__dict__])
    assert table is not None
    assert "| a_kernel | default | **sm_90** |" not in table.markdown()
    assert "| a_kernel | default | sm_90 | 64 | 0 | 128 | 16/16 | 8.00 (1.03) | 8.00 (1.03) |" in table.markdown()
    assert kernel_table([]) is None


def test_calls_are_told_apart() -> None:
    assert len({call.name for call in CALLS}) == len(CALLS)
    assert {call.operation for call in CALLS if call.core} >= {"policy_loss", "token_logprobs", "logprob_policy_loss"}
