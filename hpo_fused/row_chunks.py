"""Which rows of a [B, T, V] tensor are worked on, and how a chunk of them reaches a kernel without copying the rest.

A strided view such as ``logits[:, :-1]`` or a sparse selection of rows must never be made contiguous as a whole:
that would be the [N, V] temporary the library exists to avoid. Rows are addressed by their offset in memory; where
a chunk's rows lie side by side it is used in place, elsewhere it is copied run by run.
"""

from __future__ import annotations

from bisect import bisect_right

from torch import Tensor
from torch.utils.dlpack import from_dlpack


class RowSelection:
    """The rows of ``tensor`` [B, T, V] at ``positions`` (int64 [n], flat b * T + t), in that order."""

    def __init__(self, tensor: Tensor, positions: Tensor) -> None:
        self.tensor = tensor
        self.positions = positions
        self.on_cpu = tensor.device.type == "cpu"
        _, steps, self.width = tensor.shape
        batch_stride, step_stride, _ = tensor.stride()
        batches = positions.div(max(steps, 1), rounding_mode="floor")
        self._indices = (batches, positions - batches * steps)
        if not self.on_cpu:
            return
        self._pitch = batch_stride if steps == 1 else step_stride
        offsets = batches * batch_stride + self._indices[1] * step_stride
        run_starts = (offsets.diff() != self._pitch).nonzero().squeeze(1) + 1
        self._run_starts = [0, *run_starts.tolist(), positions.numel()]
        self._run_offsets = offsets[self._run_starts[:-1]].tolist() if positions.numel() else []
        # A tensor of its own over the same memory: it is a normal tensor even if `tensor` was made in inference
        # mode, and logits and an in-place `out` do not count as aliases, for which torch.compile would build
        # (and guard on) another program.
        self._memory = from_dlpack(tensor.detach())

    def __len__(self) -> int:
        return self.positions.numel()

    def view(self, start: int, stop: int) -> Tensor | None:
        """Rows [start, stop) as a contiguous [n, V] tensor in place, None where they do not lie side by side."""
        run = bisect_right(self._run_starts, start) - 1
        if self._pitch != self.width or stop > self._run_starts[run + 1]:
            return None
        return from_dlpack(self._run(run, start, stop))  # not a view in PyTorch's books

    def _run(self, run: int, start: int, stop: int) -> Tensor:
        offset = self._run_offsets[run] + (start - self._run_starts[run]) * self._pitch
        return self._memory.as_strided((stop - start, self.width), (self._pitch, 1), offset)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, Tensor]]:
        """(first, last, view) of the equally spaced pieces of rows [start, stop), counted from ``start``."""
        pieces = []
        run, first = bisect_right(self._run_starts, start) - 1, start
        while first < stop:
            last = min(stop, self._run_starts[run + 1])
            pieces.append((first - start, last - start, self._run(run, first, last)))
            run, first = run + 1, last
        return pieces

    def load(self, start: int, stop: int, buffer: Tensor) -> None:
        """Copies rows [start, stop) to the first rows of ``buffer``, converting to its dtype."""
        if self.on_cpu:
            for first, last, rows in self._pieces(start, stop):
                buffer[first:last].copy_(rows)
        else:
            batches, steps = self._indices
            buffer[: stop - start].copy_(self.tensor[batches[start:stop], steps[start:stop]])

    def store(self, start: int, stop: int, buffer: Tensor) -> None:
        """Copies the first rows of ``buffer`` to rows [start, stop), rounding to their dtype."""
        if self.on_cpu:
            for first, last, rows in self._pieces(start, stop):
                rows.copy_(buffer[first:last])
        else:
            batches, steps = self._indices
            self.tensor[batches[start:stop], steps[start:stop]] = buffer[: stop - start].to(self.tensor.dtype)

    def zero(self) -> None:
        """Fills all selected rows with zeros."""
        if self.on_cpu:
            for _, _, rows in self._pieces(0, len(self)):
                rows.zero_()
        else:
            self.tensor[self._indices] = 0

    def take(self, start: int, stop: int, columns: Tensor) -> Tensor:
        """Element ``columns[i]`` of each row in [start, stop): [n], the tensor's dtype."""
        batches, steps = self._indices
        return self.tensor[batches[start:stop], steps[start:stop], columns]

    def put(self, start: int, stop: int, columns: Tensor, values: Tensor) -> None:
        """Overwrites element ``columns[i]`` of each row in [start, stop), rounding to the tensor's dtype."""
        batches, steps = self._indices
        target = self.tensor if not self.on_cpu else self._memory
        target[batches[start:stop], steps[start:stop], columns] = values.to(target.dtype)
