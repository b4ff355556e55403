"""What is measured: named LM heads, and batches of hidden states that go through them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpo_fused import LinearMemory, linear_memory
from hpo_fused.bench.cases import GROUP, BatchCase, custom_fields, responses_of

# Enough responses that a share of them is what was asked for.
MOST_RESPONSES = 8 * GROUP


@dataclass(frozen=True)
class HeadShape:
    """A model's LM head.

    Args:
        name: how it is selected and reported.
        hidden: H.
        vocabulary: V.
        softcap: the model's cap on its logits, or None.
        why: which models have it.
    """

    name: str
    hidden: int
    vocabulary: int
    softcap: float | None = None
    why: str = ""

    @property
    def entries(self) -> int:
        """V H."""
        return self.hidden * self.vocabulary


HEADS = {
    shape.name: shape
    for shape in (
        HeadShape("qwen2.5-0.5b", 896, 151936, None, "Qwen2.5 0.5B; small enough for a CPU"),
        HeadShape("qwen3-0.6b", 1024, 151936, None, "Qwen3 0.6B"),
        HeadShape("llama3.2-1b", 2048, 128256, None, "Llama 3.2 1B"),
        HeadShape("gemma3-270m", 640, 262144, None, "Gemma 3 270M; no cap on its logits"),
        HeadShape("qwen2.5-7b", 3584, 152064, None, "Qwen2.5 7B; the usual size in RL papers"),
        HeadShape("qwen3-8b", 4096, 151936, None, "Qwen3 8B"),
        HeadShape("llama3-8b", 4096, 128256, None, "Llama 3 8B"),
        HeadShape("gemma2-9b", 3584, 256000, 30.0, "Gemma 2 9B, with its logits capped at ±30"),
        HeadShape("gpt2", 768, 50257, None, "GPT-2; odd, so rows of logits start at unaligned addresses"),
    )
}
DEFAULT_HEAD = {"cpu": "qwen2.5-0.5b", "cuda": "qwen3-8b"}
CUSTOM = "custom:H=N,V=N[,softcap=C]"


def parse_head(text: str) -> HeadShape:
    """A named head, or one spelt ``custom:H=64,V=300`` or ``custom:H=64,V=300,softcap=30``.

    Raises:
        ValueError: neither; the message lists what there is.
    """
    if text in HEADS:
        return HEADS[text]
    try:
        (hidden, vocabulary), softcap = custom_fields(text, "H", "V")
    except ValueError:
        raise ValueError(f"unknown shape {text!r}; expected {', '.join(HEADS)} or {CUSTOM}") from None
    return HeadShape(text, hidden, vocabulary, softcap)


@dataclass(frozen=True)
class LinearCase(BatchCase):
    """A batch of hidden states.

    Args:
        shape: the LM head.
        chunk_bytes: as given to ``linear_policy_loss``; None: its default.
    """

    shape: HeadShape
    chunk_bytes: int | None = None

    @classmethod
    def of_tokens(
        cls, shape: HeadShape, tokens: int, dtype: str, objective: str, inactive: float, chunk_bytes: int | None
    ) -> LinearCase:
        """A case of exactly ``tokens`` positions."""
        responses = responses_of(tokens, MOST_RESPONSES)
        return cls(shape, responses, tokens // responses, dtype, objective, inactive, chunk_bytes=chunk_bytes)

    @property
    def inactive_share(self) -> float:
        """What ``inactive`` comes to with whole responses."""
        return 1 - self.active / self.tokens

    def at(self, inactive: float) -> LinearCase:
        """The same with another share of inactive rows."""
        return replace(self, inactive=inactive)

    def flops(self, rows: int) -> int | None:
        """Of the GEMMs over ``rows`` rows: one for the loss, two more for the gradients.

        None for the gradients alone: what is left of them depends on what the forward has done already.
        """
        gemms = {"forward": 1, "both": 3, "gradient": None}[self.mode]
        return None if gemms is None else 2 * gemms * rows * self.shape.entries

    def memory(self, device_type: str) -> LinearMemory:
        """What ``hpo_fused.linear_memory`` predicts."""
        return linear_memory(
            self.active,
            self.shape.hidden,
            self.shape.vocabulary,
            tokens=self.tokens,
            dtype=self.torch_dtype,
            chunk_bytes=self.chunk_bytes,
            device=device_type,
        )

    @property
    def upstream(self) -> float:
        """Where a loss scaler would settle for float16: gradients are means over tokens, and the head's must not
        overflow."""
        return min(super().upstream, 8.0 * (1 << self.tokens.bit_length()))

    @property
    def weight_bytes(self) -> int:
        """Size of the head, and of its gradient."""
        return self.shape.entries * self.torch_dtype.itemsize

    @property
    def input_bytes(self) -> int:
        """Size of hidden states and head."""
        return self.weight_bytes + self.tokens * self.shape.hidden * self.torch_dtype.itemsize
