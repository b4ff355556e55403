"""The vocabulary sweeps of the torch backend on the CPU, compiled by torch.compile (Inductor's C++ code).

Two functions, both of an [n, V] block of rows: the statistics (maximum, sums of exponentials) and the gradient.
Everything between them is per token and stays in ``eager.py``.

When they are used: CPU tensors with V >= ``MINIMUM_WIDTH``, and a C++ compiler that works. The environment
variable ``HPO_FUSED_CPU_COMPILE`` overrides: "0" never compiles; "1" makes a failing compilation raise, where
otherwise the plain sweeps of ``eager.py`` silently take over for the rest of the process. The choice depends on V,
dtype and device, never on the number of rows: the two implementations round differently, and a row's result must
not depend on its company. For the same reason each function is compiled once per (dtype, softcap or not, threads)
with n and V as run-time values, and always on the same example, whatever the first call's shapes.

The first use takes some seconds of compilation; Inductor keeps the result on disk for later processes.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import LogitTransform

ENVIRONMENT_VARIABLE = "HPO_FUSED_CPU_COMPILE"

# Below this a chunk takes milliseconds in any case, and toy vocabularies should not wait for a compiler.
MINIMUM_WIDTH = 4096

# Columns per partial sum. Inductor's own sum over a whole row adds thousands of values to one accumulator: its
# relative error reached 2e-5 on bfloat16 rows of 151936, in blocks of 1024 (64 additions per vector lane) 3e-7.
_BLOCK = 1024

# Where -inf is moved, so that 0 * inf appears nowhere: exp(LOWEST - maximum) is still 0, 0 * LOWEST too.
LOWEST = -1e30


class Scales(NamedTuple):
    """LogitTransform as 0-d float32 tensors (plain numbers would be compiled in): z' = scale * u(z)."""

    scale: Tensor
    softcap: Tensor


def scales(transform: LogitTransform) -> Scales:
    """The transform's constants in the compiled functions' form."""
    cap = transform.softcap or 1.0
    return Scales(*(torch.tensor(value, dtype=torch.float32) for value in (cap / transform.temperature, cap)))


def _differences(rows: Tensor, shift: Tensor, scale: Tensor, softcap: Tensor, capped: bool) -> Tensor:
    """z' - scale * shift, as scale * (u - shift): rounding ``scale`` then matters only as far as a logit lies below
    the maximum, where it would otherwise shift log-probabilities in proportion to the logits themselves."""
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


def _statistics(rows: Tensor, tokens: Tensor, scale: Tensor, softcap: Tensor, capped: bool) -> tuple[Tensor, ...]:
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
    excluded = column == (tokens[:, None] - _BLOCK * torch.arange(blocks, dtype=torch.int32))[:, :, None]
    constants = (scale, softcap, capped)
    # Written out twice: used twice, Inductor would keep the exponentials in an [n, V] buffer and read them again.
    exponential = torch.exp(_differences(body, shift[:, None, None], *constants))
    rest = torch.where(excluded, 0.0, exponential).sum(-1)
    difference = _differences(body, shift[:, None, None], *constants)
    again = _differences(body, shift[:, None, None], *constants)
    weighted = torch.where(excluded, 0.0, torch.exp(difference) * again).sum(-1)
    # The last block reaches back over columns already counted: a block of V mod 1024 columns would be another
    # program where that is 0 or 1.
    last = column + (width - _BLOCK)
    difference = _differences(rows[:, width - _BLOCK :], shift[:, None], *constants)
    excluded = (last < blocks * _BLOCK) | (last == tokens[:, None])
    exponential = torch.where(excluded, 0.0, torch.exp(difference))
    return shift, rest, weighted, exponential.sum(-1), (exponential * difference).sum(-1)


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
    difference = _differences(rows, shift[:, None], scale, softcap, capped)
    gradient = torch.exp(difference) * (factor[:, None] - slope[:, None] * difference)
    if capped:
        gradient = gradient * _sech_squared(rows, softcap)
    out.copy_(gradient)


class CompiledSweeps(NamedTuple):
    """``partial_statistics(rows, tokens, *scales)``, ``gradient(rows, shift, factor, slope, *scales, out)``.

    rows and out are contiguous [n, V] with n >= 2, tokens int32 [n], all others float32 [n]; none of them a view,
    because Dynamo would put guards on the shape of its base.
    """

    partial_statistics: Callable[..., tuple[Tensor, ...]]
    gradient: Callable[..., None]

    def statistics(self, rows: Tensor, tokens: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """shift = max u, sum over j != y of e_j, and of e_j * d_j: float32 [n]."""
        shift, rest, weighted, last_rest, last_weighted = self.partial_statistics(rows, tokens, *constants)
        rest, weighted = rest.sum(-1, dtype=torch.float64), weighted.sum(-1, dtype=torch.float64)
        return shift, (rest + last_rest).to(torch.float32), (weighted + last_weighted).to(torch.float32)


_lock = threading.Lock()
_compiled: dict[tuple[torch.dtype, bool, int], CompiledSweeps | None] = {}  # None: it failed


def compiled_sweeps(logits: Tensor, transform: LogitTransform) -> CompiledSweeps | None:
    """The compiled sweeps for logits [..., V], or None where the plain ones are to be used (see above).

    Raises:
        Exception: what torch.compile raised, where the environment variable is "1".
    """
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if setting == "0" or logits.device.type != "cpu" or logits.shape[-1] < MINIMUM_WIDTH:
        return None
    # Threads: Dynamo would compile anew when their number changes, and give up after some times.
    key = (logits.dtype, transform.softcap is not None, torch.get_num_threads())
    insist = setting == "1"
    if key not in _compiled or (insist and _compiled[key] is None):
        with _lock:
            if key not in _compiled or (insist and _compiled[key] is None):
                try:
                    _compiled[key] = _compile(*key)
                except Exception:
                    if insist:
                        raise
                    _compiled[key] = None
    return _compiled[key]


def _compile(dtype: torch.dtype, capped: bool, threads: int) -> CompiledSweeps:
    sweeps = CompiledSweeps(_isolated(_statistics, capped), _isolated(_gradient, capped))
    # No two of these sizes may be equal, nor small: Dynamo takes equal sizes for the same one and compiles 0 and 1
    # in. Enough rows for all threads, because Inductor decides from the example over what to run them.
    count, width = max(64, 4 * threads), 2 * MINIMUM_WIDTH + 8
    rows = torch.empty(count, width, dtype=dtype)
    rows.copy_(torch.linspace(-4.0, 4.0, count * width).view(count, width))
    out = torch.zeros_like(rows)
    tokens = torch.arange(count, dtype=torch.int32)
    scale, softcap = scales(LogitTransform(0.9, 3.0 if capped else None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shift, rest, _ = sweeps.statistics(rows, tokens, scale, softcap)
        sweeps.gradient(rows, shift, -1 / rest, torch.zeros_like(rest), scale, softcap, out)
    differences = _differences(rows, shift[:, None], scale, softcap, capped)
    expected = differences.exp() / -rest[:, None]
    if capped:
        expected = expected * _sech_squared(rows, softcap)
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=1e-6)
    differences[torch.arange(count), tokens.long()] = -torch.inf
    torch.testing.assert_close(rest, differences.exp().sum(-1), rtol=1e-4, atol=0)
    return sweeps


def _isolated(function: Callable[..., Any], capped: bool) -> Callable[..., Any]:
    """torch.compile of a copy of ``function``: Dynamo counts (and limits) compilations by code object."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(_compiled)}")
    copy = FunctionType(code, function.__globals__, function.__name__, (capped,), function.__closure__)
    return torch.compile(copy, dynamic=True, fullgraph=True)
