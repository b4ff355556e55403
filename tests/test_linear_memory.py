"""What linear_memory predicts, against what PyTorch's allocator sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused.linear.head import GemmDtypes
from hpo_fused.linear.memory import ChunkPlan

measure = pytest.importorskip("hpo_fused.bench.measure", reason="needs the bench extra")

MIB = 1 << 20
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def step(
    rows: int,
    width: int,
    vocabulary: int,
    device: torch.device,
    *,
    dtype: torch.dtype = BF16,
    tokens: int | None = None,
    autocast: torch.dtype | None = None,
    bias: bool = False,
    hidden_requires_grad: bool = True,
    weight_requires_grad: bool = True,
    objective: str = "grpo",
    clipped: bool = False,
    **options: Any,
) -> Callable[[], list[Tensor | None]]:
    """A call, loss and gradients, that leaves nothing behind but the gradients; ``rows`` of ``tokens`` are active.

    ``clipped``: the ratio of every other row lies outside its bounds, which takes its gradient away.
    """
    tokens = rows if tokens is None else tokens
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 1, width, device=device).to(dtype).requires_grad_(hidden_requires_grad)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    weight.requires_grad_(weight_requires_grad)
    offset = torch.zeros(vocabulary, dtype=dtype, device=device, requires_grad=True) if bias else None
    ids = torch.randint(vocabulary, (tokens, 1), device=device)
    advantages = (torch.arange(tokens, device=device) % (tokens // rows) == 0).float()
    if clipped:
        options["old_logprobs"] = torch.where(torch.arange(tokens, device=device) % 2 == 1, -100.0, 0.0)[:, None]
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None and leaf.requires_grad]

    def run() -> list[Tensor | None]:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            out = hf.linear_policy_loss(hidden, weight, ids, advantages, bias=offset, objective=objective, **options)
        assert int(out.active.sum()) == rows
        out.loss.backward()
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return gradients

    return run


def measured(run: Callable[[], object], device: torch.device) -> int:
    run()  # what is made once, and kept
    peak = measure.peak_extra_bytes(run, device)
    assert peak is not None
    return int(peak)


SHAPES: dict[str, dict[str, Any]] = {
    "one-chunk": {"rows": 64, "width": 64, "vocabulary": 4096},
    "one-chunk-large": {"rows": 512, "width": 64, "vocabulary": 20000},
    "one-chunk-float32": {"rows": 256, "width": 128, "vocabulary": 8000, "dtype": FP32},
    "chunks": {"rows": 256, "width": 256, "vocabulary": 16000, "chunk_rows": 64},
    "chunks-large": {"rows": 1024, "width": 64, "vocabulary": 16000, "chunk_rows": 512},
    "chunks-many": {"rows": 2048, "width": 64, "vocabulary": 4096, "chunk_rows": 128},
    "chunks-float32": {"rows": 256, "width": 128, "vocabulary": 12000, "chunk_rows": 64, "dtype": FP32},
    "chunks-odd": {"rows": 700, "width": 64, "vocabulary": 9001, "chunk_rows": 100, "bias": True},
    "float32-logits": {"rows": 512, "width": 64, "vocabulary": 8000, "chunk_rows": 256, "logits_dtype": FP32},
    "frozen-head": {"rows": 512, "width": 128, "vocabulary": 8000, "chunk_rows": 128, "weight_requires_grad": False},
    "frozen-body": {"rows": 256, "width": 256, "vocabulary": 8000, "chunk_rows": 64, "hidden_requires_grad": False},
    "gathered": {"rows": 256, "tokens": 2048, "width": 256, "vocabulary": 8000, "chunk_rows": 128},
    "gathered-one-chunk": {"rows": 256, "tokens": 1024, "width": 256, "vocabulary": 8000},
    "autocast": {"rows": 256, "width": 256, "vocabulary": 8000, "chunk_rows": 64, "dtype": FP32, "autocast": BF16},
    "small-vocabulary": {"rows": 1024, "width": 64, "vocabulary": 4000, "chunk_rows": 256},
    "clipped": {"rows": 512, "width": 64, "vocabulary": 16000, "chunk_rows": 256, "clipped": True},
    "sequence": {"rows": 256, "width": 128, "vocabulary": 16000, "chunk_rows": 64, "objective": "gspo"},
    "half": {"rows": 512, "width": 128, "vocabulary": 4000, "chunk_rows": 128, "dtype": FP16},
}


@pytest.mark.parametrize("name", SHAPES)
def test_prediction(name: str, device: torch.device) -> None:
    """Never below what is measured, and not far above: by buffers that are not always needed.

    (On the CPU 33 MiB of the torch backend's, of which two of the shapes do need the most, and 8 MiB for slices of
    dweight; elsewhere 64 MiB for those, which only PyTorch 2.8 makes.)
    """
    shape = dict(SHAPES[name])
    rows, width, vocabulary = (shape.pop(key) for key in ("rows", "width", "vocabulary"))
    compute = shape.get("autocast") or shape.get("dtype", BF16)
    dtypes = GemmDtypes.of(compute, shape.get("logits_dtype") or compute, device)
    if "chunk_rows" in shape:
        shape["chunk_bytes"] = shape.pop("chunk_rows") * vocabulary * dtypes.bytes_per_logit
    peak = measured(step(rows, width, vocabulary, device, **shape), device)
    for key in ("objective", "clipped"):
        shape.pop(key, None)
    memory = hf.linear_memory(rows, width, vocabulary, device=device, **shape)
    # CUDA's allocator hands out no less than 512 bytes, of which the smallest shape's per-token tensors fill a part.
    assert peak <= memory.peak + (MIB // 8 if device.type == "cuda" else 0), f"{peak} bytes, predicted {memory.peak}"
    slack = 96 if device.type != "cpu" else 26 if name in ("clipped", "small-vocabulary") else 42
    slack += 24 if dtypes.widened else 0  # three slices, of which the largest is one
    assert memory.peak <= 1.05 * peak + slack * MIB, f"{peak / MIB:.1f} MiB, predicted {memory.peak / MIB:.1f}"
    assert memory.peak <= memory.gradients + memory.accumulator + memory.extra


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_peak_does_not_grow_with_the_rows(objective: str, device: torch.device) -> None:
    """Beyond gradients and accumulator, for chunks of one size."""
    width, vocabulary, chunk = 64, 5000, 256 * 5000 * 2
    extras = []
    for rows in (512, 1024, 2048):
        peak = measured(step(rows, width, vocabulary, device, chunk_bytes=chunk, objective=objective), device)
        memory = hf.linear_memory(rows, width, vocabulary, chunk_bytes=chunk, device=device)
        extras.append(peak - memory.gradients - memory.accumulator)
    assert max(extras) - min(extras) <= 2 * MIB, [f"{extra / MIB:.2f}" for extra in extras]


def test_no_logits(device: torch.device) -> None:
    """What it is for: eight chunks take less than the logits alone would."""
    rows, width, vocabulary = 2048, 64, 16000
    peak = measured(step(rows, width, vocabulary, device, chunk_bytes=256 * vocabulary * 2), device)
    assert peak < rows * vocabulary * 2


def test_no_gradient_needs_a_chunk_only(device: torch.device) -> None:
    rows, width, vocabulary, chunk = 1024, 64, 16000, 128 * 16000 * 2
    hidden = torch.randn(rows, 1, width, device=device, dtype=BF16)
    weight = torch.randn(vocabulary, width, device=device, dtype=BF16)
    ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
    memory = hf.linear_memory(
        rows, width, vocabulary, chunk_bytes=chunk, hidden_requires_grad=False, weight_requires_grad=False,
        device=device,
    )  # fmt: skip
    assert memory.gradients == memory.accumulator == 0
    peak = measured(lambda: hf.linear_token_logprobs(hidden, weight, ids, chunk_bytes=chunk), device)
    assert chunk <= peak <= memory.peak


def test_main_grad_needs_no_accumulator(device: torch.device) -> None:
    rows, width, vocabulary = 256, 256, 16000
    buffer = torch.zeros(vocabulary, width, device=device)
    chunk = 64 * vocabulary * 2
    options = {"chunk_bytes": chunk, "hidden_requires_grad": False}
    plain = measured(step(rows, width, vocabulary, device, **options), device)
    ours = measured(step(rows, width, vocabulary, device, weight_grad=buffer, **options), device)
    memory = hf.linear_memory(rows, width, vocabulary, device=device, **options)
    assert ours < plain - 0.9 * memory.accumulator
    assert buffer.any()


def test_bias_makes_no_float32_copy_of_the_logits(device: torch.device) -> None:
    """Such a copy would be twice the chunk of bfloat16 logits, on top of it."""
    # cuBLASLt, which adds a bias in its epilogue, takes a workspace of 32 MiB: less than a chunk has to be, there.
    rows, vocabulary, workspace = (1024, 5000, 0) if device.type == "cpu" else (1024, 32768, 33 * MIB)
    with_bias, without = (measured(step(rows, 32, vocabulary, device, bias=bias), device) for bias in (True, False))
    assert with_bias <= hf.linear_memory(rows, 32, vocabulary, bias=True, device=device).peak
    assert with_bias - without <= rows * vocabulary * 2 + workspace


# ---------------------------------------------------------------------------------------------------------------
# the plan


LOW = GemmDtypes(BF16, BF16, BF16)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("total", [0, 1, 63, 64, 1000, 1024, 1025, 4096, 10000])
@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 100, 1024, 10**6])
def test_chunks_cover_the_rows_once(total: int, chunk_rows: int | None, kind: str) -> None:
    vocabulary = 50257
    budget = None if chunk_rows is None else chunk_rows * vocabulary * 2 + 5
    plan = ChunkPlan.of(total, vocabulary, 64, LOW, torch.device(kind), budget)
    slices = plan.slices(total)
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(total))
    assert len(slices) == plan.chunks
    largest = chunk_rows if chunk_rows is not None else {"cpu": 1024, "cuda": 4096}[kind]
    assert all(0 < part.stop - part.start <= min(plan.rows, largest) for part in slices)
    assert plan.chunks == -(-total // largest)  # no more than there must be


def test_default_budget() -> None:
    """Never more than 896 MiB, logits and hidden states, whatever the vocabulary."""
    for vocabulary in (1, 1000, 151936, 262144, 10**9):
        for logits in (BF16, FP32):
            row = vocabulary * (2 if logits == BF16 else 6) + 4 * 64
            dtypes = LOW._replace(logits=logits)
            plan = ChunkPlan.of(100_000, vocabulary, 64, dtypes, torch.device("cuda"), None)
            assert plan.rows * row <= max(896 * MIB, row)
            assert plan.rows == 4096 or plan.rows * row > 0.8 * 896 * MIB


def test_default_chunk_of_a_real_head_fits_the_stated_gibibyte() -> None:
    for width, vocabulary in ((3584, 152064), (4096, 151936), (4096, 128256), (3584, 256000)):
        assert hf.linear_memory(16384, width, vocabulary).extra < 1024 * MIB


def test_one_chunk_where_its_logits_take_no_more_than_the_accumulator() -> None:
    """2 H rows of bfloat16 on a GPU: they take what dweight's float32 sum over chunks would."""
    one, chunked = (hf.linear_memory(rows, 4096, 151936) for rows in (8192, 8193))
    assert (one.accumulator, one.chunk) == (0, chunked.accumulator)
    assert one.peak <= chunked.peak + 8192 * 4 * 4096  # a chunk's hidden states and their gradient
    for kept in ({"device": "cpu"}, {"weight_requires_grad": False}, {"autocast": torch.float16}, {"dtype": FP32}):
        assert hf.linear_memory(8192, 4096, 151936, **kept).chunk <= 896 * MIB  # type: ignore[arg-type]


def test_frozen_sides_cost_nothing() -> None:
    full = hf.linear_memory(8192, 64, 32000, chunk_bytes=64 * MIB)
    assert hf.linear_memory(8192, 64, 32000, chunk_bytes=64 * MIB, weight_requires_grad=False).accumulator == 0
    assert full.gradients == 2 * 64 * (8192 + 32000)
    assert full.accumulator == 4 * 64 * 32000
    assert hf.linear_memory(8192, 64, 32000, dtype=FP32).accumulator == 0


def test_memory_under_another_narrow_autocast(device: torch.device) -> None:
    """The gradient's dtype is not the GEMMs': a single chunk, too, is summed in float32 and then cast."""
    memory = hf.linear_memory(64, 512, 150_000, dtype=torch.float16, autocast=torch.bfloat16, device=device)
    assert memory.accumulator == 4 * 512 * 150_000
    same = hf.linear_memory(64, 512, 150_000, dtype=torch.bfloat16, autocast=torch.bfloat16, device=device)
    assert same.accumulator == 0
    assert hf.linear_memory(0, 512, 150_000, dtype=torch.float16, autocast=torch.bfloat16).accumulator == 0


def test_plan_refuses_as_the_call_does() -> None:
    for chunk_bytes, error in ((True, TypeError), (2.5, TypeError), (21, ValueError)):
        with pytest.raises(error, match="chunk_bytes"):
            ChunkPlan.of(8, 11, 4, LOW, torch.device("cpu"), chunk_bytes)
    assert ChunkPlan.of(8, 11, 4, LOW, torch.device("cpu"), 22) == (1, 8)
