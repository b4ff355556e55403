"""The Triton backend: seven operations, the same as ``hpo_fused.eager``.

Importing this raises ImportError where Triton is absent.
"""

from __future__ import annotations

from .computed_rows import computed_rows
from .elementary import INTERPRETED
from .fused_policy_loss import fused_policy_loss, policy_loss
from .logprob_policy_loss import logprob_policy_loss
from .scale_gradient import scale_gradient
from .token_gradient import token_gradient
from .token_statistics import token_statistics

__all__ = [
    "computed_rows",
    "fused_policy_loss",
    "interpreting",
    "logprob_policy_loss",
    "policy_loss",
    "scale_gradient",
    "token_gradient",
    "token_statistics",
]


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET was set when this package was imported."""
    return bool(INTERPRETED.value)
