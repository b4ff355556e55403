"""The vocabulary sweeps on the CPU, compiled by torch.compile (Inductor's C++ code).

They serve CPU tensors with V >= ``MINIMUM_WIDTH`` where a C++ compiler works. The environment variable
``HPO_FUSED_CPU_COMPILE`` overrides: "0" never compiles; "1" makes a failing compilation raise, where otherwise the
plain sweeps silently take over for the rest of the process. The choice depends on V, dtype and device, never on the
number of rows: the two implementations round differently, and a row's result must not depend on the other rows. For
the same reason each function is compiled once per (dtype, softcap or not, threads) with n and V as run-time values,
and always on the same example, whatever the first call's shapes.

The first use takes some seconds of compilation; Inductor keeps the result on disk for later processes.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hpo_fused.interface import LogitTransform

from .selected_rows import SelectedRows
from .sweeps import LOWEST, PlainSweeps, Sweeps

ENVIRONMENT_VARIABLE = "HPO_FUSED_CPU_COMPILE"

# Below this a chunk takes milliseconds in any case, and toy vocabularies should not wait for a compiler.
MINIMUM_WIDTH = 4096

# Columns per partial sum. Inductor's own sum over a whole row adds thousands of values to one accumulator: its
# relative error reached 2e-5 on bfloat16 rows of 151936, in blocks of 1024 (64 additions per vector lane) 3e-7.
_BLOCK = 1024

# Bytes of logits per chunk; the compiled functions need no buffers. They are bound by arithmetic, not by memory:
# 1024 x 151936 bfloat16 took 10% longer in chunks that fit the cache (20 MB) than in one. Each chunk costs some 0.3 ms
# of small operations and some barriers between threads; with other processes on the cores, where a barrier waits for a
# time slice, 20 MB took twice as long.
_CHUNK_BYTES = 320_000_000

# Per-token functions stay below ATen's parallelisation grain of 32768 entries (see TOKEN_PADDING).
_CHUNK_ROWS = 16384

# Bytes of a staging buffer, for rows that do not lie side by side; at most two are in use.
_STAGING_BYTES = 16_000_000


def _differences(rows: Tensor, shift: Tensor, scale: Tensor, softcap: Tensor, capped: bool) -> Tensor:
    """z' - scale * shift, as scale * (u - shift).

    Rounding ``scale`` then matters only as far as a logit lies below the maximum, where it would otherwise shift
    log-probabilities in proportion to the logits themselves.
    """
    z = rows.to(torch.float32)
    u = _tanh(z, softcap) if capped else torch.clamp_min(z, LOWEST)
    return (u - shift) * scale


def _tanh(z: Tensor, softcap: Tensor) -> Tensor:
    """tanh(z / softcap) = 1 - 2 / (1 + exp(2 z / softcap)), to a rounding of 1.

    Inductor's own tanh is a library call that costs more than all else in the sweep. The exponential is used once, as
    Inductor would write one that is used twice to an [n, V] buffer; for the same reason whoever needs the result twice
    writes it out twice (equal expressions in one loop become one again).
    """
    return 1.0 - 2.0 / (1.0 + torch.exp(z * (2.0 / softcap)))


def _partial_sums(rows: Tensor, targets: Tensor, scale: Tensor, softcap: Tensor, capped: bool) -> tuple[Tensor, ...]:
    """shift = max u [n]; sums over j != y of e_j and of e_j * d_j, by block [n, blocks], and of the last block [n].

    d = scale * (u - shift), e = exp(d). The blocks are not added up here because Inductor gives each addition a
    barrier between threads of its own, at which a busy machine waits for a time slice.
    """
    count, width = rows.shape
    blocks = (width - 1) // _BLOCK
    shift = rows.to(torch.float32).amax(-1)  # u grows with z
    if capped:
        shift = _tanh(shift, softcap)
    column = torch.arange(_BLOCK, dtype=torch.int32)
    body = rows[:, : blocks * _BLOCK].view(count, blocks, _BLOCK)
    excluded = column == (targets[:, None] - _BLOCK * torch.arange(blocks, dtype=torch.int32))[:, :, None]
    end = rows[:, width - _BLOCK :]
    # The last block reaches back over columns already counted: a block of V mod 1024 columns would be another
    # program where that is 0 or 1.
    last = column + (width - _BLOCK)
    excluded_end = (last < blocks * _BLOCK) | (last == targets[:, None])
    if capped:  # where tanh would make -1 of -inf
        excluded, excluded_end = excluded | (body == -torch.inf), excluded_end | (end == -torch.inf)
    per_block = (shift[:, None, None], scale[:, None, None], softcap, capped)
    # Written out twice: used twice, Inductor would keep the exponentials in an [n, V] buffer and read them again.
    exponential = torch.exp(_differences(body, *per_block))
    others = torch.where(excluded, 0.0, exponential).sum(-1)
    difference = _differences(body, *per_block)
    again = _differences(body, *per_block)
    moment = torch.where(excluded, 0.0, torch.exp(difference) * again).sum(-1)
    difference = _differences(end, shift[:, None], scale[:, None], softcap, capped)
    exponential = torch.where(excluded_end, 0.0, torch.exp(difference))
    return shift, others, moment, exponential.sum(-1), (exponential * difference).sum(-1)


def _sech_squared(rows: Tensor, softcap: Tensor) -> Tensor:
    """The derivative of tanh, as 4 w / (1 + w)^2: as 1 - tanh^2 it would lose its digits where the cap saturates."""
    w = torch.exp(-2.0 * torch.abs(rows.to(torch.float32) / softcap))
    return 4.0 * w / ((1.0 + w) * (1.0 + w))


def _gradient(
    rows: Tensor,
    shift: Tensor,
    factor: Tensor,
    slope: Tensor,
    scale: Tensor,
    softcap: Tensor,
    out: Tensor,
    capped: bool,
) -> None:
    """out = e_j * (factor - slope * d_j), times the softcap's derivative."""
    difference = _differences(rows, shift[:, None], scale[:, None], softcap, capped)
    gradient = torch.exp(difference) * (factor[:, None] - slope[:, None] * difference)
    if capped:
        gradient = gradient * _sech_squared(rows, softcap)
    out.copy_(gradient)


class _CompiledFunctions(NamedTuple):
    """``partial_sums(rows, targets, scale, softcap)``, ``gradient(rows, shift, factor, slope, scale, softcap, out)``.

    rows and out are contiguous [n, V] with n >= 2, targets int32 [n], softcap float32 0-d (a plain number would be
    compiled in), all others float32 [n]; none of them a view, because Dynamo would put guards on the shape of its base.
    """

    partial_sums: Callable[..., tuple[Tensor, ...]]
    gradient: Callable[..., None]

    def sums(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """shift = max u, sum over j != y of e_j, and of e_j * d_j: float32 [n]."""
        shift, others, moment, last_others, last_moment = self.partial_sums(*arguments)
        others, moment = others.sum(-1, dtype=torch.float64), moment.sum(-1, dtype=torch.float64)
        return shift, (others + last_others).to(torch.float32), (moment + last_moment).to(torch.float32)


class CompiledSweeps(Sweeps):
    """Sweeps in compiled functions, which run the same code for any number of rows."""

    def __init__(self, logits: Tensor, transform: LogitTransform, functions: _CompiledFunctions) -> None:
        row_bytes = logits.shape[-1] * logits.element_size()
        chunk_rows = min(max(2, _CHUNK_BYTES // row_bytes), _CHUNK_ROWS)
        super().__init__(logits, transform, chunk_rows, min(max(2, _STAGING_BYTES // row_bytes), chunk_rows))
        self._functions = functions
        self._softcap = torch.tensor(transform.softcap or 1.0, dtype=torch.float32)

    def _pieces(self, *selections: SelectedRows) -> Iterator[tuple[int, tuple[SelectedRows, ...]]]:
        """First row and selections of all rows where they lie side by side, else of pieces that can be staged."""
        count = len(selections[0])
        in_place = all(selection.contiguous() is not None for selection in selections)
        if count <= self.buffer_rows or in_place:
            yield 0, selections
            return
        for first in range(0, count, self.buffer_rows):
            piece = slice(first, first + self.buffer_rows)
            yield first, tuple(selection.part(piece) for selection in selections)

    def _staged(self, rows: SelectedRows, name: str) -> tuple[Tensor, bool]:
        """A contiguous [n, V] tensor for ``rows``, and whether it is the named buffer and not the rows in place.

        n >= 2: torch.compile would make another program for one row.
        """
        in_place = rows.contiguous() if len(rows) > 1 else None
        if in_place is not None:
            return in_place, False
        return from_dlpack(self.buffer(name, self.logits.dtype)[: max(2, len(rows))]), True

    def _loaded(self, rows: SelectedRows) -> Tensor:
        values, staged = self._staged(rows, "rows")
        return rows.load(values) if staged else values

    def sums(self, rows: SelectedRows, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, others, moment = whole = torch.zeros(3, self.padded_rows, dtype=torch.float32)
        for first, (piece,) in self._pieces(rows):
            values = self._loaded(piece)
            part = slice(first, first + len(values))
            made = self._functions.sums(values, targets[part].to(torch.int32), scale[part].clone(), self._softcap)
            for result, entries in zip(whole, made, strict=True):
                result[first : first + len(piece)] = entries[: len(piece)]
        return shift, others, moment

    def gradient(
        self, rows: SelectedRows, out: SelectedRows, shift: Tensor, factor: Tensor, slope: Tensor, scale: Tensor
    ) -> None:
        for first, (piece, out_piece) in self._pieces(rows, out):
            values = self._loaded(piece)
            gradient, staged = self._staged(out_piece, "gradient")
            per_row = (entry[first : first + len(values)].clone() for entry in (shift, factor, slope, scale))
            self._functions.gradient(values, *per_row, self._softcap, gradient)
            if staged:
                out_piece.store(gradient)


_lock = threading.Lock()
_compiled: dict[tuple[torch.dtype, bool, int], _CompiledFunctions | None] = {}  # None: it failed


def sweeps_for(logits: Tensor, transform: LogitTransform) -> Sweeps:
    """Compiled sweeps over ``logits`` [B, T, V] where they can serve, else plain ones.

    Raises:
        Exception: what torch.compile raised, where the environment variable is "1".
    """
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if setting == "0" or logits.device.type != "cpu" or logits.shape[-1] < MINIMUM_WIDTH:
        return PlainSweeps(logits, transform)
    # Threads: Dynamo would compile anew when their number changes, and give up after some times.
    key = (logits.dtype, transform.softcap is not None, torch.get_num_threads())
    insist = setting == "1"
    with _lock:
        if key not in _compiled or (insist and _compiled[key] is None):
            try:
                _compiled[key] = _compile(*key)
            except Exception:
                if insist:
                    raise
                _compiled[key] = None
        functions = _compiled[key]
    return PlainSweeps(logits, transform) if functions is None else CompiledSweeps(logits, transform, functions)


def _compile(dtype: torch.dtype, capped: bool, threads: int) -> _CompiledFunctions:
    functions = _CompiledFunctions(_isolated(_partial_sums, capped), _isolated(_gradient, capped))
    # No two of these sizes may be equal, nor small: Dynamo takes equal sizes for the same one and compiles 0 and 1
    # in. Enough rows for all threads, because Inductor decides from the example over what to run them.
    count, width = max(64, 4 * threads), 2 * MINIMUM_WIDTH + 8
    rows = torch.empty(count, width, dtype=dtype)
    rows.copy_(torch.linspace(-4.0, 4.0, count * width).view(count, width))
    out = torch.zeros_like(rows)
    targets = torch.arange(count, dtype=torch.int32)
    scale, softcap = torch.linspace(0.5, 2.0, count, dtype=torch.float32), torch.tensor(3.0, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shift, others, _ = functions.sums(rows, targets, scale, softcap)
        functions.gradient(rows, shift, -1 / others, torch.zeros_like(others), scale, softcap, out)
    differences = _differences(rows, shift[:, None], scale[:, None], softcap, capped)
    expected = differences.exp() / -others[:, None]
    if capped:
        expected = expected * _sech_squared(rows, softcap)
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=1e-6)
    differences[torch.arange(count), targets.long()] = -torch.inf
    torch.testing.assert_close(others, differences.exp().sum(-1), rtol=1e-4, atol=0)
    return functions


def _isolated(function: Callable[..., Any], capped: bool) -> Callable[..., Any]:
    """torch.compile of a copy of ``function``: Dynamo counts (and limits) compilations by code object."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(_compiled)}")
    copy = FunctionType(code, function.__globals__, function.__name__, (capped,), function.__closure__)
    return torch.compile(copy, dynamic=True, fullgraph=True)
