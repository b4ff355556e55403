"""The plan of ``hpo-fused-bench all``: fixed lists of things to measure, the most important first."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import Case, Mode, Operation, cases_of, parse_shape


@dataclass(frozen=True)
class Part:
    """Cases that are measured alike.

    Args:
        operation, shapes, tokens, dtype, inactive, mode: as on the command line.
        timed: else results are checked and their memory taken.
        slow: providers of ``SLOW_ON_CPU`` are measured there, too.
    """

    operation: Operation
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    dtype: str = "bf16"
    inactive: float = 0.0
    mode: Mode = "both"
    timed: bool = True
    slow: bool = True

    def cases(self) -> list[Case]:
        """One for each shape and number of tokens."""
        shapes = [parse_shape(name) for name in self.shapes]
        fields = {"dtype": self.dtype, "inactive": self.inactive, "mode": self.mode}
        return cases_of({self.operation: self.tokens}, shapes, {}, **fields)


# Compilation, and ten times the time of everybody else.
SLOW_ON_CPU = ("compile", "trl:eager")
CPU_QUICK = (
    Part("policy_loss", ("qwen3-0.6b",), (1024,)),
    Part("linear_policy_loss", ("qwen3-0.6b",), (256,)),
    Part("token_logprobs", ("qwen3-0.6b",), (256,), mode="forward", slow=False),
    Part("linear_policy_loss", ("qwen3-0.6b",), (256,), inactive=0.75, slow=False),
)
CPU_FULL = (
    *CPU_QUICK,
    Part("policy_loss", ("gpt2",), (1024,)),
    Part("linear_policy_loss", ("gpt2",), (256,)),
    Part("policy_loss", ("qwen3-0.6b",), (1024,), inactive=0.75, slow=False),
    Part("logprob_policy_loss", ("qwen3-0.6b",), (65536,)),
    Part("token_logprobs", ("qwen3-0.6b",), (256,), slow=False),
    Part("linear_token_logprobs", ("qwen3-0.6b",), (256,), mode="forward", slow=False),
    Part("policy_loss", ("qwen3-0.6b",), (64, 128, 256), timed=False, slow=False),
    Part("linear_policy_loss", ("qwen3-0.6b",), (64, 128), timed=False, slow=False),
    Part("policy_loss", ("gpt2",), (256,), dtype="fp32", timed=False, slow=False),
    Part("policy_loss", ("llama3.2-1b", "gemma2-9b"), (256,), slow=False),
    Part("linear_policy_loss", ("llama3.2-1b", "gemma3-270m"), (128,), slow=False),
)
GPU_QUICK = (
    Part("policy_loss", ("qwen3-8b",), (8192,)),
    Part("linear_policy_loss", ("qwen3-8b",), (8192,)),
    Part("policy_loss", ("gpt2",), (8192,)),
    Part("token_logprobs", ("qwen3-8b",), (8192,), mode="forward"),
)
GPU_FULL = (
    *GPU_QUICK,
    Part("policy_loss", ("llama3-8b", "gemma2-9b", "gemma3-270m"), (8192,)),
    Part("linear_policy_loss", ("qwen3-0.6b", "gpt2", "llama3-8b", "gemma2-9b"), (8192,)),
    Part("policy_loss", ("qwen3-8b",), (8192,), inactive=0.75),
    Part("linear_policy_loss", ("qwen3-8b",), (8192,), inactive=0.75),
    Part("logprob_policy_loss", ("qwen3-8b",), (65536,)),
    Part("token_logprobs", ("qwen3-8b",), (8192,)),
    Part("linear_token_logprobs", ("qwen3-8b",), (8192,)),
    Part("policy_loss", ("qwen3-8b",), (4096,), dtype="fp32"),
    Part("policy_loss", ("qwen3-8b",), (4096,), dtype="fp16"),
    Part("policy_loss", ("qwen3-8b",), (1024, 2048, 4096, 16384), timed=False),
    Part("linear_policy_loss", ("qwen3-8b",), (1024, 2048, 4096, 16384), timed=False),
)
PLANS = {("cpu", True): CPU_QUICK, ("cpu", False): CPU_FULL, ("cuda", True): GPU_QUICK, ("cuda", False): GPU_FULL}
# Kernels are compiled last, for one target of each vendor: it needs no GPU, and ``compile`` has the others.
COMPILED_TARGETS = ("sm_90", "gfx942")
SECONDS_PER_CASE = {"cpu": 15.0, "cuda": 5.0}  # of timing, three rounds at least
