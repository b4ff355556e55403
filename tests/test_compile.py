"""The kernels' machine code, read without a GPU: no spills, wide accesses, few instructions and special functions.

The compiler runs in a process of its own: interpreter and compiler cannot share one, and the other tests may be using
the interpreter. ``hpo-fused-bench compile --check`` compiles every call for every target.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich", reason="needs the bench extra")

from hpo_fused.bench.machine_code.report import Report, ReportFailed, run_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report() -> Report:
    """Calls that end in "KL and entropy": with softcap and without, fused and by several kernels, on both vendors."""
    return run_report(["sm_90", "gfx942"], only="KL and entropy")


def test_limits_hold(report: Report) -> None:
    assert report.broken == []


def test_limits_hold_where_registers_are_fewest() -> None:
    """The core set, which has the default call, unaligned rows and every kernel."""
    found = run_report(["sm_100"])
    assert found.broken == []
    assert {"policy_loss_kernel", "token_statistics_kernel", "token_gradient_kernel", "logprob_loss_kernel"} <= {
        kernel.kernel for kernel in found.kernels
    }


def test_every_call_s_kernels_were_compiled_for_both(report: Report) -> None:
    found = {(kernel.target, kernel.kernel) for kernel in report.kernels}
    assert found == {
        (target, name) for target in ("sm_90", "gfx942") for call in report.public for name in call.launches
    }
    assert {call.call for call in report.public} == {
        "KL and entropy", "KL and entropy, fp32", "clip, softcap, KL and entropy", "fp16, KL and entropy",
        "shard, KL and entropy",
    }  # fmt: skip


def test_softcap_is_seen(report: Report) -> None:
    """The counting itself: operations that softcap certainly needs are found, and only there."""
    special = {
        kernel.softcap: max(loop["special"] for loop in kernel.loops) for kernel in report.kernels if kernel.loops
    }
    assert special[True] >= 2.5
    assert special[False] < 1.15


def test_a_spilling_configuration_is_noticed() -> None:
    found = run_report(["sm_90"], only="KL and entropy, fp32", registers=24)
    assert any("policy_loss_kernel" in line and "spills" in line for line in found.broken)


def test_unknown_calls_and_targets_are_refused() -> None:
    with pytest.raises(ReportFailed, match="no call's name contains 'nothing'; there are\n  default"):
        run_report(["sm_90"], only="nothing")
    with pytest.raises(ReportFailed, match=r"target: expected one of sm_80, .*, got 'sm_70'"):
        run_report(["sm_70"])
