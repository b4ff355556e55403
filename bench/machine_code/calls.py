"""Architectures that the kernels are compiled for, and calls that together reach every code path. Needs no Triton."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

import hpo_fused as hf
from hpo_fused.bench.cases import DTYPES, Operation

MIB = 1 << 20


class Target(NamedTuple):
    """An architecture, and the processors and last-level cache of the GPU whose launch settings are compiled."""

    name: str
    gpu: str
    processors: int
    cache_bytes: int

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def warp_size(self) -> int:
        return 64 if self.amd else 32


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", 108, 40 * MIB),
        Target("sm_90", "H200", 132, 50 * MIB),
        Target("sm_100", "B200", 148, 126 * MIB),
        Target("sm_120", "RTX 5090", 170, 96 * MIB),
        Target("gfx942", "MI300X", 304, 256 * MIB),
        Target("gfx950", "MI355X", 256, 256 * MIB),
    )
}
# One target of each vendor gets every call, the others the core set: a code path that compiles well for one
# architecture of a vendor rarely fails on the next, and where it does it is register pressure, which the core set has
# most of.
FULL_TARGETS = ("sm_90", "gfx942")
VOCABULARY = 151936  # the launch settings depend on the row's length
ROWS, HIDDEN = 2, 16


@functools.cache
def _alone() -> Any:
    """A process group of this process alone."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return distributed.new_group([distributed.get_rank()])


@dataclass(frozen=True)
class Call:
    """One call, on CPU tensors that nothing is computed from.

    Args:
        name: how it is reported.
        operation: the public function.
        core: compiled for every target.
        dtype: of logits or hidden states.
        objective: a preset.
        both_terms, kl: the objective has a KL term, of this kind, and an entropy term.
        gradient: backward is called too; else the call is under no_grad.
        loss_factor: the loss is multiplied by it before backward.
        unaligned: logits start an element off a 16-byte boundary, so that gradients are stored narrowly.
        shard: the logits are a rank's columns of a vocabulary.
        old, everything, packed: old log-probabilities are given; advantages and weights are per token and statistics
            given; the layout is packed.
        arguments: further ones, such as softcap.
    """

    name: str
    operation: Operation = "policy_loss"
    core: bool = False
    dtype: str = "bf16"
    objective: str = "mhpo_ahpo"
    both_terms: bool = False
    kl: Any = "k3"
    gradient: bool = True
    loss_factor: float = 1.0
    unaligned: bool = False
    shard: bool = False
    old: bool = True
    everything: bool = False
    packed: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def softcap(self) -> bool:
        return "softcap" in self.arguments

    @property
    def entropy(self) -> bool:
        """Whether the entropy is computed beside the loss."""
        return bool(self.arguments.get("entropy", True))

    @property
    def roles(self) -> set[str]:
        """Main loops that the call's kernels must have together."""
        if self.operation == "logprob_policy_loss":
            return set()
        return {"statistics", "gradient"} if self.gradient else {"statistics"}

    def run(self) -> None:
        """Call the function, and backward."""
        shape: tuple[int, ...] = (ROWS,) if self.packed else (1, ROWS)  # of one response
        options: dict[str, Any] = {"backend": "triton", **self.arguments}
        if self.shard:
            options["vocab_group"] = _alone()
        tokens, values, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), None
        if self.packed:
            options["cu_seqlens"] = torch.tensor([0, ROWS], dtype=torch.int32)
        else:
            options["mask"] = mask = torch.ones(shape, dtype=torch.bool)
        if self.operation.endswith("policy_loss"):
            terms = {"kl_coef": 0.1, "entropy_coef": 0.01, "kl": self.kl} if self.both_terms else {}
            length = {"max_length": ROWS} if self.objective == "dr_grpo" else {}
            options["objective"] = hf.Objective.preset(self.objective, **terms, **length)
            options["advantages"] = torch.ones(shape if self.everything else 1)
            options["old_logprobs"] = values if self.old else None
            options["ref_logprobs"] = values if self.both_terms else None
            if self.both_terms and self.operation == "logprob_policy_loss":
                options["entropy"] = values
            if self.everything:
                options["token_weights"] = torch.ones(shape)
                options["statistics"] = hf.BatchStatistics.from_batch(
                    torch.ones(1), mask, cu_seqlens=options.get("cu_seqlens")
                )
        with torch.set_grad_enabled(self.gradient):
            inputs = self._inputs(shape)
            leaf = inputs[0].requires_grad_(self.gradient)
            if self.arguments.get("inplace"):
                inputs = (leaf * 1, *inputs[1:])  # not a leaf, as an LM head's output
            ids = () if self.operation == "logprob_policy_loss" else (tokens,)
            out = getattr(hf, self.operation)(*inputs, *ids, **options)
            root = out.loss if self.operation.endswith("policy_loss") else out.logprobs.sum() + out.entropy.sum()
        if self.gradient:
            (root * self.loss_factor).backward()

    def _inputs(self, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        dtype = DTYPES[self.dtype]
        if self.operation == "logprob_policy_loss":
            return (torch.zeros(shape),)
        if self.operation.startswith("linear_"):
            weight = torch.zeros(VOCABULARY, HIDDEN, dtype=dtype)
            return torch.zeros(*shape, HIDDEN, dtype=dtype), weight.requires_grad_(self.gradient)
        width = VOCABULARY + 8 if self.unaligned else VOCABULARY
        logits = torch.zeros(*shape, width, dtype=dtype)
        return (logits[..., 1 : VOCABULARY + 1] if self.unaligned else logits,)


CALLS = (
    # The least and the most that each kernel does, the widest element and the narrow stores.
    Call("default", core=True),
    Call("no entropy", core=True, arguments={"entropy": False}),
    Call("KL and entropy", core=True, both_terms=True),
    Call("KL and entropy, fp32", core=True, dtype="fp32", both_terms=True),
    Call("clip, softcap, KL and entropy", core=True, objective="dapo", both_terms=True, arguments={"softcap": 30.0}),
    Call("truncated ratio, unaligned", core=True, objective="cispo", unaligned=True),
    Call("sequence level", core=True, objective="gspo"),
    Call("log-probabilities and entropies", "token_logprobs", core=True),
    Call("log-probabilities, softcap", "token_logprobs", core=True, arguments={"softcap": 30.0}),
    Call("loss of log-probabilities", "logprob_policy_loss", core=True, both_terms=True),
    Call("shard, KL and entropy", core=True, both_terms=True, shard=True),
    # The other code paths.
    Call("shard, softcap, no entropy", shard=True, arguments={"softcap": 30.0, "entropy": False}),
    Call("shard, temperatures", shard=True, arguments={"temperature": torch.ones(1, ROWS)}),
    Call("no entropy, fp32", dtype="fp32", arguments={"entropy": False}),
    Call("clip, on-policy", objective="grpo", old=False),
    Call("soft gate", objective="sapo"),
    Call("k3_ratio", objective="grpo", both_terms=True, kl="k3_ratio"),
    Call("gamma gate", objective="vespo"),
    Call("geometric mean, packed", objective="gmpo", packed=True),
    Call("forward alone", gradient=False),
    Call("in place", arguments={"inplace": True}),
    Call("scaled gradient", loss_factor=2.0),
    Call("scaled gradient, fp32", dtype="fp32", loss_factor=2.0),
    Call("fp16", dtype="fp16"),
    Call("fp16, KL and entropy", dtype="fp16", both_terms=True),
    Call("packed, everything", packed=True, both_terms=True, everything=True),
    Call("padded, everything", both_terms=True, everything=True),
    Call("temperature, constant length", objective="dr_grpo", arguments={"temperature": 0.7}),
    Call("temperatures of tokens", both_terms=True, arguments={"temperature": torch.ones(1, ROWS)}),
    Call("temperatures, softcap", "token_logprobs", arguments={"temperature": torch.ones(1, ROWS), "softcap": 30.0}),
    Call("sequence level, packed, k3_ratio", objective="gspo", packed=True, both_terms=True, kl="k3_ratio"),
    Call("log-probabilities, fp32", "token_logprobs", dtype="fp32"),
    Call("log-probabilities, forward alone", "token_logprobs", gradient=False),
    Call("loss of log-probabilities, sequence level", "logprob_policy_loss", objective="gspo", packed=True),
    Call("hidden states", "linear_policy_loss", arguments={"active_count": ROWS}),
    Call("hidden states, log-probabilities", "linear_token_logprobs", arguments={"active_count": ROWS}),
)
