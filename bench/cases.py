"""Named shapes, and cases: what one measurement is of, as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

import torch

from hpo_fused import Objective

# The public functions of hpo_fused, by name.
Operation = Literal[
    "policy_loss", "linear_policy_loss", "logprob_policy_loss", "token_logprobs", "linear_token_logprobs"
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
# forward: under no_grad. backward: its forward is not timed. both: what a training step pays.
Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

GROUP = 8  # responses to one prompt
MOST_RESPONSES = 8 * GROUP  # enough that a share of them is the share asked for
CUSTOM = "custom:V=N[,H=N][,softcap=C]"


@dataclass(frozen=True)
class Shape:
    """A model's LM head.

    Args:
        name: how it is selected and reported.
        vocabulary: V.
        hidden: H; 0 where only the operations on logits are measured.
        softcap: the model's cap on its logits, or None.
        why: what makes the shape worth measuring.
    """

    name: str
    vocabulary: int
    hidden: int = 0
    softcap: float | None = None
    why: str = ""


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-0.6b", 151936, 1024, None, "Qwen3 0.6B; the vocabulary that most RL papers train"),
        Shape("qwen3-8b", 151936, 4096, None, "Qwen3 8B"),
        Shape("qwen2.5-0.5b", 151936, 896, None, "Qwen2.5 0.5B; small enough for a CPU"),
        Shape("qwen2.5-7b", 152064, 3584, None, "Qwen2.5 7B; the usual size in RL papers"),
        Shape("llama3.2-1b", 128256, 2048, None, "Llama 3.2 1B"),
        Shape("llama3-8b", 128256, 4096, None, "Llama 3 8B"),
        Shape("gemma3-270m", 262144, 640, None, "Gemma 3 270M; the widest vocabulary"),
        Shape("gemma2-9b", 256000, 3584, 30.0, "Gemma 2 9B, its logits capped at ±30"),
        Shape("gpt2", 50257, 768, None, "GPT-2; odd, so rows of logits start at unaligned addresses"),
    )
}
DEFAULT_SHAPES = {"cpu": ["qwen3-0.6b", "gpt2"], "cuda": ["qwen3-8b", "gpt2"]}
NO_VOCABULARY = Shape("no vocabulary", 1)


def parse_shape(text: str) -> Shape:
    """A named shape, or one spelt ``custom:V=300``, ``custom:V=300,H=64`` or ``custom:V=300,softcap=30``.

    Raises:
        ValueError: neither; the message lists what there is.
    """
    if text in SHAPES:
        return SHAPES[text]
    kind, _, rest = text.partition(":")
    fields = dict(part.partition("=")[::2] for part in rest.split(","))
    try:
        vocabulary, hidden = int(fields.pop("V")), int(fields.pop("H", "0"))
        softcap = float(fields.pop("softcap")) if "softcap" in fields else None
        if (
            kind != "custom"
            or fields
            or vocabulary < 2
            or hidden < 0
            or not (softcap is None or 0 < softcap < math.inf)
        ):
            raise ValueError(text)
    except (KeyError, ValueError):
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)} or {CUSTOM}, got {text!r}") from None
    return Shape(text, vocabulary, hidden, softcap)


@dataclass(frozen=True)
class Case:
    """One measurement: equal cases with equal seeds have equal inputs.

    Args:
        operation: the public function that is measured.
        shape: the model's LM head.
        responses, length: B and T of the padded layout.
        dtype: of logits, or of hidden states and head; a key of ``DTYPES``.
        objective: a preset's name.
        inactive: share of the responses whose advantage is zero.
        mode: which part of a step is timed.
        ragged: responses of different lengths, padded and masked, instead of B full ones.
        inplace: providers that can write the gradient over the logits do.
        cuda_graph: the replay of a CUDA graph is timed, without the host's part of a step.
        chunk_mib: memory for a chunk's logits (``chunk_bytes`` of the linear functions); None: their default.
        loss_scale: what the loss is multiplied by: hpo_fused is told it, for the others backward starts from it.
    """

    operation: Operation
    shape: Shape
    responses: int
    length: int
    dtype: str = "bf16"
    objective: str = "mhpo_ahpo"
    inactive: float = 0.0
    mode: Mode = "both"
    ragged: bool = False
    inplace: bool = False
    cuda_graph: bool = False
    chunk_mib: float | None = None
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        known = {"operation": OPERATIONS, "dtype": DTYPES, "objective": Objective.presets(), "mode": MODES}
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, got {value!r}")
        if not 0 <= self.inactive <= 1:
            raise ValueError(f"inactive: expected a share of 0 to 1, got {self.inactive}")
        if not 0 < self.loss_scale < math.inf:
            raise ValueError(f"loss_scale: expected a positive number, got {self.loss_scale}")
        if self.linear and self.shape.hidden == 0:
            raise ValueError(f"shape: expected a hidden size (H=N) for {self.operation}, got {self.shape.name!r}")
        row = self.shape.vocabulary * self.torch_dtype.itemsize
        if self.chunk_bytes is not None and self.chunk_bytes < row:
            raise ValueError(f"chunk_mib: expected a row of logits ({row} bytes) at least, got {self.chunk_mib:g} MiB")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Case:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**content, "shape": Shape(**content["shape"])})

    @property
    def tokens(self) -> int:
        """Rows, masked ones included."""
        return self.responses * self.length

    @property
    def linear(self) -> bool:
        """Whether the operation starts from hidden states and the LM head."""
        return self.operation.startswith("linear_")

    @property
    def gives_loss(self) -> bool:
        """Whether the operation makes a policy loss, and not log-probabilities."""
        return self.operation.endswith("policy_loss")

    @property
    def active(self) -> int:
        """Rows that have to be computed, masked ones included: for a loss those of non-zero advantage."""
        inactive = round(self.inactive * self.responses) if self.gives_loss else 0
        return (self.responses - inactive) * self.length

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """Size of all logits, and of their gradient, whether or not they exist at once."""
        return self.tokens * self.shape.vocabulary * self.torch_dtype.itemsize

    @property
    def input_bytes(self) -> int:
        """Size of the inputs that have a gradient."""
        if self.linear:
            return (self.shape.vocabulary + self.tokens) * self.shape.hidden * self.torch_dtype.itemsize
        return self.logits_bytes

    @property
    def chunk_bytes(self) -> int | None:
        return None if self.chunk_mib is None else int(self.chunk_mib * (1 << 20))

    @property
    def gradient_factor(self) -> float:
        """Factor of the gradients: the loss's, for float16 with a loss scaler's, since gradients underflow.

        From hidden states it is where a scaler would settle: the head's gradient, a sum over rows, must not overflow.
        """
        if self.dtype != "fp16":
            return self.loss_scale
        return self.loss_scale * (min(65536.0, 8.0 * (1 << self.tokens.bit_length())) if self.linear else 65536.0)

    def resolved_objective(self) -> Objective:
        """The preset, with T as the constant length that Dr. GRPO divides by."""
        objective = Objective.preset(self.objective)
        return replace(objective, max_length=self.length) if objective.normalization == "constant" else objective

    def work(self) -> tuple[float, str] | None:
        """Work that nobody can avoid and the unit of its rate; None where it is open.

        Logits: bytes of one read of the active rows and one write of the whole gradient. Linear: flops of one GEMM over
        the active rows and two more for the gradients. Open for backward alone, whose rest depends on what the forward
        has done, and for ragged responses, whose rows are drawn.
        """
        if self.mode == "backward" or self.ragged or self.operation == "logprob_policy_loss":
            return None
        entries = self.active * self.shape.vocabulary
        if self.linear:
            return 2 * (1 if self.mode == "forward" else 3) * entries * self.shape.hidden / 1e12, "TFLOP/s"
        written = self.logits_bytes if self.mode == "both" else 0
        return (entries * self.torch_dtype.itemsize + written) / 1e9, "GB/s"


def of_tokens(operation: Operation, shape: Shape, tokens: int, **fields: Any) -> Case:
    """A case of exactly ``tokens`` rows, in as many responses of equal length, up to 64, as divide them.

    Fields that make no difference to the operation are set to their defaults, so that equal work is an equal case.
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected 1 at least, got {tokens}")
    responses = next(count for count in range(MOST_RESPONSES, 0, -1) if tokens % count == 0)
    case = Case(operation, shape, responses, tokens // responses, **fields)
    if operation == "logprob_policy_loss":
        case = replace(case, shape=NO_VOCABULARY, dtype="fp32")
    if not case.gives_loss:
        case = replace(case, objective=Case.objective, inactive=0.0, loss_scale=1.0)
    return replace(
        case, inplace=case.inplace and operation == "policy_loss", chunk_mib=case.chunk_mib if case.linear else None
    )


def cases_of(
    tokens: Mapping[Operation, Iterable[int]], shapes: Sequence[Shape], axes: Mapping[str, Sequence[Any]], **fields: Any
) -> list[Case]:
    """Every combination once, those of one operation and shape together.

    Args:
        tokens: numbers of rows of each operation.
        shapes: of each of them.
        axes: values of further fields of a case.
        fields: of all cases.

    Raises:
        ValueError: a value that there is not; the message names the field.
    """
    found = [
        of_tokens(operation, shape, count, **dict(zip(axes, values, strict=True)), **fields)
        for operation, counts in tokens.items()
        for shape, *values, count in product(shapes, *axes.values(), sorted(set(counts)))
    ]
    return list(dict.fromkeys(found))


def labels(cases: Iterable[Case], *, without: Sequence[str] = ()) -> dict[Case, str]:
    """Words that tell these cases apart: operation, shape, and whatever else is not the same for all of them."""
    found = list(dict.fromkeys(cases))
    differing = [name for name in asdict(found[0]) if len({getattr(case, name) for case in found}) > 1] if found else []

    def words(case: Case) -> Iterator[str]:
        yield case.operation
        if case.shape != NO_VOCABULARY:
            yield case.shape.name
        if {"responses", "length"} & set(differing) and "tokens" not in without:
            yield f"N={case.tokens}"
        told = {
            "inactive": f"{case.inactive:.0%} inactive", "chunk_mib": f"chunk {case.chunk_mib} MiB",
            "loss_scale": f"loss × {case.loss_scale:g}",
        }  # fmt: skip
        fields = "dtype", "objective", "inactive", "mode", "ragged", "inplace", "cuda_graph", "chunk_mib", "loss_scale"
        for name in fields:
            value = getattr(case, name)
            if name in differing and value not in (False, None) and (name, value) != ("loss_scale", 1.0):
                yield told.get(name, name if value is True else value)

    return {case: " ".join(words(case)) for case in found}
