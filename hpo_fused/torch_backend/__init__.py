"""The torch backend: the same six operations as ``hpo_fused.kernels``, on any device."""

from hpo_fused.token_terms import token_terms

from .operations import logprob_loss, policy_loss, scale_gradient, token_gradient, token_statistics

__all__ = [
    "MAXIMUM_UNIT",
    "logprob_loss",
    "policy_loss",
    "scale_gradient",
    "token_gradient",
    "token_statistics",
    "token_terms",
]

# A unit of ``SoftmaxStatistics.maximum`` in natural logarithms.
MAXIMUM_UNIT = 1.0
