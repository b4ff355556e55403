"""The launch table: what it starts on which GPU, by arithmetic. On a GPU: launches straight and by Triton's search."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused.interface import LogitTransform

from .test_shards import WIDTH, put_together

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
        ("A100", 2, QWEN, (1024, 2, 108)),
        ("A100", 2, GEMMA, (1024, 2, 108)),
        ("H100", 2, QWEN, (1024, 4, 132)),
        ("H100", 2, GEMMA, (1024, 4, 132)),
        ("H100", 2, GPT2, (512, 4, 264)),
        ("H100", 4, QWEN, (1024, 4, 132)),
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
def test_rows_in_flight_fit_the_cache_or_are_one_to_a_processor(gpu: str, itemsize: int, V: int) -> None:
    machine = GPUS[gpu]
    parameters = launch.default_parameters(machine, itemsize, V)
    assert parameters.rows >= machine.processors
    fits = parameters.rows * V * itemsize <= launch.USABLE_CACHE * machine.cache_bytes
    assert fits or parameters.rows == machine.processors
    configuration = launch.configure(machine, parameters)
    assert configuration.lanes == configuration.options["num_warps"] * machine.warp_size == parameters.threads
    resident = parameters.threads * math.ceil(parameters.rows / machine.processors)
    assert configuration.options.get("maxnreg", 64) * resident <= 65536


def test_variants() -> None:
    """Those that press on the registers hold fewer loads; without a second read the cache is no concern."""
    assert launch.default_parameters(GPUS["H100"], 2, GEMMA, pressure=1) == (512, 4, 264)
    assert launch.default_parameters(GPUS["H100"], 2, GEMMA, pressure=2) == (1024, 2, 132)
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
    for pressure in (0, 1, 2):
        parameters = launch.default_parameters(machine, 2, QWEN, pressure=pressure)
        assert parameters.loads == 2 - (pressure > 0)  # at most what is safe on every architecture
        assert parameters.rows == (284 if pressure == 1 else 142)
        assert "maxnreg" not in launch.configure(machine, parameters).options  # no cap: nothing need spill
    wave32 = launch.Machine("gfx1201", 64, 64 * MB, 32)
    configuration = launch.configure(wave32, launch.default_parameters(wave32, 2, 32000))
    assert configuration.options["num_warps"] * 32 == configuration.lanes
    assert configuration.options["allow_flush_denorm"] is True


def test_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is not there, parameters that are not the table's; both end with the context."""
    monkeypatch.setattr(launch, "INTERPRETED", SimpleNamespace(value=False))
    logits = torch.empty(1, 1, QWEN, dtype=torch.bfloat16, device="meta")
    chosen = launch.LaunchParameters(512, 8, 264)
    assert not launch.serves(logits)
    with launch.override(machine=GPUS["B200"]):
        assert launch.serves(logits)
        assert launch.launch_configuration(logits).rows == 296
        with launch.override(machine=GPUS["H100"], parameters=chosen):
            configuration = launch.launch_configuration(logits)
        assert (configuration.lanes, configuration.unroll, configuration.rows) == chosen
        assert configuration.options["maxnreg"] == 64
        assert (configuration.programs(100), configuration.programs(8192)) == (100, 264)
        assert launch.launch_configuration(logits).rows == 296
    assert not launch.serves(logits)
    # Of a real device: the parameters alone.
    monkeypatch.setattr(launch, "machine", lambda index: GPUS["A100"])
    with launch.override(parameters=chosen):
        assert launch.launch_configuration(logits).options["maxnreg"] == 42
        assert not launch.serves(logits)


@pytest.mark.parametrize("wrong", [(96, 4, 1), (2048, 4, 1), (512, 3, 1), (512, 16, 1), (512, 4, 0)])
def test_override_refuses_what_no_launch_can_have(wrong: tuple[int, int, int]) -> None:
    with (
        pytest.raises(ValueError, match=r"parameters: expected threads 32 to 1024 and loads 1 to 8.*got "),
        launch.override(parameters=launch.LaunchParameters(*wrong)),
    ):
        pass


def test_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, words in ((GPUS["H100"], "table entry for sm_90"), (launch.Machine("sm_89", 1, MB, 32), "sm_89")):
        monkeypatch.setattr(launch, "machine", lambda index, machine=machine: machine)
        assert words in launch.origin(0)


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
    device = SimpleNamespace(multi_processor_count=132, **properties)
    monkeypatch.setattr(launch.torch.version, "hip", hip)
    monkeypatch.setattr(launch.torch.cuda, "get_device_properties", lambda _: device)
    launch.machine.cache_clear()
    try:
        assert tuple(launch.machine(0)) == expected
    finally:
        launch.machine.cache_clear()


def steps(device: torch.device, B: int, T: int) -> list[Tensor]:
    """Results and gradients of calls that launch every kernel."""
    generator = torch.Generator().manual_seed(T)
    z, rows = torch.randn(B, T, WIDTH, generator=generator), torch.randn(3, B, T, generator=generator)
    old, c, h = rows.to(device)
    advantages, tokens = old.sum(1), torch.randint(WIDTH, (B, T), generator=generator).to(device)
    found = []
    for preset, softcap in (("mhpo_ahpo", None), ("gspo", 30.0)):
        logits = z.to(device).requires_grad_()
        objective = hf.Objective.preset(preset, kl_coef=0.1, entropy_coef=0.1)
        out = hf.policy_loss(
            logits, tokens, advantages, old_logprobs=old - 4, ref_logprobs=c - 4, objective=objective, softcap=softcap,
            backend="triton",
        )  # fmt: skip
        (0.5 * out.loss).backward()
        assert logits.grad is not None
        assert out.entropy is not None
        found += [out.loss.detach(), out.logprobs.detach(), out.entropy.detach(), logits.grad]
    shards = put_together(z.to(device), tokens.to(torch.int32), c, h, LogitTransform(), "triton")
    return [*found, *shards.logprobs, *shards.entropies, shards.gradient]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU")
def test_straight_launches_give_the_bits_of_searched_ones(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Also where a kernel was found for a batch of other shape and values."""
    shapes = (4, 8), (3, 12)  # tensors cut into theirs begin on 16-byte boundaries in both
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_variant", lambda *arguments: None)
        searched = [steps(device, *shape) for shape in shapes]
    monkeypatch.setattr(launch, "_compiled", {})
    steps(device, *shapes[0])
    assert {key[0].__name__ for key in launch._compiled} == {
        "response_statistics_kernel", "token_terms_kernel", "policy_loss_kernel", "token_statistics_kernel",
        "logprob_loss_kernel", "token_gradient_kernel", "scale_gradient_kernel", "combine_statistics_kernel",
        "column_gradient_kernel",
    }  # fmt: skip

    def search(self: Any, *arguments: Any, **options: Any) -> None:
        raise AssertionError(f"{self.fn.__name__} was searched for again")

    monkeypatch.setattr(launch.JITFunction, "run", search)
    for shape, expected in zip(shapes, searched, strict=True):
        for straight, result in zip(steps(device, *shape), expected, strict=True):
            assert torch.isfinite(result).all()
            assert torch.equal(straight, result)
