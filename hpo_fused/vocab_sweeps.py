"""The two sweeps of the torch backend over chunks of rows: shifted sums, and the gradient.

Everything is relative to a shift, so that a chunk needs float32 only: with u = z (or tanh(z / softcap)) and
z' = scale * u, d_j = scale * (u_j - shift) and e_j = exp(d_j). ``eager.py`` turns the results into statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled_rows import LOWEST, compiled_sweeps, scales
from .row_chunks import RowSelection
from .rows import LogitTransform

# Bytes of logits per chunk of the compiled sweeps. The sweeps are bound by arithmetic, not by memory: 2 and 20 MB
# measured alike on an idle machine. On a busy one each chunk costs some barriers between threads, of which one may
# have to wait for its time slice, so that few large chunks are better. Twice this is the most that staging takes.
_COMPILED_CHUNK_BYTES = 20_000_000

# Entries of a float32 working buffer of the plain sweeps; two of them, 16 MiB, stay in a last-level cache. On a GPU
# larger, for a launch must keep it busy.
_PLAIN_CHUNK_ENTRIES = {"cpu": 1 << 21}
_PLAIN_CHUNK_ENTRIES_OTHER = 1 << 22
_PLAIN_CHUNK_ROWS = 1024
_COMPILED_CHUNK_ROWS = 1024

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
            threads = torch.get_num_threads()
            row_bytes = width * logits.element_size()
            rows = _COMPILED_CHUNK_BYTES // row_bytes
            rows = rows // threads * threads or rows
            self.chunk_rows = max(2, min(rows, _COMPILED_CHUNK_ROWS))
            self._constants = scales(transform)
        else:
            entries = _PLAIN_CHUNK_ENTRIES.get(logits.device.type, _PLAIN_CHUNK_ENTRIES_OTHER)
            self.chunk_rows = min(max(1, entries // width), _PLAIN_CHUNK_ROWS)
        self.padded_rows = -(-self.chunk_rows // TOKEN_PADDING) * TOKEN_PADDING
        self._buffers: dict[str, Tensor] = {}
        self._like = logits

    def _buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.zeros(self.chunk_rows, self._like.shape[-1], dtype=dtype, device=self._like.device)
        return self._buffers[name]

    def _padded(self, values: Tensor) -> Tensor:
        result = values.new_zeros(self.padded_rows)
        result[: values.numel()] = values
        return result

    def statistics(self, logits: RowSelection, start: int, stop: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """shift = max u, sum over j != y of e_j, and of e_j * d_j, of rows [start, stop).

        ``tokens`` int64 and the results float32 are [padded_rows]; entries past the rows are of no meaning.
        """
        count = stop - start
        if self.compiled is None:
            results = self._plain_statistics(logits, start, stop, tokens[: self.chunk_rows])
        else:
            rows = logits.view(start, stop) if count > 1 else None
            if rows is None:
                rows = self._staged(logits, start, stop)
            results = self.compiled.statistics(rows, tokens[: rows.shape[0]].to(torch.int32), *self._constants)
        shift, rest, weighted = (self._padded(result) for result in results)
        return shift, rest, weighted

    def gradient(self, logits: RowSelection, out: RowSelection, start: int, stop: int, shift: Tensor, factor: Tensor,
                 slope: Tensor, live: Tensor | None = None) -> None:
        """Writes e_j * (factor - slope * d_j) * softcap's derivative to the rows [start, stop) of ``out``.

        ``shift``, ``factor``, ``slope``: float32 [padded_rows]. Rows where ``live`` (bool [padded_rows]) is False
        get zeros.
        """
        if self.compiled is None:
            gradient = self._plain_gradient(logits, start, stop, shift, factor, slope)
            if live is not None:
                gradient.masked_fill_(~live[: self.chunk_rows, None], 0.0)
            out.store(start, stop, gradient)
            return
        rows = logits.view(start, stop) if stop - start > 1 else None
        if rows is None:
            rows = self._staged(logits, start, stop)
        count = rows.shape[0]
        target = out.view(start, stop) if stop - start > 1 else None
        staged = target is None
        if target is None:
            target = torch.from_dlpack(self._buffer("out", self._like.dtype)[:count])
        per_row = (entry[:count].clone() for entry in (shift, factor, slope))
        self.compiled.gradient(rows, *per_row, *self._constants, target)
        if staged:
            out.store(start, stop, target)

    def _staged(self, logits: RowSelection, start: int, stop: int) -> Tensor:
        """Rows that do not lie side by side, copied; a single one beside a spare one (torch.compile fixes sizes of 1)."""
        buffer = self._buffer("rows", self._like.dtype)
        logits.load(start, stop, buffer)
        return torch.from_dlpack(buffer[: max(2, stop - start)])

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

    def _plain_gradient(self, logits: RowSelection, start: int, stop: int, shift: Tensor, factor: Tensor,
                        slope: Tensor) -> Tensor:
        values = self._buffer("values", torch.float32)
        logits.load(start, stop, values)
        shift, factor, slope = (entry[: self.chunk_rows] for entry in (shift, factor, slope))
        if self.transform.softcap is not None:
            # sech^2 as 4 u / (1 + u)^2: as 1 - tanh^2 it would lose its digits where the cap saturates.
            cap = self._buffer("cap", torch.float32)
            u = torch.abs(values, out=cap).mul_(-2 / self.transform.softcap).exp_()
            factors = 4 * u / (1 + u) ** 2
        differences, _ = self._plain_differences(values, shift)
        exponentials = torch.exp(differences, out=self._buffer("exponentials", torch.float32))
        gradient = differences.mul_(-slope[:, None]).add_(factor[:, None]).mul_(exponentials)
        return gradient if self.transform.softcap is None else gradient.mul_(factors)
