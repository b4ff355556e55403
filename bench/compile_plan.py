"""What is compiled: variants of the kernels, targets, and a set of both that covers every code path in CI's time.

Needs no Triton: the process that shows a report plans it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]
# One target of each vendor gets every variant, the others those of ``CORE``: a code path that compiles well for one
# architecture of a vendor rarely fails on the next, and where it does it is register pressure, which CORE's have most.
FULL_TARGETS = ("sm_90", "gfx942")
VOCABULARY = 151936  # the launch settings depend on the row's length
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Variant:
    """One compilation: ``kernel`` is the launcher's name, the rest its constexpr choices."""

    kernel: str
    dtype: str
    softcap: bool = False
    entropy: bool = False
    entropy_term: bool = False
    kind: str = "log_fidelity"
    old: bool = True
    kl: bool = False
    gradient: bool = True
    aligned_out: bool = True
    shared: bool = False  # several programs share a row
    sequence: bool = False
    weights: str = "batch"  # where token weights come from, see ``compile_variant.WEIGHTS``

    @property
    def name(self) -> str:
        flags = ("softcap", "entropy", "entropy_term", "kl")
        parts = [self.dtype] + [flag for flag in flags if getattr(self, flag)]
        if self.kernel.endswith("policy_loss"):
            parts.append(self.kind)
            parts += [] if self.old else ["on_policy"]
            parts += [] if self.gradient else ["loss_only"]
        parts += ["sequence"] if self.sequence else []
        parts += [] if self.weights == "batch" else [self.weights]
        parts += [] if self.aligned_out else ["unaligned_out"]
        return "/".join(parts + (["shared"] if self.shared else []))

    @property
    def full_name(self) -> str:
        """What ``--only`` selects by."""
        return f"{self.kernel}/{self.name}"


# The variants that the roofline model reads: the default objective, and the capped one that is compiled.
DEFAULT = Variant("fused_policy_loss", "bf16", entropy=True)
CAPPED = Variant("fused_policy_loss", "bf16", softcap=True, entropy=True, entropy_term=True, kl=True, kind="clip")

# Both of those, the least and the most that a sweep does in each kernel, the widest element and the narrow stores.
CORE = (
    Variant("fused_policy_loss", "bf16"),
    DEFAULT,
    Variant("fused_policy_loss", "bf16", entropy=True, entropy_term=True, kl=True),
    Variant("fused_policy_loss", "fp32", entropy=True, entropy_term=True, kl=True),
    CAPPED,
    Variant("fused_policy_loss", "bf16", kind="truncated_ratio", entropy=True, aligned_out=False),
    Variant("token_statistics", "bf16", entropy=True, softcap=True),
    Variant("combine_statistics", "bf16", entropy=True),
    Variant("token_gradient", "bf16", entropy_term=True),
    Variant("scale_gradient", "bf16"),
    Variant("response_statistics", "fp32", weights="packed"),
    Variant("computed_rows", "fp32", sequence=True, weights="packed"),
    Variant("logprob_policy_loss", "fp32", entropy_term=True, kl=True, sequence=True, kind="clip", weights="packed"),
)


def covering_variants() -> list[Variant]:
    """Every kernel, dtype, kind and switch, and the pairs that share registers; not the full product of 1,000."""
    variants = list(CORE)
    for dtype in ITEMSIZE:
        if dtype != "fp16":  # float16 logits take the two kernels: a loss scaler's factor comes in between
            variants += [
                Variant("fused_policy_loss", dtype),
                Variant("fused_policy_loss", dtype, entropy=True, entropy_term=True, kl=True),
            ]
        variants += [
            Variant("token_statistics", dtype, entropy=True),
            Variant("token_gradient", dtype, entropy_term=True),
            Variant("scale_gradient", dtype),
        ]
    variants += [
        Variant("fused_policy_loss", "bf16", gradient=False, entropy=True),
        Variant("fused_policy_loss", "bf16", entropy=True, weights="prepared"),
        Variant("fused_policy_loss", "bf16", entropy=True, weights="packed"),
        Variant("fused_policy_loss", "bf16", kind="clip", entropy=True, old=False),
        Variant("fused_policy_loss", "bf16", kind="soft_gate", entropy=True),
        Variant("token_statistics", "bf16"),
        Variant("token_statistics", "bf16", entropy=True, shared=True),
        Variant("token_statistics", "bf16", entropy=True, softcap=True, shared=True),
        Variant("combine_statistics", "bf16", softcap=True),
        Variant("token_gradient", "bf16"),
        Variant("token_gradient", "bf16", softcap=True),
        Variant("response_statistics", "fp32"),
        Variant("computed_rows", "fp32"),
        Variant("logprob_policy_loss", "fp32"),
    ]
    return list(dict.fromkeys(variants))


@dataclass(frozen=True)
class Job:
    """One compilation for one target."""

    variant: Variant
    target: str


def plan(targets: Iterable[str], only: str = "", every: bool = False) -> list[Job]:
    """The jobs, target by target. ``only`` and ``every`` ask for all variants (whose name contains ``only``) on each
    target; otherwise a target that is not of ``FULL_TARGETS`` gets ``CORE``.
    """
    variants = [variant for variant in covering_variants() if only in variant.full_name]
    return [
        Job(variant, target)
        for target in targets
        for variant in variants
        if every or only or target in FULL_TARGETS or variant in CORE
    ]


def coverage(jobs: Iterable[Job]) -> str:
    """What ``jobs`` cover, in a line."""
    names: dict[str, list[str]] = {}
    for job in jobs:
        names.setdefault(job.target, []).append(job.variant.full_name)
    alike: dict[tuple[str, ...], list[str]] = {}
    for target, those in names.items():
        alike.setdefault(tuple(those), []).append(target)
    total = len(covering_variants())
    parts = [f"{len(those)} of {total} variants on {', '.join(targets)}" for those, targets in alike.items()]
    return "Covered: " + "; ".join(parts) + f"; launch settings of V = {VOCABULARY}."
