"""The launch table: what it starts on which GPU, by arithmetic; nothing is launched."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

launch = pytest.importorskip("hpo_fused.kernels.launch", reason="needs Triton")

MB = 1 << 20
GPUS = {
    "A100": launch.Machine("sm_80", 108, 40 * MB, 32),
    "H100": launch.Machine("sm_90", 132, 50 * MB, 32),
    "B200": launch.Machine("sm_100", 148, 126 * MB, 32),
    "RTX 5090": launch.Machine("sm_120", 170, 96 * MB, 32),
    "MI300X": launch.Machine("gfx942", 304, 256 * MB, 64),
}
QWEN, GEMMA, GPT2 = 151936, 262144, 50257


@pytest.mark.parametrize(
    ("gpu", "itemsize", "V", "expected"),
    [
        ("A100", 2, QWEN, (1024, 4, 108)),
        ("A100", 2, GEMMA, (1024, 4, 68)),
        ("H100", 2, QWEN, (1024, 4, 132)),
        ("H100", 2, GEMMA, (1024, 4, 85)),
        ("H100", 2, GPT2, (512, 4, 264)),
        ("H100", 4, QWEN, (1024, 4, 80)),  # 73 would fit: below 0.6 of the SMs arithmetic binds
        ("B200", 2, GEMMA, (1024, 4, 148)),
        ("B200", 2, QWEN, (512, 4, 296)),
        ("RTX 5090", 2, QWEN, (1024, 2, 170)),
        ("MI300X", 2, QWEN, (512, 2, 608)),
        ("H100", 2, 5000, (128, 4, 1056)),
        ("H100", 2, 600, (128, 1, 1056)),
    ],
)
def test_table(gpu: str, itemsize: int, V: int, expected: tuple[int, int, int]) -> None:
    assert tuple(launch.default_parameters(GPUS[gpu], itemsize, V)) == expected


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("V", [997, 32000, GPT2, 128256, QWEN, GEMMA, 1 << 20])
def test_rows_in_flight_fit_the_cache_or_the_processors_bind(gpu: str, itemsize: int, V: int) -> None:
    machine = GPUS[gpu]
    parameters = launch.default_parameters(machine, itemsize, V)
    rows, row_bytes = parameters.rows_in_flight, V * itemsize
    fewest = math.ceil(launch.BUSY_PROCESSORS * machine.processors)
    assert rows >= fewest
    assert rows * row_bytes <= launch.USABLE_CACHE * machine.cache_bytes or rows == fewest
    configuration = launch.configure(machine, itemsize, parameters)
    assert configuration.lanes == configuration.num_warps * machine.warp_size == parameters.threads
    resident = parameters.threads * math.ceil(rows / machine.processors)
    assert configuration.options.get("maxnreg", 64) * resident <= 65536


def test_bound_by_arithmetic_keeps_every_processor() -> None:
    assert launch.default_parameters(GPUS["H100"], 2, GEMMA, narrow=True) == (1024, 2, 132)
    assert launch.default_parameters(GPUS["H100"], 2, GEMMA, reread=False) == (512, 4, 264)


@pytest.mark.parametrize("V", [4096, 4100, 9000, 21000, 32000, GPT2, 100352, 128256, QWEN, GEMMA])
def test_few_lanes_are_idle(V: int) -> None:
    """GPT-2's 50257 entries took four steps of 16384 where they now take 13 tiles of 4096."""
    for machine in GPUS.values():
        parameters = launch.default_parameters(machine, 2, V)
        tile = parameters.threads * 8
        assert math.ceil(V / tile) * tile <= 1.25 * V


def test_unknown_architecture_gets_what_is_safe() -> None:
    machine = launch.Machine("sm_89", 142, 96 * MB, 32)
    assert not machine.known
    for narrow in (False, True):
        parameters = launch.default_parameters(machine, 2, QWEN, narrow=narrow)
        assert parameters.unroll == 2 - narrow  # at most what is safe on every architecture
        assert parameters.rows_in_flight == 142
        assert launch.configure(machine, 2, parameters).options == {}  # no cap on registers: nothing need spill
    wave32 = launch.Machine("gfx1201", 64, 64 * MB, 32)
    configuration = launch.configure(wave32, 2, launch.default_parameters(wave32, 2, 32000))
    assert configuration.num_warps * 32 == configuration.lanes
    assert configuration.options == {"allow_flush_denorm": True}


@pytest.mark.parametrize(
    ("hip", "properties", "expected"),
    [
        (None, {"major": 9, "minor": 0, "L2_cache_size": 50 * MB}, ("sm_90", 132, 50 * MB, 32)),
        ("6.4", {"gcnArchName": "gfx942:sramecc+:xnack-", "L2_cache_size": 4 * MB}, ("gfx942", 132, 256 * MB, 64)),
        ("6.4", {"gcnArchName": "gfx1201", "warp_size": 32}, ("gfx1201", 132, 4 * MB, 32)),
    ],
)
def test_machine_of_a_device(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, properties: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    found = SimpleNamespace(multi_processor_count=132, **properties)
    monkeypatch.setattr(launch.torch.version, "hip", hip)
    monkeypatch.setattr(launch.torch.cuda, "get_device_properties", lambda _: found)
    launch.machine.cache_clear()
    try:
        assert tuple(launch.machine(0)) == expected
    finally:
        launch.machine.cache_clear()
