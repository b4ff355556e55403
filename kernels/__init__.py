"""The Triton backend: four operations on rows of logits, the same four as ``hpo_fused.eager``.

Importing this raises ImportError where Triton is absent.
"""

from __future__ import annotations

from torch import Tensor

from .elementary import INTERPRETED
from .fused_policy_loss import fused_policy_loss
from .scale_gradient import scale_gradient
from .token_gradient import token_gradient
from .token_statistics import token_statistics

__all__ = [
    "available_for",
    "fused_policy_loss",
    "interpreting",
    "scale_gradient",
    "token_gradient",
    "token_statistics",
]


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET was set when this package was imported."""
    return bool(INTERPRETED.value)


def available_for(tensor: Tensor) -> bool:
    """Whether the kernels run on ``tensor``'s device: CUDA and ROCm GPUs, or any device under the interpreter."""
    return tensor.is_cuda or interpreting()
