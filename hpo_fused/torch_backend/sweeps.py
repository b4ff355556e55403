"""The two sweeps over the vocabulary, a chunk of rows at a time.

A sweep counts from a shift, the row's largest u, so that float32 suffices. With u = z (under a softcap
tanh(z / softcap)), z' = scale * u, d_j = scale * (u_j - shift) and e_j = exp(d_j), y the sampled token:

    first sweep     shift = max_j u_j,  sum over j != y of e_j,  sum over j != y of e_j * d_j
    second sweep    e_j * (factor - slope * d_j), under a softcap times sech^2(z_j / softcap)

``scale`` is softcap / temperature (1 / temperature without a softcap), one for each row.

``softmax.py`` turns the sums into softmax statistics, and these and the gradient coefficients into factor and slope.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from hpo_fused.interface import LogitTransform

from .selected_rows import SelectedRows

# Where -inf is moved, so that 0 * inf appears nowhere: exp(LOWEST - maximum) is still 0, 0 * LOWEST too.
LOWEST = -1e30

# Per-token tensors are padded to a multiple of this: ATen's vector and scalar code for one function may round
# differently, and the scalar one runs on what is left over of a whole number of vectors (2 x 16 floats at most).
TOKEN_PADDING = 64

# Entries of a float32 working buffer of the plain sweeps; two of them, 16 MiB, stay in a last-level cache. On a GPU
# larger, for a launch must keep it busy.
_CHUNK_ENTRIES_CPU = 1 << 21
_CHUNK_ENTRIES_OTHER = 1 << 22
_CHUNK_ROWS = 1024


class Sweeps(ABC):
    """Sweeps over ``chunk_rows`` rows at a time; a row's result does not depend on the other rows.

    Args:
        logits: [B, T, V].
        transform: of the logits.
        chunk_rows: rows at a time.
        buffer_rows: rows of a working buffer.
    """

    def __init__(self, logits: Tensor, transform: LogitTransform, chunk_rows: int, buffer_rows: int) -> None:
        self.logits, self.transform, self.chunk_rows = logits, transform, chunk_rows
        self.padded_rows = -(-chunk_rows // TOKEN_PADDING) * TOKEN_PADDING
        self.buffer_rows = buffer_rows
        self._buffers: dict[str, Tensor] = {}

    def chunks(self, selected: Tensor) -> Iterator[SelectedRows]:
        """The rows of the logits where ``selected`` (bool [B, T]), in chunks."""
        for positions in selected.reshape(-1).nonzero().squeeze(1).split(self.chunk_rows):
            if len(positions) > 0:
                yield SelectedRows(self.logits, positions)

    def padded(self, values: Tensor) -> Tensor:
        """``values`` [..., n] as [..., padded_rows], filled up with zeros."""
        result = values.new_zeros(*values.shape[:-1], self.padded_rows)
        result[..., : values.shape[-1]] = values
        return result

    def gathered(self, values: Tensor, rows: SelectedRows) -> Tensor:
        """The entries of ``values`` [..., B, T] that belong to ``rows``: [..., padded_rows]."""
        return self.padded(values.flatten(-2)[..., rows.positions])

    def temperature(self, rows: SelectedRows, dtype: torch.dtype) -> Tensor:
        """Each row's temperature, [padded_rows]."""
        given = self.transform.temperatures
        if given is not None:
            return self.gathered(given, rows).to(dtype)
        shape, device = (self.padded_rows,), self.logits.device
        return torch.full(shape, self.transform.temperature, dtype=dtype, device=device)

    def buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        """A working buffer [buffer_rows, V], kept from one chunk to the next."""
        if name not in self._buffers:
            shape = (self.buffer_rows, self.logits.shape[-1])
            self._buffers[name] = torch.zeros(shape, dtype=dtype, device=self.logits.device)
        return self._buffers[name]

    @abstractmethod
    def sums(self, rows: SelectedRows, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First sweep: shift and the two sums, float32 [padded_rows].

        Args:
            targets: int64 [padded_rows].
            scale: float32 [padded_rows].
        """

    @abstractmethod
    def gradient(
        self, rows: SelectedRows, out: SelectedRows, shift: Tensor, factor: Tensor, slope: Tensor, scale: Tensor
    ) -> None:
        """Second sweep, into the rows of ``out``; the tensors are float32 [padded_rows]."""


class PlainSweeps(Sweeps):
    """Sweeps in ATen's operations, on any device.

    An operation always gets a whole buffer of rows, whatever the last ones hold: how ATen cuts a sum into parts, and so
    its rounding, depends on the number of rows.
    """

    def __init__(self, logits: Tensor, transform: LogitTransform) -> None:
        entries = _CHUNK_ENTRIES_CPU if logits.device.type == "cpu" else _CHUNK_ENTRIES_OTHER
        rows = min(max(1, entries // logits.shape[-1]), _CHUNK_ROWS)
        super().__init__(logits, transform, rows, rows)

    def _differences(self, values: Tensor, shift: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
        """d in place of z in ``values``, and the shift: the rows' largest u where None is given."""
        softcap = self.transform.softcap
        if softcap is not None:
            values.div_(softcap).tanh_()
        if shift is None:
            shift = values.amax(-1)
        if softcap is None:
            values.clamp_(min=LOWEST)
        values.sub_(shift[:, None]).mul_(scale[: self.chunk_rows, None])
        return values, shift

    def sums(self, rows: SelectedRows, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = rows.load(self.buffer("values", torch.float32))
        # Where tanh would make -1 of -inf. (The gradient vanishes there as it is: so does the derivative of tanh.)
        impossible = None if self.transform.softcap is None else values == -torch.inf
        differences, shift = self._differences(values, None, scale)
        exponentials = torch.exp(differences, out=self.buffer("exponentials", torch.float32))
        exponentials.scatter_(1, targets[: self.chunk_rows, None], 0.0)
        if impossible is not None:
            exponentials.masked_fill_(impossible, 0.0)
        others = exponentials.sum(-1)
        moment = exponentials.mul_(differences).sum(-1)
        return self.padded(shift), self.padded(others), self.padded(moment)

    def gradient(
        self, rows: SelectedRows, out: SelectedRows, shift: Tensor, factor: Tensor, slope: Tensor, scale: Tensor
    ) -> None:
        values = rows.load(self.buffer("values", torch.float32))
        shift, factor, slope = (entry[: self.chunk_rows] for entry in (shift, factor, slope))
        if self.transform.softcap is not None:
            # sech^2 as 4 w / (1 + w)^2: as 1 - tanh^2 it would lose its digits where the cap saturates.
            w = torch.abs(values, out=self.buffer("sech", torch.float32)).mul_(-2 / self.transform.softcap).exp_()
            divisor = torch.add(w, 1, out=self.buffer("exponentials", torch.float32)).square_()
            sech_squared = w.mul_(4).div_(divisor)
        differences, _ = self._differences(values, shift, scale)
        exponentials = torch.exp(differences, out=self.buffer("exponentials", torch.float32))
        gradient = differences.mul_(-slope[:, None]).add_(factor[:, None]).mul_(exponentials)
        out.store(gradient if self.transform.softcap is None else gradient.mul_(sech_squared))
