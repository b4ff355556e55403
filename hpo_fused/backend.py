"""Which implementation of the row-level interface serves a tensor."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from . import torch_backend
from .checks import described

Backend: TypeAlias = Literal["triton", "torch", "auto"]

kernels: ModuleType | None = None
_triton_missing = ""
try:
    kernels = importlib.import_module(".kernels", __package__)
except ImportError as error:  # no Triton: macOS, Windows, minimal CPU installations
    _triton_missing = str(error)


def backend_for(tensor: Tensor, backend: Backend = "auto") -> Literal["triton", "torch"]:
    """The backend that ``backend`` means for ``tensor``.

    "auto" is "triton" for CUDA and ROCm tensors where Triton is installed, else "torch".

    Args:
        tensor: any tensor; only its device matters.
        backend: "triton" (CUDA or ROCm tensors, or any tensor under Triton's interpreter), "torch" (any device)
            or "auto".

    Raises:
        TypeError: not a tensor.
        ValueError: unknown backend, or "triton" where Triton is not installed or cannot serve the device.

    Examples:
        >>> import torch
        >>> backend_for(torch.zeros(1))
        'torch'
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {get_args(Backend)}, got {backend!r}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a tensor, got {described(tensor)}")
    if backend == "auto":
        return "triton" if kernels is not None and tensor.is_cuda else "torch"
    if backend == "triton":
        if kernels is None:
            raise ValueError(f"backend: expected triton to be installed for 'triton', got {_triton_missing}")
        if not kernels.serves(tensor):
            raise ValueError(
                f"backend: expected a CUDA or ROCm tensor for 'triton', got one on {tensor.device} (set "
                "TRITON_INTERPRET=1 before triton is imported to run the kernels in its interpreter)"
            )
        return "triton"
    return "torch"


def implementation(name: str) -> ModuleType:
    """The module behind a resolved backend's name."""
    if name == "torch":
        return torch_backend
    assert kernels is not None
    return kernels
