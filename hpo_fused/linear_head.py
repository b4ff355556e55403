"""The three GEMMs of an LM head over a chunk of rows, and the sums of its gradients over chunks.

    logits[r, V] = x[r, H] weight^T + bias        dhidden[r, H] = g[r, V] weight        dweight[V, H] += g^T x

dweight is summed in float32 and rounded once. Where there is one chunk only, the GEMM's own float32 sum is all there
is to it. Over several chunks the GEMM adds into a float32 accumulator where the device can (``torch.addmm`` with
``out_dtype``); on the CPU each chunk's product comes out of its GEMM rounded to the inputs' dtype, and those are added
in float32: an error of one rounding of each chunk's own contribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .linear_plan import TILE_BYTES

# hidden, weight and bias, or their gradients; None where there is none.
Inputs: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a [B, T, ...] tensor, as many as the host knows of.

    ``positions``: int64 [n], flat b * T + t, ascending among the selected ones. ``selected``: bool [n], False for rows
    that only fill up to a bound the caller gave; None where all are selected. ``everything``: they are all the rows
    there are, in order.
    """

    positions: Tensor
    selected: Tensor | None
    everything: bool

    def __len__(self) -> int:
        return self.positions.numel()

    @classmethod
    def of(cls, chosen: Tensor, count: int, *, exact: bool) -> Rows:
        """The ``count`` rows where ``chosen`` (bool [B, T]) holds, found without a synchronisation.

        ``exact``: count is their number; else it only bounds it, and rows not chosen fill up.
        """
        flat = chosen.reshape(-1)
        if exact and count == flat.numel():
            return cls(torch.arange(count, device=flat.device), None, True)
        positions = flat.logical_not().to(torch.int8).argsort(stable=True)[:count]
        return cls(positions, None if exact else flat[positions], False)

    def take(self, part: slice, entries: Tensor) -> Tensor:
        """Per-token entries [B, T] of the rows in ``part``: contiguous [1, r]."""
        return entries.reshape(-1)[self.positions[part]].unsqueeze(0)

    def put(self, part: slice, whole: Tensor, entries: Tensor) -> None:
        """Writes entries [1, r] to the rows' places in ``whole``, contiguous [B, T]."""
        whole.view(-1).index_copy_(0, self.positions[part], entries.view(-1))

    def hidden(self, part: slice, hidden: Tensor) -> Tensor:
        """The rows' hidden states [r, H], in place where they lie side by side; zeros in rows not selected."""
        if self.everything and hidden.is_contiguous():
            return hidden.view(-1, hidden.shape[-1])[part]
        positions = self.positions[part]
        steps = hidden.shape[1]
        batches = positions.div(max(steps, 1), rounding_mode="floor")
        rows = hidden[batches, positions - batches * steps]
        if self.selected is not None:  # a NaN times their gradient of 0 would still be a NaN in dweight
            rows = torch.where(self.selected[part].unsqueeze(-1), rows, 0)
        return rows


class Float32Gemms(NamedTuple):
    """What a device's GEMMs of bfloat16 (or float16) can do besides rounding: write float32, add into float32."""

    write: bool
    add: bool


_float32_gemms: dict[tuple[torch.device, torch.dtype], Float32Gemms] = {}


def float32_gemms(device: torch.device, dtype: torch.dtype) -> Float32Gemms:
    """Asked once for each device, by trying: CUDA has both (PyTorch 2.8 only the first), the CPU has neither."""
    if (device, dtype) in _float32_gemms:
        return _float32_gemms[device, dtype]
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.empty(16, 16, dtype=torch.float32, device=device)
    write = add = False
    try:
        torch.mm(ones.t(), ones, out_dtype=torch.float32, out=total)
        write = True
        torch.addmm(total, ones.t(), ones, out_dtype=torch.float32, out=total)
        add = True
    except (RuntimeError, TypeError):  # no such kernel on this device, or no such overload
        pass
    able = Float32Gemms(write, add)
    if type(ones) is Tensor:  # a fake tensor can do everything
        _float32_gemms[device, dtype] = able
    return able


def _slices(shape: torch.Size, itemsize: int, device: torch.device) -> Iterator[slice]:
    """A matrix in slices of rows small enough to be made aside."""
    length, width = shape
    step = max(TILE_BYTES[device.type != "cpu"] // max(width * itemsize, 1), 1)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class Head:
    """weight [V, H] and bias [V] in the dtype ``compute`` that the GEMMs run in; logits come out in ``logits``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype, logits: torch.dtype) -> None:
        self.weight = weight.detach().to(compute)
        self.bias = None if bias is None else bias.detach().to(compute)
        self.compute, self.logits_dtype = compute, logits

    def new_logits(self, rows: int) -> Tensor:
        """Room for a chunk's logits, [rows, V]."""
        return self.weight.new_empty((rows, self.weight.shape[0]), dtype=self.logits_dtype)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """out [r, V] = x [r, H] weight^T + bias, rounded once to its dtype."""
        weight = self.weight.t()
        if out.dtype == self.compute:
            if self.bias is None:
                torch.mm(x, weight, out=out)
            else:
                torch.addmm(self.bias, x, weight, out=out)
            return
        if float32_gemms(x.device, self.compute).write:
            torch.mm(x, weight, out_dtype=out.dtype, out=out)
        else:
            x = x.to(out.dtype)
            for part in _slices(self.weight.shape, out.element_size(), x.device):
                torch.mm(x, self.weight[part].to(out.dtype).t(), out=out[:, part])
        if self.bias is not None:
            out.add_(self.bias)


class HeadGradients:
    """Sums over chunks of the gradients that are needed: dhidden, dweight, dbias (None where not).

    Args:
        inputs: hidden, weight and bias, each None where it needs no gradient.
        head: the GEMMs' operands.
        rows: what ``add`` will get in turn, ``chunks`` times.
        into: float32 [V, H] to add dweight to, which is then not returned.
    """

    def __init__(
        self,
        inputs: Inputs,
        head: Head,
        rows: Rows,
        chunks: int,
        into: Tensor | None = None,
    ) -> None:
        self.head, self.rows = head, rows
        hidden, weight, bias = inputs
        self.hidden: Tensor | None = None
        if hidden is not None:
            self.hidden = (torch.empty if rows.everything else torch.zeros)(
                hidden.shape, dtype=hidden.dtype, device=hidden.device
            )
        self.into = into
        self.sums: Tensor | None = None
        self._weight_dtype = None if weight is None else weight.dtype
        self._fresh = True
        if weight is not None and into is None:
            direct = chunks == 0 or (chunks == 1 and weight.dtype == head.compute)
            self.sums = (torch.zeros if chunks == 0 else torch.empty)(
                weight.shape, dtype=weight.dtype if direct else torch.float32, device=weight.device
            )
        self._bias_dtype = None if bias is None else bias.dtype
        self.bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)

    def add(self, part: slice, x: Tensor, gradient: Tensor) -> None:
        """A chunk's contributions: ``x`` [r, H], ``gradient`` [r, V] of its logits."""
        if self.bias is not None:
            # Row by row, a slice at a time: the CPU makes a float32 copy of what it sums.
            for rows in _slices(gradient.shape, 4, gradient.device):
                self.bias.add_(gradient[rows].sum(0, dtype=torch.float32))
        gradient = gradient.to(self.head.compute)
        if self.hidden is not None:
            self._add_hidden(part, gradient)
        if self.into is not None:
            _accumulate(self.into, gradient, x, fresh=False)
        elif self.sums is not None:
            _accumulate(self.sums, gradient, x, fresh=self._fresh)
            self._fresh = False

    def _add_hidden(self, part: slice, gradient: Tensor) -> None:
        assert self.hidden is not None
        flat = self.hidden.view(-1, self.hidden.shape[-1])
        if self.rows.everything and flat.dtype == gradient.dtype:
            torch.mm(gradient, self.head.weight, out=flat[part])
        else:
            product = torch.mm(gradient, self.head.weight)
            flat.index_copy_(0, self.rows.positions[part], product.to(flat.dtype))

    def finish(self) -> Inputs:
        """dhidden, dweight, dbias in their inputs' dtypes; called once, when the chunks' logits are released."""
        weight = self.sums
        if weight is not None:
            assert self._weight_dtype is not None
            weight = weight.to(self._weight_dtype)
        bias = self.bias
        if bias is not None:
            assert self._bias_dtype is not None
            bias = bias.to(self._bias_dtype)
        return self.hidden, weight, bias


def _accumulate(total: Tensor, gradient: Tensor, x: Tensor, *, fresh: bool) -> None:
    """total [V, H] = (``fresh``) or += gradient^T [V, r] x [r, H]."""
    transposed = gradient.t()
    if total.dtype == x.dtype:
        if fresh:
            torch.mm(transposed, x, out=total)
        else:
            torch.addmm(total, transposed, x, out=total)
        return
    able = float32_gemms(x.device, x.dtype)
    if able.write and fresh:
        torch.mm(transposed, x, out_dtype=total.dtype, out=total)
    elif able.add:
        torch.addmm(total, transposed, x, out_dtype=total.dtype, out=total)
    else:
        for part in _slices(total.shape, total.element_size(), total.device):
            rows = transposed[part]
            product = torch.mm(rows, x, out_dtype=total.dtype) if able.write else torch.mm(rows, x)
            if fresh:
                total[part].copy_(product)
            else:
                total[part].add_(product)
