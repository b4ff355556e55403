"""The backends' operations as the autograd functions call them.

Eager code calls a backend's function straight. A compiler sees operators of its own kind: those that read logits are
custom operators which write to tensors given to them and return nothing, so that their fakes have nothing to say; the
others are plain torch, which it can trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import implementation
from .checks import check_token_ids, values_readable
from .interface import Batch, LogitTransform, LogprobLoss, LossSpec, SoftmaxStatistics, TokenTerms


def traced(tensor: Tensor) -> bool:
    """Whether a compiler is looking: dynamo traces, or the tensor is none that has values."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def token_terms(batch: Batch, spec: LossSpec, vocabulary: int | None, skip_inactive: bool, backend: str) -> TokenTerms:
    """A call's arguments as numbers per token; refuses token ids outside [0, vocabulary) at unmasked positions.

    Raises:
        ValueError: such an id, on the CPU; elsewhere it is a device-side assert.
    """
    if traced(batch.advantages) or (batch.context is not None and spec.shared_ratio):
        backend = "torch"
    # The torch twin checks on its way, and so do the kernels on a GPU; in the interpreter an assertion would not do.
    if backend != "torch" and batch.tokens is not None and vocabulary is not None and values_readable(batch.tokens):
        check_token_ids(batch.tokens, batch.mask, vocabulary)
    terms: TokenTerms = implementation(backend).token_terms(batch, spec, vocabulary, skip_inactive)
    return terms


def logprob_loss(
    logprobs: Tensor, entropy: Tensor | None, terms: TokenTerms, spec: LossSpec, backend: str
) -> LogprobLoss:
    """Each token's loss and gradient coefficients, from float32 [B, T]."""
    # A collective stands in the midst of it where responses lie on several ranks: the torch twin has it.
    backend = "torch" if traced(logprobs) or terms.context is not None else backend
    result: LogprobLoss = implementation(backend).logprob_loss(logprobs, entropy, terms, spec)
    return result


def policy_loss(
    logits: Tensor, targets: Tensor, values: Tensor, spec: LossSpec, transform: LogitTransform, results: Tensor,
    out: Tensor | None, backend: str,
) -> None:  # fmt: skip
    """Both sweeps: writes ``results`` and, where wanted, the gradient ``out`` of the losses' sum."""
    if traced(logits):
        _policy_loss(logits, targets, values, *spec, *transform, results, out, backend)
    else:
        implementation(backend).policy_loss(logits, targets, values, spec, transform, results, out)


def token_statistics(
    logits: Tensor, targets: Tensor, transform: LogitTransform, statistics: SoftmaxStatistics, backend: str
) -> None:
    """First sweep: writes the rows' softmax statistics."""
    if traced(logits):
        _token_statistics(logits, targets, *transform, *statistics, backend)
    else:
        implementation(backend).token_statistics(logits, targets, transform, statistics)


def token_gradient(
    logits: Tensor, targets: Tensor, statistics: SoftmaxStatistics, logprob_coefficients: Tensor,
    entropy_coefficients: Tensor | None, transform: LogitTransform, out: Tensor, backend: str,
) -> None:  # fmt: skip
    """Second sweep: writes the gradient ``out``."""
    arguments = (logprob_coefficients, entropy_coefficients)
    if traced(logits):
        _token_gradient(logits, targets, *statistics, *arguments, *transform, out, backend)
    else:
        implementation(backend).token_gradient(logits, targets, statistics, *arguments, transform, out)


@torch.library.custom_op("hpo_fused::policy_loss", mutates_args=("results", "out"))
def _policy_loss(
    logits: Tensor, targets: Tensor, values: Tensor, kind: str, parameters: Sequence[float], max_log_ratio: float,
    off_policy: bool, kl: str, entropy_bonus: bool, ratio_level: str, temperature: float, softcap: float | None,
    temperatures: Tensor | None, results: Tensor, out: Tensor | None, backend: str,
) -> None:  # fmt: skip
    spec = LossSpec(kind, tuple(parameters), max_log_ratio, off_policy, kl, entropy_bonus, ratio_level)
    transform = LogitTransform(temperature, softcap, temperatures)
    implementation(backend).policy_loss(logits, targets, values, spec, transform, results, out)


@torch.library.custom_op("hpo_fused::token_statistics", mutates_args=("logprobs", "maximum", "others", "entropy"))
def _token_statistics(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, temperatures: Tensor | None,
    logprobs: Tensor, maximum: Tensor, others: Tensor, entropy: Tensor | None, backend: str,
) -> None:  # fmt: skip
    transform = LogitTransform(temperature, softcap, temperatures)
    statistics = SoftmaxStatistics(logprobs, maximum, others, entropy)
    implementation(backend).token_statistics(logits, targets, transform, statistics)


@torch.library.custom_op("hpo_fused::token_gradient", mutates_args=("out",))
def _token_gradient(
    logits: Tensor, targets: Tensor, logprobs: Tensor, maximum: Tensor, others: Tensor, entropy: Tensor | None,
    logprob_coefficients: Tensor, entropy_coefficients: Tensor | None, temperature: float, softcap: float | None,
    temperatures: Tensor | None, out: Tensor, backend: str,
) -> None:  # fmt: skip
    transform = LogitTransform(temperature, softcap, temperatures)
    statistics = SoftmaxStatistics(logprobs, maximum, others, entropy)
    implementation(backend).token_gradient(
        logits, targets, statistics, logprob_coefficients, entropy_coefficients, transform, out
    )


for operator in (_policy_loss, _token_statistics, _token_gradient):
    operator.register_fake(lambda *_: None)
