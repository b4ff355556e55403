"""How the linear path cuts its rows into chunks, and what memory that takes.

The budget. A chunk's logits are R x V. Its GEMMs take 6 R H V flops at F flop/s, and adding its part to dweight's
float32 accumulator reads and writes 8 V H bytes at B bytes/s, so that accumulating costs (4 / 3) (F / B) / R of the
GEMMs, whatever V and H are. An H200 (790 TFLOP/s, 4.3 TB/s) spends 6% on it at R = 4096; two CPU cores (0.4 TFLOP/s,
25 GB/s) spend 2% at R = 1024. More rows buy little, fewer cost time: the default budget is that many rows, but never
more than 896 MiB with their hidden states, which leaves 128 MiB of a GiB to everything else. On a GPU, though, all rows
make one chunk where its logits take no more than the accumulator that it spares, since a single GEMM writes dweight
itself: up to 2 H rows in bfloat16 (an H200, 8192 rows, H = 4096: 1.06 times the bare GEMMs' time in one chunk, 1.11 in
two).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hpo_fused.checks import LOGIT_DTYPES, check_integer, described

from .head import TILE_BYTES, GemmDtypes

_MIB = 1 << 20
_DEFAULT_ROWS = {"cpu": 1024}
_DEFAULT_ROWS_ELSEWHERE = 4096
_DEFAULT_LARGEST = 896 * _MIB

# Chunks are evenly sized, to a multiple of what GEMM kernels tile rows by.
_ROW_MULTIPLE = 128

# Per-token tensors of a call: terms, masks, row order, statistics.
_PER_TOKEN_BYTES = 256

# What the torch backend works with on the CPU: three float32 buffers of 8 MiB (V < 4096), or two of 16 MB to stage
# rows between which others have no gradient; and small change. The kernels need nothing.
_BACKEND_BYTES = {"cpu": 33 * _MIB}


def _row_bytes(hidden_size: int, dtypes: GemmDtypes, dtype: torch.dtype) -> int:
    """A row's hidden states as an operand, their gradient, and what either is cast from or to in ``dtype``."""
    return hidden_size * (2 * dtypes.arithmetic.itemsize + (dtype.itemsize if dtype != dtypes.arithmetic else 0))


def accumulator_bytes(entries: int, dtype: torch.dtype, dtypes: GemmDtypes) -> int:
    """Bytes of dweight's float32 sum over chunks which a single chunk, whose GEMM writes ``dtype`` itself, spares."""
    return 4 * entries if dtype.itemsize < 4 and dtype == dtypes.operands else 0


class ChunkPlan(NamedTuple):
    """``chunks`` chunks of ``rows`` rows; the last may be smaller."""

    rows: int
    chunks: int

    @classmethod
    def of(
        cls, total: int, vocabulary: int, hidden_size: int, dtypes: GemmDtypes, device: torch.device,
        chunk_bytes: int | None, accumulator: int = 0,
    ) -> ChunkPlan:  # fmt: skip
        """The plan for ``total`` rows.

        ``chunk_bytes`` is for logits alone; the default budget counts a row's hidden states (gathered, and their
        gradient) as well. ``accumulator``: bytes that more chunks than one take for dweight's sum.

        Raises:
            TypeError, ValueError: chunk_bytes not an int, or less than one row.
        """
        logits = max(vocabulary, 1) * dtypes.bytes_per_logit  # a rank may have no row of the head
        if chunk_bytes is None:
            largest = max(_DEFAULT_LARGEST // (logits + _row_bytes(hidden_size, dtypes, dtypes.operands)), 1)
            largest = min(largest, _DEFAULT_ROWS.get(device.type, _DEFAULT_ROWS_ELSEWHERE))
            if device.type != "cpu" and total * logits <= accumulator:
                largest = max(largest, total)
        elif check_integer("chunk_bytes", chunk_bytes, "an int or None") < logits:
            raise ValueError(
                f"chunk_bytes: expected at least one row of logits, {logits} bytes at V = {vocabulary}, got "
                f"{chunk_bytes}"
            )
        else:
            largest = int(chunk_bytes) // logits
        count = max(-(-total // largest), 1)
        even = -(-total // count)
        rows = min(-(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE, largest) if count > 1 else even
        return cls(rows, -(-total // rows) if rows else 0)

    def slices(self, total: int) -> list[slice]:
        """The chunks of ``total`` rows."""
        return [slice(start, min(start + self.rows, total)) for start in range(0, total, max(self.rows, 1))]


class LinearMemory(NamedTuple):
    """Bytes that a call of :func:`linear_policy_loss` takes; symbols as in :func:`linear_memory`.

    Attributes:
        gradients: ``tokens`` H s + V H s, for a bias V (s + 4) more; of inputs that need one.
        accumulator: dweight in float32, 4 V H, where s < 4 and either n > R or the GEMMs' dtype is another.
        chunk: R V l for logits, and R V c more where l is another.
        working: 2 R H c for gathered rows (+ R H s under autocast), V H c for autocast's copy of the weight, 256 bytes
            a token; a slice of dweight where the GEMMs cannot add it up in float32 (8 MiB on a CPU, 64 elsewhere), and
            on a CPU up to 33 MiB of buffers. Where operands are widened, c is 4, and three slices replace copies in c.
        peak: all that is held at once at the worst moment, at most the sum of the above.
    """

    gradients: int
    accumulator: int
    chunk: int
    working: int
    peak: int

    @property
    def extra(self) -> int:
        """Peak beyond the gradients and the accumulator, at most ``chunk + working``."""
        return self.chunk + self.working


def linear_memory(
    rows: int, hidden_size: int, vocabulary: int, *, tokens: int | None = None, dtype: torch.dtype = torch.bfloat16,
    autocast: torch.dtype | None = None, logits_dtype: torch.dtype | None = None, chunk_bytes: int | None = None,
    bias: bool = False, hidden_requires_grad: bool = True, weight_requires_grad: bool = True,
    device: str | torch.device = "cuda",
) -> LinearMemory:  # fmt: skip
    """An upper bound of the memory that :func:`linear_policy_loss` allocates beyond its inputs, without running it.

    In :class:`LinearMemory`'s formulas n is ``rows``, R the rows of a chunk, and s, c and l are the bytes of ``dtype``,
    of the GEMMs' dtype and of the logits'.

    The chunk is released before the accumulator is cast to the gradient, so that they never add up. Not counted: the
    gathered copy of a sharded weight and its gradient (2 V H s), the torch backend's buffers on a GPU, and with
    ``keep`` a slice (8 MiB on a CPU, 64 elsewhere) and l bytes for each listed id.

    Args:
        rows: rows that enter the GEMMs: the active ones.
        hidden_size, vocabulary: H and V.
        tokens: rows of ``hidden``, masked and inactive ones included; None: as many as ``rows``.
        dtype: of hidden, weight and gradients.
        autocast: torch.autocast's dtype, which the GEMMs then run in; None: not under autocast.
        logits_dtype, chunk_bytes: as given to the call.
        bias, hidden_requires_grad, weight_requires_grad: which gradients there are.
        device: where it will run; the default budget depends on its type. A CPU is taken to be this machine's.

    Raises:
        TypeError, ValueError: a dtype or chunk_bytes that the call would refuse, or a size or device that cannot be.

    Examples:
        >>> memory = linear_memory(16384, 3584, 152064)  # a 7B model's head, bfloat16, on a GPU
        >>> memory.accumulator / 2**30, round(memory.extra / 2**30, 2)
        (2.0302734375, 0.9)
    """
    tokens = rows if tokens is None else tokens
    for name, value in (("rows", rows), ("hidden_size", hidden_size), ("vocabulary", vocabulary), ("tokens", tokens)):
        least = 1 if name in ("hidden_size", "vocabulary") else 0
        if check_integer(name, value) < least:
            raise ValueError(f"{name}: expected a count >= {least}, got {value}")
    rows, hidden_size, vocabulary, tokens = int(rows), int(hidden_size), int(vocabulary), int(tokens)
    operands = dtype if autocast is None else autocast
    logits = operands if logits_dtype is None else logits_dtype
    for name, kind in (("dtype", dtype), ("autocast", operands), ("logits_dtype", logits)):
        if kind not in LOGIT_DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {described(kind)}")
    if logits not in (torch.float32, operands):
        raise TypeError(f"logits_dtype: expected None, torch.float32 or the GEMMs' own {operands}, got {logits}")
    try:
        place = torch.device(device)
    except RuntimeError as error:  # whose message names no argument
        raise ValueError(f"device: expected one of PyTorch's, such as 'cpu' or 'cuda', got {device!r}") from error
    dtypes = GemmDtypes.of(operands, logits, place)
    size, head = dtype.itemsize, hidden_size * vocabulary
    accumulator = accumulator_bytes(head, dtype, dtypes) if weight_requires_grad else 0
    plan = ChunkPlan.of(rows, vocabulary, hidden_size, dtypes, place, chunk_bytes, accumulator)

    # A single GEMM can write the gradient itself, if that has its dtype.
    accumulated = weight_requires_grad and size < 4 and rows > 0 and (plan.chunks > 1 or operands != dtype)
    accumulator = 4 * head if accumulated else 0
    of_hidden = tokens * hidden_size * size if hidden_requires_grad else 0
    of_weight = head * size if weight_requires_grad else 0
    of_bias = vocabulary * (size + 4) if bias else 0
    chunk = plan.rows * vocabulary * dtypes.bytes_per_logit
    tile = TILE_BYTES[place.type != "cpu"]
    working = _PER_TOKEN_BYTES * tokens + _BACKEND_BYTES.get(place.type, 0)
    working += plan.rows * _row_bytes(hidden_size, dtypes, dtype)
    if dtypes.widened:
        working += 3 * tile
    elif operands != dtype:
        working += head * operands.itemsize
    if (weight_requires_grad and (accumulated or operands != dtype) and not dtypes.widened) or bias:
        working += tile
    sums = accumulator if accumulated else of_weight
    peak = of_hidden + of_bias + working + max(chunk + sums, accumulator + of_weight)
    return LinearMemory(of_hidden + of_weight + of_bias, accumulator, chunk, working, peak)
