"""The two sweeps of the torch backend over chunks of rows: shifted sums, and the gradient.

Everything is relative to a shift, so that a chunk needs float32 only: with u = z (or tanh(z / softcap)) and
z' = scale * u, d_j = scale * (u_j - shift) and e_j = exp(d_j). ``eager.py`` turns the results into statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .compiled_rows import LOWEST, compiled_sweeps, scales
from .row_chunks import RowSelection
from .rows import LogitTransform

# Bytes of logits per chunk of the compiled sweeps, which need no buffers. They are bound by arithmetic, not by
# memory: 1024 x 151936 bfloat16 took 10% longer in chunks that fit the cache (20 MB) than in one. Each chunk costs
# some 0.3 ms of small operations and some barriers between threads; with other processes on the cores, where a
# barrier waits for a time slice, 20 MB took twice as long.
_COMPILED_CHUNK_BYTES = 320_000_000

# Per-token functions stay below ATen's parallelisation grain of 32768 entries (see TOKEN_PADDING).
_COMPILED_CHUNK_ROWS = 16384

# Bytes of a staging buffer, for rows that do not lie side by side; at most two are in use.
_STAGING_BYTES = 16_000_000

# Entries of a float32 working buffer of the plain sweeps; two of them, 16 MiB, stay in a last-level cache. On a GPU
# larger, for a launch must keep it busy.
_PLAIN_CHUNK_ENTRIES = {"cpu": 1 << 21}
_PLAIN_CHUNK_ENTRIES_OTHER = 1 << 22
_PLAIN_CHUNK_ROWS = 1024

# Per-token tensors are padded to a multiple of this: ATen's vector and scalar code for one function may round
# differently, and the scalar one runs on what is left over of a whole number of vectors (2 x 16 floats at most).
TOKEN_PADDING = 64


class Sweeps:
    """Sweeps over rows of ``logits`` [B, T, V], ``chunk_rows`` at a time; per-token tensors are ``padded_rows`` long.

    A row's result does not depend on the other rows: the compiled functions run the same code for any number of
    rows, and the plain ones always get a whole buffer of ``chunk_rows`` rows, whatever its last ones hold.
    """

    def __init__(self, logits: Tensor, transform: LogitTransform) -> None:
        width = logits.shape[-1]
        self.transform = transform
        self.compiled = compiled_sweeps(logits, transform)
        if self.compiled is not None:
            row_bytes = width * logits.element_size()
            self.chunk_rows = min(max(2, _COMPILED_CHUNK_BYTES // row_bytes), _COMPILED_CHUNK_ROWS)
            self._staging_rows = min(max(2, _STAGING_BYTES // row_bytes), self.chunk_rows)
            self._constants = scales(transform)
        else:
            entries = _PLAIN_CHUNK_ENTRIES.get(logits.device.type, _PLAIN_CHUNK_ENTRIES_OTHER)
            self.chunk_rows = self._staging_rows = min(max(1, entries // width), _PLAIN_CHUNK_ROWS)
        self.padded_rows = -(-self.chunk_rows // TOKEN_PADDING) * TOKEN_PADDING
        self._buffers: dict[str, Tensor] = {}
        self._like = logits

    def _buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._buffers:
            shape, device = (self._staging_rows, self._like.shape[-1]), self._like.device
            self._buffers[name] = torch.zeros(shape, dtype=dtype, device=device)
        return self._buffers[name]

    def _padded(self, values: Tensor) -> Tensor:
        result = values.new_zeros(self.padded_rows)
        result[: values.numel()] = values
        return result

    def statistics(self, logits: RowSelection, start: int, stop: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """shift = max u, sum over j != y of e_j, and of e_j * d_j, of rows [start, stop).

        ``tokens`` int64 and the results float32 are [padded_rows]; entries past the rows are of no meaning.
        """
        if self.compiled is None:
            results = self._plain_statistics(logits, start, stop, tokens[: self.chunk_rows])
        else:
            parts = []
            for first, last in self._pieces(start, stop, logits):
                rows = self._rows(logits, first, last)
                ids = tokens[first - start : first - start + rows.shape[0]].to(torch.int32)
                part = self.compiled.statistics(rows, ids, *self._constants)
                parts.append([entry[: last - first] for entry in part])
            results = tuple(torch.cat(entries) for entries in zip(*parts, strict=True))
        shift, rest, weighted = (self._padded(result) for result in results)
        return shift, rest, weighted

    def gradient(
        self,
        logits: RowSelection,
        out: RowSelection,
        start: int,
        stop: int,
        shift: Tensor,
        factor: Tensor,
        slope: Tensor,
        live: Tensor | None = None,
    ) -> None:
        """Writes e_j * (factor - slope * d_j) * softcap's derivative to the rows [start, stop) of ``out``.

        ``shift``, ``factor``, ``slope``: float32 [padded_rows]. Rows where ``live`` (bool [padded_rows]) is False
        get zeros; only the plain sweeps take it.
        """
        if self.compiled is None:
            gradient = self._plain_gradient(logits, start, stop, shift, factor, slope)
            if live is not None:
                gradient.masked_fill_(~live[: self.chunk_rows, None], 0.0)
            out.store(start, stop, gradient)
            return
        assert live is None
        for first, last in self._pieces(start, stop, logits, out):
            rows = self._rows(logits, first, last)
            count = rows.shape[0]
            target = out.view(first, last) if last - first > 1 else None
            written = target
            if written is None:
                written = from_dlpack(self._buffer("out", self._like.dtype)[:count])
            per_row = (entry[first - start : first - start + count].clone() for entry in (shift, factor, slope))
            self.compiled.gradient(rows, *per_row, *self._constants, written)
            if target is None:
                out.store(first, last, written)

    def _pieces(self, start: int, stop: int, *selections: RowSelection) -> list[tuple[int, int]]:
        """Rows [start, stop) in one piece where they lie side by side, else in pieces that can be staged."""
        if stop - start > 1 and all(selection.view(start, stop) is not None for selection in selections):
            return [(start, stop)]
        step = self._staging_rows
        return [(first, min(first + step, stop)) for first in range(start, stop, step)]

    def _rows(self, logits: RowSelection, start: int, stop: int) -> Tensor:
        """Rows as a contiguous [n, V] tensor, n >= 2: torch.compile would make another program for one row."""
        rows = logits.view(start, stop) if stop - start > 1 else None
        if rows is not None:
            return rows
        buffer = self._buffer("rows", self._like.dtype)
        logits.load(start, stop, buffer)
        return from_dlpack(buffer[: max(2, stop - start)])

    def _plain_differences(self, values: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """values [chunk_rows, V] of z become d, in place; the shift is the rows' maximum where none is given."""
        softcap = self.transform.softcap
        if softcap is not None:
            values.div_(softcap).tanh_()
        if shift is None:
            shift = values.amax(-1)
        if softcap is None:
            values.clamp_(min=LOWEST)
        values.sub_(shift[:, None]).mul_((softcap or 1.0) / self.transform.temperature)
        return values, shift

    def _plain_statistics(self, logits: RowSelection, start: int, stop: int, tokens: Tensor) -> tuple[Tensor, ...]:
        values = self._buffer("values", torch.float32)
        logits.load(start, stop, values)
        differences, shift = self._plain_differences(values, None)
        exponentials = torch.exp(differences, out=self._buffer("exponentials", torch.float32))
        exponentials.scatter_(1, tokens[:, None], 0.0)
        rest = exponentials.sum(-1)
        return shift, rest, exponentials.mul_(differences).sum(-1)

    def _plain_gradient(
        self, logits: RowSelection, start: int, stop: int, shift: Tensor, factor: Tensor, slope: Tensor
    ) -> Tensor:
        values = self._buffer("values", torch.float32)
        logits.load(start, stop, values)
        shift, factor, slope = (entry[: self.chunk_rows] for entry in (shift, factor, slope))
        if self.transform.softcap is not None:
            # sech^2 as 4 u / (1 + u)^2: as 1 - tanh^2 it would lose its digits where the cap saturates.
            cap = self._buffer("cap", torch.float32)
            u = torch.abs(values, out=cap).mul_(-2 / self.transform.softcap).exp_()
            divisor = torch.add(u, 1, out=self._buffer("exponentials", torch.float32)).square_()
            factors = u.mul_(4).div_(divisor)
        differences, _ = self._plain_differences(values, shift)
        exponentials = torch.exp(differences, out=self._buffer("exponentials", torch.float32))
        gradient = differences.mul_(-slope[:, None]).add_(factor[:, None]).mul_(exponentials)
        return gradient if self.transform.softcap is None else gradient.mul_(factors)
