"""TRL's functions of logits and of hidden states, and the loss of their log-probabilities in eager PyTorch.

Up to TRL 1.14 GRPOTrainer called those of logits; from 1.15 on it makes log-probabilities from hidden states, and other
trainers still call these. Those of logits have no softcap: the model applies it before, in eager PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpo_fused.bench import plain
from hpo_fused.bench.inputs import Inputs

from .base import Output
from .peers import Peer, eager_loss

COLUMNS = 32768  # of the vocabulary in one tile, as TRL's trainers choose


class _Trl(Peer):
    """Log-probabilities by TRL."""

    distribution = "trl"
    version = "1.16"


class TrlEager(_Trl):
    """``selective_log_softmax`` and ``entropy_from_logits`` in their PyTorch implementation.

    On a GPU both hand over to the Triton kernel, for arguments that it takes. It does not take several tokens per
    row, nor logits of four dimensions: that is how this provider has PyTorch run on every device.
    """

    name = "trl:eager"
    summary = (
        "TRL >= 1.16 in PyTorch: logits cast to float32 (as accelerate does under mixed precision; in bfloat16 its "
        "log-probabilities are off by 5e-3), selective_log_softmax, entropy_from_logits, eager loss"
    )
    slow_start = ""
    copies = 5.0

    def token_logprobs(self, inputs: Inputs) -> Output:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        z = plain.capped(inputs.leaves[0].float(), inputs.softcap)
        logprobs: Tensor = selective_log_softmax(z, inputs.tokens.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            entropy: Tensor = entropy_from_logits(z.unsqueeze(0)).squeeze(0)
        return Output(None, logprobs, entropy)

    def policy_loss(self, inputs: Inputs) -> Output:
        return eager_loss(inputs, self.token_logprobs(inputs))


class TrlTriton(_Trl):
    """``trl.kernels.selective_log_softmax_and_entropy``: two reads and one write of the logits."""

    name = "trl:triton"
    summary = "TRL >= 1.16's Triton kernel of log-probabilities and entropy (2 reads, 1 write), eager loss"
    needs_gpu = True
    copies = 1.25

    def token_logprobs(self, inputs: Inputs) -> Output:
        from trl.kernels import selective_log_softmax_and_entropy

        z = plain.capped(inputs.leaves[0], inputs.softcap)
        logprobs, entropy = selective_log_softmax_and_entropy(z, inputs.tokens, row_mask=inputs.mask)
        return Output(None, logprobs, entropy.detach())

    def policy_loss(self, inputs: Inputs) -> Output:
        return eager_loss(inputs, self.token_logprobs(inputs))


class TrlChunked(_Trl):
    """``trl.kernels.ChunkedLogProbFunction`` as GRPOTrainer's fused LM head calls it."""

    name = "trl:chunked"
    summary = (
        "TRL >= 1.16's ChunkedLogProbFunction (4 GEMMs in tiles of 4096 x 32768; on a CPU two of them in float32), "
        "with entropy, eager loss; skips masked rows on a GPU, rows of zero advantage never"
    )
    copies = 0.5

    def linear_token_logprobs(self, inputs: Inputs) -> Output:
        from trl.kernels import ChunkedLogProbFunction

        (hidden, weight), tokens, mask = inputs.leaves, inputs.tokens, inputs.mask
        # Like TRL's fused LM head: Triton devices score the unmasked positions only.
        rows = mask if mask is not None and hidden.device.type != "cpu" else torch.ones_like(tokens, dtype=torch.bool)
        values = ChunkedLogProbFunction.apply(
            hidden[rows], weight, None, tokens[rows], 1.0, COLUMNS, inputs.softcap, 1.0, ("entropy",)
        )
        logprobs, entropy = (value.new_zeros(tokens.shape).masked_scatter(rows, value) for value in values[:2])
        return Output(None, logprobs, entropy.detach())

    def linear_policy_loss(self, inputs: Inputs) -> Output:
        return eager_loss(inputs, self.linear_token_logprobs(inputs))
