"""The Triton backend: the six operations of ``hpo_fused.interface``.

Importing this raises ImportError where Triton is absent.
"""

from __future__ import annotations

import math

from .launch import serves
from .logprob_loss import logprob_loss
from .numerics import INTERPRETED
from .policy_loss import policy_loss
from .scale_gradient import scale_gradient
from .token_gradient import token_gradient
from .token_statistics import token_statistics
from .token_terms import token_terms

__all__ = [
    "MAXIMUM_UNIT",
    "interpreting",
    "logprob_loss",
    "policy_loss",
    "scale_gradient",
    "serves",
    "token_gradient",
    "token_statistics",
    "token_terms",
]

# A unit of ``SoftmaxStatistics.maximum`` in natural logarithms: the kernels count in powers of two.
MAXIMUM_UNIT = math.log(2)


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET was set when this package was imported."""
    return bool(INTERPRETED.value)
