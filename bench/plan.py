"""The plan of ``hpo-fused-bench all``: fixed lists of things to measure, the most important first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .cases import Case, Mode, Operation, cases_of, parse_shape
from .providers import defaults


@dataclass(frozen=True)
class Part:
    """Cases that are measured alike.

    Args:
        operation, shapes, tokens, dtype, objective, inactive, loss_scale, mode: as on the command line.
        timed: else results are checked and their memory taken.
        who: is measured beside the limits: everybody, all but the device's ``SLOW`` ones, or hpo_fused alone.
    """

    operation: Operation
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    dtype: str = "bf16"
    objective: str = "mhpo_ahpo"
    inactive: float = 0.0
    loss_scale: float = 1.0
    mode: Mode = "both"
    timed: bool = True
    who: Literal["all", "quick", "ours"] = "all"

    def cases(self) -> list[Case]:
        """One for each shape and number of tokens."""
        shapes = [parse_shape(name) for name in self.shapes]
        names = "dtype", "objective", "inactive", "loss_scale", "mode"
        return cases_of({self.operation: self.tokens}, shapes, {}, **{name: getattr(self, name) for name in names})

    def providers(self, device: torch.device) -> list[str]:
        """Names of those who are measured on the device."""
        if self.who == "ours":
            return ["hpo_fused"]
        return [name for name in defaults(device) if self.who == "all" or name not in SLOW[device.type]]


# Compilation, and ten times the time of everybody else.
SLOW = {"cpu": ("compile", "trl:eager"), "cuda": ("compile",)}
CPU_QUICK = (
    Part("policy_loss", ("qwen3-0.6b",), (1024,)),
    Part("linear_policy_loss", ("qwen3-0.6b",), (256,)),
    Part("token_logprobs", ("qwen3-0.6b",), (256,), mode="forward", who="quick"),
    Part("linear_policy_loss", ("qwen3-0.6b",), (256,), inactive=0.75, who="quick"),
)
CPU_FULL = (
    *CPU_QUICK,
    Part("policy_loss", ("gpt2",), (1024,)),
    Part("linear_policy_loss", ("gpt2",), (256,)),
    Part("policy_loss", ("qwen3-0.6b",), (1024,), inactive=0.75, who="quick"),
    Part("logprob_policy_loss", ("qwen3-0.6b",), (65536,)),
    Part("token_logprobs", ("qwen3-0.6b",), (256,), who="quick"),
    Part("linear_token_logprobs", ("qwen3-0.6b",), (256,), mode="forward", who="quick"),
    Part("policy_loss", ("qwen3-0.6b",), (64, 128, 256), timed=False, who="quick"),
    Part("linear_policy_loss", ("qwen3-0.6b",), (64, 128), timed=False, who="quick"),
    Part("policy_loss", ("gpt2",), (256,), dtype="fp32", timed=False, who="quick"),
    Part("policy_loss", ("llama3.2-1b", "gemma2-9b"), (256,), who="quick"),
    Part("linear_policy_loss", ("llama3.2-1b", "gemma3-270m"), (128,), who="quick"),
)
GPU_QUICK = (
    Part("policy_loss", ("qwen3-8b",), (8192,)),
    Part("linear_policy_loss", ("qwen3-8b",), (8192,)),
    Part("policy_loss", ("gpt2",), (8192,)),
    Part("token_logprobs", ("qwen3-8b",), (8192,), mode="forward"),
)
GPU_FULL = (
    # What a few minutes on a GPU are to say first: seconds each, but for those with everybody.
    Part("policy_loss", ("qwen3-8b",), (8192,)),
    Part("policy_loss", ("qwen3-8b",), (8192,), loss_scale=0.25, who="ours"),
    Part("policy_loss", ("qwen3-8b",), (8192,), inactive=0.75, who="ours"),
    Part("policy_loss", ("qwen3-8b",), (8192,), mode="forward", who="ours"),
    Part("policy_loss", ("qwen3-8b",), (8192,), objective="gspo", who="ours"),
    Part("policy_loss", ("qwen3-8b",), (512,), who="ours"),
    Part("policy_loss", ("gemma2-9b",), (8192,), who="ours"),
    Part("linear_policy_loss", ("qwen3-8b", "qwen3-0.6b"), (8192,), who="quick"),
    Part("policy_loss", ("gpt2", "llama3-8b", "gemma3-270m"), (8192,), who="quick"),
    Part("linear_policy_loss", ("qwen3-8b", "qwen3-0.6b"), (8192,), inactive=0.75, who="ours"),
    Part("policy_loss", ("qwen3-8b",), (4096,), dtype="fp32", who="ours"),
    # The rest.
    Part("token_logprobs", ("qwen3-8b",), (8192,), mode="forward"),
    Part("linear_policy_loss", ("gpt2", "llama3-8b", "gemma2-9b"), (8192,)),
    Part("logprob_policy_loss", ("qwen3-8b",), (65536,)),
    Part("token_logprobs", ("qwen3-8b",), (8192,)),
    Part("linear_token_logprobs", ("qwen3-8b",), (8192,)),
    Part("policy_loss", ("qwen3-8b",), (4096,), dtype="fp16"),
    Part("policy_loss", ("qwen3-8b",), (1024, 2048, 4096, 16384), timed=False),
    Part("linear_policy_loss", ("qwen3-8b",), (1024, 2048, 4096, 16384), timed=False),
)
PLANS = {("cpu", True): CPU_QUICK, ("cpu", False): CPU_FULL, ("cuda", True): GPU_QUICK, ("cuda", False): GPU_FULL}
# Kernels are compiled last, for one target of each vendor: it needs no GPU, and ``compile`` has the others.
COMPILED_TARGETS = ("sm_90", "gfx942")
SECONDS_PER_CASE = {"cpu": 15.0, "cuda": 5.0}  # of timing, three rounds at least
