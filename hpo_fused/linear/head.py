"""The three GEMMs of an LM head over a chunk of rows, and the sums of its gradients over chunks.

    logits[r, V] = x[r, H] weight^T + bias        dhidden[r, H] = g[r, V] weight        dweight[V, H] += g^T x

Operands are rounded to one dtype: the inputs', or autocast's. Where the processor does not multiply in it, the GEMMs
run in float32 on operands widened from it, which is exact: weight and g a slice of the vocabulary at a time.

dweight is summed in float32 and rounded once. Where there is one chunk only, the GEMM's own float32 sum is all there
is to it. Over several chunks the GEMM adds into a float32 accumulator where it can: one of float32 operands, and on
CUDA any (``torch.addmm`` with ``out_dtype``). On a CPU that multiplies in the operands' dtype each chunk's product
comes out of its GEMM rounded, and those are added in float32: an error of one rounding of each chunk's contribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .rows import Rows

# Hidden states [B, T, H], weight [V, H] and bias [V]; and their gradients, None where there is none.
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]

# Bytes (CPU, elsewhere) of the slices that matrices are widened in, or a product is made in that no GEMM can add into
# float32. On two CPU cores slices of 1024 x 896 to 4096 x 896 products took 7 to 18% longer than the product alone
# (added as a whole it took 50% longer), and widened slices of 1 to 8 MiB no longer than float32 operands. A GPU's must
# keep it busy.
TILE_BYTES = (8 << 20, 64 << 20)


def multiplies_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether GEMMs in ``dtype`` are the fastest that the device has for operands of ``dtype``.

    On a CPU only oneDNN has GEMMs in bfloat16 and float16 worth the name; without it PyTorch multiplies in plain loops
    (on AVX2 and one core 1.5 to 32 GFLOP/s in bfloat16, 1.5 to 19 in float16, where float32 reaches 90). oneDNN says
    which dtypes the processor (or ONEDNN_MAX_CPU_ISA) lets it take. It emulates bfloat16 on processors with AVX-512
    that lack AVX512_BF16, at 38 GFLOP/s.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return True
    if not (torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)):
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not emulated


class GemmDtypes(NamedTuple):
    """The dtypes of a call's GEMMs."""

    operands: torch.dtype  # to which hidden states, weight, bias and the logits' gradient are rounded
    arithmetic: torch.dtype  # in which the GEMMs run: the operands' or, where they are widened, float32
    logits: torch.dtype  # to which logits are rounded: the operands' or float32

    @classmethod
    def of(cls, operands: torch.dtype, logits: torch.dtype, device: torch.device) -> GemmDtypes:
        """The dtypes for ``device``, which decides what the GEMMs run in."""
        return cls(operands, operands if multiplies_in(operands, device) else torch.float32, logits)

    @property
    def widened(self) -> bool:
        """Whether operands are widened before they are multiplied."""
        return self.arithmetic != self.operands

    @property
    def bytes_per_logit(self) -> int:
        """Bytes of a chunk for each of its logits: itself, and its gradient where that is cast as a whole."""
        cast = self.logits not in (self.operands, self.arithmetic)
        return self.logits.itemsize + (self.operands.itemsize if cast else 0)


class Float32Gemms(NamedTuple):
    """The ways in which a device's GEMMs of bfloat16 (or float16) can avoid rounding: write float32, add into it."""

    write: bool
    add: bool


_float32_gemms: dict[tuple[torch.device, torch.dtype], Float32Gemms] = {}


def float32_gemms(device: torch.device, dtype: torch.dtype) -> Float32Gemms:
    """Float32 results of a device's GEMMs, tried once: CUDA has both (PyTorch 2.8 the first), the CPU neither."""
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


def slices(length: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """A matrix of ``length`` rows in slices of rows small enough to be made aside; in one where rows take no bytes."""
    step = max(TILE_BYTES[device.type != "cpu"] // row_bytes if row_bytes else length, 1)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _product(bias: Tensor | None, left: Tensor, right: Tensor, **options: Any) -> Tensor:
    return torch.mm(left, right, **options) if bias is None else torch.addmm(bias, left, right, **options)


class Head:
    """An LM head's weight [V, H] and bias [V], and the logits that they make."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtypes: GemmDtypes) -> None:
        # A weight that is widened a slice at a time is rounded then.
        self.weight = weight.detach() if dtypes.widened else weight.detach().to(dtypes.operands)
        self.bias = None if bias is None else bias.detach().to(dtypes.operands)
        self.dtypes = dtypes

    def new_logits(self, rows: int) -> Tensor:
        """Room for a chunk's logits, [rows, V]."""
        return self.weight.new_empty((rows, self.weight.shape[0]), dtype=self.dtypes.logits)

    def operand(self, matrix: Tensor) -> Tensor:
        """A matrix as the GEMMs take it: rounded to the operands' dtype, in that of the arithmetic."""
        operands, arithmetic, _ = self.dtypes
        return matrix if matrix.dtype == operands == arithmetic else matrix.to(operands).to(arithmetic)

    def parts(self, rows: int, *, widened: bool) -> Iterator[slice]:
        """The vocabulary, in parts of which float32 [part, H] and [rows, part] can be made aside where ``widened``."""
        length, width = self.weight.shape
        return slices(length, 4 * max(width, rows) if widened else 0, self.weight.device)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """out [r, V] = x [r, H] weight^T + bias, rounded once to its dtype; ``x`` is an operand."""
        if out.dtype == x.dtype and not self.dtypes.widened:
            _product(self.bias, x, self.weight.t(), out=out)
            return
        if not self.dtypes.widened and float32_gemms(x.device, x.dtype).write:
            torch.mm(x, self.weight.t(), out_dtype=out.dtype, out=out)
            if self.bias is not None:
                out.add_(self.bias)
            return
        x = x.to(torch.float32)
        for part in self.parts(len(x), widened=True):
            weight = self.weight[part].to(self.dtypes.operands).to(x.dtype).t()
            bias = None if self.bias is None else self.bias[part].to(x.dtype)
            if out.dtype == x.dtype:
                _product(bias, x, weight, out=out[:, part])
            else:
                out[:, part] = _product(bias, x, weight)


class HeadGradients:
    """Sums over chunks of the gradients that are needed: dhidden, dweight, dbias (None where not).

    Args:
        inputs: hidden, weight and bias, each None where it needs no gradient.
        head: the GEMMs' operands.
        rows: the rows that ``add`` will get in turn, in ``chunks`` chunks.
        into: float32 [V, H] to add dweight to, which is then not returned.
    """

    def __init__(self, inputs: Gradients, head: Head, rows: Rows, chunks: int, into: Tensor | None = None) -> None:
        self.head = head
        hidden, weight, bias = self.inputs = inputs
        self.hidden: Tensor | None = None
        self.total: Tensor | None = None
        if hidden is not None:
            self.hidden = (torch.empty if rows.everything else torch.zeros)(
                hidden.shape, dtype=hidden.dtype, device=hidden.device
            )
        self.into = into
        self.fresh = into is None  # nothing to add to yet
        if weight is not None and into is None:
            direct = chunks == 0 or (chunks == 1 and weight.dtype == head.dtypes.operands)
            self.total = (torch.zeros if chunks == 0 else torch.empty)(
                weight.shape, dtype=weight.dtype if direct else torch.float32, device=weight.device
            )
        self.bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)

    def add(self, rows: Rows, x: Tensor, gradient: Tensor) -> None:
        """A chunk's contributions: ``x`` [r, H] an operand, ``gradient`` [r, V] of its logits."""
        if self.bias is not None:
            # Row by row, a slice at a time: the CPU makes a float32 copy of what it sums.
            for part in slices(len(gradient), 4 * gradient.shape[1], gradient.device):
                self.bias.add_(gradient[part].sum(0, dtype=torch.float32))
        weight_sum = self.total if self.into is None else self.into
        flat = None if self.hidden is None else self.hidden.view(-1, x.shape[1])
        direct = flat is not None and rows.everything and flat.dtype == x.dtype
        dhidden = None if flat is None else flat[rows.positions] if direct else torch.empty_like(x)
        if dhidden is not None and len(self.head.weight) == 0:  # a rank without rows of the head
            dhidden.zero_()
        for part in self.head.parts(len(x), widened=self.head.dtypes.widened):
            g = self.head.operand(gradient[:, part])
            if dhidden is not None:
                _product(dhidden if part.start else None, g, self.head.operand(self.head.weight[part]), out=dhidden)
            if weight_sum is not None:
                _accumulate(weight_sum[part], g, x, fresh=self.fresh)
        if flat is not None and dhidden is not None and not direct:
            rows.write(dhidden.to(flat.dtype), flat, 0)
        self.fresh = False

    def finish(self) -> Gradients:
        """dhidden, dweight, dbias in their inputs' dtypes; called once, when the chunks' logits are released."""
        _, weight, bias = self.inputs
        return (
            self.hidden,
            None if self.total is None or weight is None else self.total.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def _accumulate(total: Tensor, gradient: Tensor, x: Tensor, *, fresh: bool) -> None:
    """total [V, H] = (``fresh``) or += gradient^T [V, r] x [r, H]."""
    transposed = gradient.t()
    if total.dtype == x.dtype:
        _product(None if fresh else total, transposed, x, out=total)
        return
    able = float32_gemms(x.device, x.dtype)
    if able.write and fresh:
        torch.mm(transposed, x, out_dtype=total.dtype, out=total)
    elif able.add:
        torch.addmm(total, transposed, x, out_dtype=total.dtype, out=total)
    else:
        for part in slices(len(total), total.shape[1] * total.element_size(), total.device):
            rows = transposed[part]
            product = torch.mm(rows, x, out_dtype=total.dtype) if able.write else torch.mm(rows, x)
            if fresh:
                total[part].copy_(product)
            else:
                total[part].add_(product)
