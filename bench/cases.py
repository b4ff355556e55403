"""What is measured: named shapes, cases, and the inputs drawn for a case."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hpo_fused import reference
from hpo_fused.objective import Objective

# forward: loss, log-probabilities and entropy under no_grad. gradient: backward alone, its forward not timed. both:
# what a training step pays.
Mode = Literal["forward", "gradient", "both"]
MODES: tuple[Mode, ...] = ("forward", "gradient", "both")
# logits: the policy loss. logprobs: differentiable log-probabilities and entropies alone.
Op = Literal["logits", "logprobs"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Spread of the logits, and of the log-ratio between the policy and the one that sampled. One token in twenty has
# moved far, so that every branch of every objective (clipped, saturated) is on the measured path.
LOGIT_STD = 2.5
LOG_RATIO_STD, FAR_LOG_RATIO_STD, FAR_SHARE = 0.1, 0.5, 0.05
GROUP = 8  # responses to one prompt
CANDIDATES = 8  # tokens of a row that share most of its probability
CHUNK_ELEMENTS = 1 << 23  # float64 temporaries while drawing stay near 64 MiB each


@dataclass(frozen=True)
class Shape:
    """A model's output layer.

    Args:
        name: how it is selected and reported.
        vocabulary: V.
        softcap: the model's cap on its logits, or None.
        why: what makes the shape worth measuring.
    """

    name: str
    vocabulary: int
    softcap: float | None = None
    why: str = ""


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3", 151936, None, "Qwen2.5 and Qwen3; the vocabulary most RL papers train"),
        Shape("llama3", 128256, None, "Llama 3"),
        Shape("gemma", 262144, 30.0, "Gemma's 256 Ki vocabulary, with the logits capped at ±30"),
        Shape("gpt2", 50257, None, "GPT-2; odd, so rows start at unaligned addresses"),
    )
}
DEFAULT_SHAPES = ["qwen3", "gpt2"]
CUSTOM = "custom:V=N[,softcap=C]"


def custom_fields(text: str, *names: str) -> tuple[list[int], float | None]:
    """The sizes ``names`` and the softcap of a shape spelt ``custom:A=2,B=3[,softcap=C]``.

    Raises:
        ValueError: not spelt so, or a size below 2.
    """
    kind, _, rest = text.partition(":")
    fields = dict(part.partition("=")[::2] for part in rest.split(","))
    if kind != "custom" or not set(names) <= fields.keys() <= {*names, "softcap"}:
        raise ValueError(text)
    sizes, softcap = [int(fields[name]) for name in names], float(fields["softcap"]) if "softcap" in fields else None
    if min(sizes) < 2 or not (softcap is None or 0 < softcap < math.inf):
        raise ValueError(text)
    return sizes, softcap


def parse_shape(text: str) -> Shape:
    """A named shape, or one spelt ``custom:V=300`` or ``custom:V=300,softcap=30``.

    Raises:
        ValueError: neither; the message lists what there is.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        (vocabulary,), softcap = custom_fields(text, "V")
    except ValueError:
        raise ValueError(f"unknown shape {text!r}; expected {', '.join(SHAPES)} or {CUSTOM}") from None
    return Shape(text, vocabulary, softcap)


def responses_of(tokens: int, most: int) -> int:
    """As many responses of equal length, up to ``most``, as ``tokens`` can be cut into."""
    return next(count for count in range(most, 0, -1) if tokens % count == 0)


@dataclass(frozen=True)
class BatchCase:
    """One measurement's batch, as plain values: equal cases with equal seeds have equal inputs.

    Args:
        shape: the model's output layer.
        responses, length: B and T of the padded layout.
        dtype: a key of ``DTYPES``.
        objective: a preset's name.
        inactive: share of the responses whose advantage is zero.
        mode: which part of a step is timed.
    """

    shape: Any
    responses: int
    length: int
    dtype: str = "bf16"
    objective: str = "mhpo_ahpo"
    inactive: float = 0.0
    mode: Mode = "both"

    @property
    def tokens(self) -> int:
        """Rows, masked ones included."""
        return self.responses * self.length

    @property
    def active(self) -> int:
        """Rows of responses whose advantage is not zero, masked ones included."""
        return (self.responses - round(self.inactive * self.responses)) * self.length

    @property
    def torch_dtype(self) -> torch.dtype:
        """The logits' dtype."""
        return DTYPES[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """Size of the logits, and of their gradient."""
        return int(self.tokens * self.shape.vocabulary * self.torch_dtype.itemsize)

    @property
    def upstream(self) -> float:
        """What backward starts from: 1, or for float16 what a loss scaler puts there, since gradients underflow."""
        return 65536.0 if self.dtype == "fp16" else 1.0

    def resolved_objective(self) -> Objective:
        """The preset, with T as the constant length that Dr. GRPO divides by."""
        objective = Objective.preset(self.objective)
        if objective.normalization == "constant":
            return Objective.preset(self.objective, max_length=self.length)
        return objective


@dataclass(frozen=True)
class Case(BatchCase):
    """A batch of logits.

    Args:
        shape: vocabulary and softcap.
        ragged: responses of different lengths, padded and masked, instead of B full ones.
        op: what is made of the logits.
    """

    shape: Shape
    ragged: bool = False
    op: Op = "logits"

    @classmethod
    def of_tokens(cls, shape: Shape, tokens: int, dtype: str, objective: str, inactive: float, ragged: bool) -> Case:
        """A case of exactly ``tokens`` positions: as many responses, up to two groups, as divide them."""
        responses = responses_of(tokens, 2 * GROUP)
        return cls(shape, responses, tokens // responses, dtype, objective, inactive, ragged=ragged)

    @property
    def least_bytes(self) -> int | None:
        """Device-memory traffic that nobody can avoid: rows read and, where there is a gradient, all of it written.

        A loss needs no logits of a response whose advantage is zero, but their gradient is zeros that are written;
        log-probabilities need every row. None for the gradient alone: what is left of it depends on what the forward
        has done already; and where responses are ragged: how many rows are not masked is drawn.
        """
        if self.mode == "gradient" or self.ragged:
            return None
        rows = self.tokens if self.op == "logprobs" else self.active
        read = rows * self.shape.vocabulary * self.torch_dtype.itemsize
        return read + (self.logits_bytes if self.mode == "both" else 0)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of a case, and what the float64 oracle needs.

    Attributes:
        logits: [B, T, V] leaf that requires grad.
        tokens: int64 [B, T].
        advantages: float32 [B].
        old_logprobs: float32 [B, T].
        mask: bool [B, T], or None where every token counts.
        exact_logprobs: float64 [B, T], log-probabilities of ``tokens`` under exactly these logits.
        upstream: float32 [B, T], dloss/dlogp that a loss behind log-probabilities sends back; 0 where masked.
    """

    case: Case
    objective: Objective
    logits: Tensor
    tokens: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    mask: Tensor | None
    exact_logprobs: Tensor
    upstream: Tensor


def _rows(count: int, case: Case, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` rows of logits in the case's dtype, the token sampled from each, and its float64 log-probability.

    A trained policy is sure of itself: a few candidates hold nearly all the probability, and the token is one of
    them. Noise alone would give log-probabilities near -ln V.
    """
    vocabulary = case.shape.vocabulary
    z = torch.empty(count, vocabulary, device=device).normal_(0.0, LOGIT_STD, generator=generator)
    candidates = torch.randint(vocabulary, (count, CANDIDATES), generator=generator, device=device)
    rest = math.log(vocabulary) + LOGIT_STD**2 / 2  # log of the noise's own softmax denominator
    peaks = rest + 1 + LOGIT_STD * torch.randn(count, CANDIDATES, generator=generator, device=device)
    z.scatter_(1, candidates, peaks)
    choice = torch.multinomial(peaks.softmax(-1), 1, generator=generator)
    tokens = candidates.gather(1, choice).squeeze(1)
    logits = z.to(case.torch_dtype)
    exact = reference.token_logprobs(logits.double(), tokens, softcap=case.shape.softcap).logprobs
    return logits, tokens, exact


def draw_advantages(responses: int, inactive: float, generator: torch.Generator) -> Tensor:
    """Group-normalised advantages of binary rewards, float32 [B] on the CPU; ``inactive`` of them exactly zero.

    A group whose responses all earn the same has zero advantage; the others hold at least one of each kind.
    """
    active = responses - round(inactive * responses)
    values = torch.zeros(responses)
    for start in range(0, active, GROUP):
        size = min(GROUP, active - start)
        rewards = torch.zeros(size)
        successes = int(torch.randint(1, max(size, 2), (), generator=generator))
        rewards[torch.randperm(size, generator=generator)[:successes]] = 1.0
        # A group of one (an odd count of responses) has no spread; it keeps its reward as its advantage.
        spread = rewards.std(correction=0)
        values[start : start + size] = (rewards - rewards.mean()) / spread if size > 1 else rewards
    return values[torch.randperm(responses, generator=generator)]


def draw_old_logprobs(logprobs: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 log-probabilities under the policy that sampled, near these and for some tokens further away."""
    far = torch.rand(logprobs.shape, generator=generator, device=logprobs.device) < FAR_SHARE
    spread = torch.where(far, FAR_LOG_RATIO_STD, LOG_RATIO_STD)
    return (logprobs - spread * torch.randn(logprobs.shape, generator=generator, device=logprobs.device)).float()


def draw(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random inputs of ``case`` on ``device``: never zeros, since power draw and branches depend on the values."""
    generator = torch.Generator(device).manual_seed(seed)
    on_cpu = torch.Generator().manual_seed(seed)
    count, vocabulary = case.tokens, case.shape.vocabulary
    logits = torch.empty(count, vocabulary, dtype=case.torch_dtype, device=device)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    exact = torch.empty(count, dtype=torch.float64, device=device)
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        logits[part], tokens[part], exact[part] = _rows(part.stop - start, case, device, generator)

    old = draw_old_logprobs(exact, generator)
    shape = (case.responses, case.length)
    mask = None
    if case.ragged:
        shortest = max(1, case.length // 4)
        lengths = torch.randint(shortest, case.length + 1, shape[:1], generator=generator, device=device)
        mask = torch.arange(case.length, device=device) < lengths[:, None]
    upstream = torch.randn(shape, generator=generator, device=device) / count
    return Inputs(
        case,
        case.resolved_objective(),
        logits.reshape(*shape, vocabulary).requires_grad_(),
        tokens.reshape(shape),
        draw_advantages(case.responses, case.inactive, on_cpu).to(device),
        old.reshape(shape),
        mask,
        exact.reshape(shape),
        upstream if mask is None else upstream * mask,
    )
