"""Rows of a [B, T, V] tensor, wherever they lie in memory.

A strided view such as ``logits[:, :-1]`` or a sparse selection of rows is never made contiguous as a whole: that would
be the [N, V] temporary that the library exists to avoid. On the CPU a row is found by its offset in memory; rows that
lie side by side are used in place, others are copied run by run. On other devices, where the offsets are not known
without a synchronisation, rows are gathered by index.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.utils.dlpack import from_dlpack


def by_offset(tensor: Tensor) -> bool:
    """Whether rows of ``tensor`` are found by their offsets rather than gathered by index."""
    return tensor.device.type == "cpu"


def memory_of(tensor: Tensor) -> Tensor:
    """A tensor over the memory of ``tensor`` that shares neither its version counter nor its autograd history.

    The autograd function that asked for a gradient in place moves the logits' version itself, when it may: a view whose
    version moved earlier would lose the hooks on its grad_fn. On the CPU the result is also a normal tensor where
    ``tensor`` was made in inference mode, and logits and an in-place ``out`` do not count as aliases, for which
    torch.compile would build (and guard on) another program.
    """
    return from_dlpack(tensor.detach()) if by_offset(tensor) else tensor.data


class SelectedRows:
    """The rows of ``tensor`` [B, T, V] at ``positions`` (int64 [n], n > 0, flat b * T + t), in that order."""

    def __init__(self, tensor: Tensor, positions: Tensor) -> None:
        self.positions = positions
        self._tensor = tensor
        self._memory = memory_of(tensor)
        self._by_offset = by_offset(tensor)
        _, steps, self._width = tensor.shape
        batches = positions.div(steps, rounding_mode="floor")
        self._indices = (batches, positions - batches * steps)
        if self._by_offset:
            batch_stride, step_stride, _ = tensor.stride()
            self._pitch = batch_stride if steps == 1 else step_stride
            offsets = batches * batch_stride + self._indices[1] * step_stride
            run_starts = (offsets.diff() != self._pitch).nonzero().squeeze(1) + 1
            self._bounds = [0, *run_starts.tolist(), len(self)]
            self._offsets = offsets[self._bounds[:-1]].tolist()

    def __len__(self) -> int:
        return self.positions.numel()

    def part(self, entries: slice | Tensor) -> SelectedRows:
        """Some of these rows, by a slice or int64 indices of ``positions``."""
        return SelectedRows(self._tensor, self.positions[entries])

    def _runs(self) -> Iterator[tuple[int, int, Tensor]]:
        """First entry, last entry + 1 and view [., V] of every run of equally spaced rows."""
        for first, last, offset in zip(self._bounds[:-1], self._bounds[1:], self._offsets, strict=True):
            yield first, last, self._memory.as_strided((last - first, self._width), (self._pitch, 1), offset)

    def contiguous(self) -> Tensor | None:
        """The rows in place as a contiguous [n, V] tensor, None where they do not lie side by side."""
        if not self._by_offset or len(self._offsets) > 1 or self._pitch != self._width:
            return None
        ((_, _, rows),) = self._runs()
        return from_dlpack(rows)  # not a view in PyTorch's books

    def load(self, buffer: Tensor) -> Tensor:
        """``buffer``, to whose first rows the rows are copied, converted to its dtype."""
        if self._by_offset:
            for first, last, rows in self._runs():
                buffer[first:last].copy_(rows)
        else:
            buffer[: len(self)].copy_(self._memory[self._indices])
        return buffer

    def store(self, buffer: Tensor) -> None:
        """Copies the first rows of ``buffer`` to the rows, rounding to their dtype."""
        if self._by_offset:
            for first, last, rows in self._runs():
                rows.copy_(buffer[first:last])
        else:
            self._memory[self._indices] = buffer[: len(self)].to(self._memory.dtype)

    def zero(self) -> None:
        """Fills the rows with zeros."""
        if self._by_offset:
            for _, _, rows in self._runs():
                rows.zero_()
        else:
            self._memory[self._indices] = 0

    def take(self, columns: Tensor) -> Tensor:
        """Entry ``columns[i]`` (int64 [n]) of each row: [n], the tensor's dtype."""
        batches, steps = self._indices
        return self._memory[batches, steps, columns]

    def put(self, columns: Tensor, values: Tensor) -> None:
        """Overwrites entry ``columns[i]`` (int64 [n]) of each row by ``values`` [n], rounding to the tensor's dtype."""
        batches, steps = self._indices
        self._memory[batches, steps, columns] = values.to(self._memory.dtype)
