"""hpo_fused: policy losses for language-model RL in one pass over the vocabulary."""

from .backend import backend_for
from .batch import BatchStatistics
from .hysteresis import hysteretic_advantages
from .linear import LinearMemory, linear_memory, linear_policy_loss, linear_token_logprobs
from .logprobs import TokenLogprobs, token_logprobs
from .losses import PolicyLossOutput, logprob_policy_loss, policy_loss
from .metrics import MetricSums
from .objective import AdaptiveHysteretic, Hysteretic, Objective
from .shaping import DRO, Clip, GammaGate, GeometricMean, Hazard, LogFidelity, SoftGate, TruncatedRatio
from .vocab_parallel import VocabShard

__version__ = "0.1.0"

__all__ = [
    "DRO",
    "AdaptiveHysteretic",
    "BatchStatistics",
    "Clip",
    "GammaGate",
    "GeometricMean",
    "Hazard",
    "Hysteretic",
    "LinearMemory",
    "LogFidelity",
    "MetricSums",
    "Objective",
    "PolicyLossOutput",
    "SoftGate",
    "TokenLogprobs",
    "TruncatedRatio",
    "VocabShard",
    "__version__",
    "backend_for",
    "hysteretic_advantages",
    "linear_memory",
    "linear_policy_loss",
    "linear_token_logprobs",
    "logprob_policy_loss",
    "policy_loss",
    "token_logprobs",
]
