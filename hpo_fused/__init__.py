"""hpo_fused: policy losses for language-model RL in one pass over the vocabulary."""

from .backend import backend_for
from .batch import BatchStatistics
from .linear import LinearMemory, linear_memory, linear_policy_loss, linear_token_logprobs
from .logprobs import TokenLogprobs, token_logprobs
from .losses import PolicyLossOutput, logprob_policy_loss, policy_loss
from .objective import (
    AdaptiveHysteretic,
    Clip,
    Hazard,
    Hysteretic,
    LogFidelity,
    Objective,
    SoftGate,
    TruncatedRatio,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveHysteretic",
    "BatchStatistics",
    "Clip",
    "Hazard",
    "Hysteretic",
    "LinearMemory",
    "LogFidelity",
    "Objective",
    "PolicyLossOutput",
    "SoftGate",
    "TokenLogprobs",
    "TruncatedRatio",
    "__version__",
    "backend_for",
    "linear_memory",
    "linear_policy_loss",
    "linear_token_logprobs",
    "logprob_policy_loss",
    "policy_loss",
    "token_logprobs",
]
