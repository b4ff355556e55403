"""The policy loss and log-probabilities from hidden states and an LM head, whose logits never exist all at once."""

from .functions import linear_policy_loss, linear_token_logprobs
from .memory import LinearMemory, linear_memory

__all__ = ["LinearMemory", "linear_memory", "linear_policy_loss", "linear_token_logprobs"]
