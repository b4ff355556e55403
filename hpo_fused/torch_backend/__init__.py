"""The torch backend: the same eight operations as ``hpo_fused.kernels``, on any device."""

from hpo_fused.token_terms import token_terms

from .operations import logprob_loss, policy_loss, scale_gradient, token_gradient, token_statistics
from .shards import column_gradient, combine_statistics

__all__ = [
    "column_gradient",
    "combine_statistics",
    "logprob_loss",
    "policy_loss",
    "scale_gradient",
    "token_gradient",
    "token_statistics",
    "token_terms",
]
