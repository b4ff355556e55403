"""The linear path's cases and their inputs: hidden states, a head, a kept set."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import reference
from hpo_fused.linear.head import GemmDtypes

from .equivalence import (
    Arguments,
    Case,
    build,
)


@dataclass(frozen=True)
class LinearCase(Case):
    """A case of the logits' table, and how it meets the linear path. ``dtype`` is that of the GEMMs."""

    bias: bool = False
    frozen: tuple[str, ...] = ()  # of "hidden", "weight", "bias"
    chunk_rows: int | None = None  # None: all rows in one
    logits_dtype: torch.dtype | None = None
    stored: torch.dtype | None = None  # inputs in another dtype, under autocast
    weight_grad: bool = False
    slack: int | None = None  # active_count, this much above the number of active rows
    keep: str | None = None  # "ids" or "bits": the form of a kept set

    @classmethod
    def of(cls, case: Case, name: str = "", **changes: Any) -> LinearCase:
        """``case`` with other or further fields; ``name`` is added to its own."""
        fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        return cls(**{**fields, "name": f"{case.name}-{name}" if name else case.name, **changes})

    def dtypes(self, device: torch.device) -> GemmDtypes:
        """What the GEMMs run in, which the device decides."""
        return GemmDtypes.of(self.dtype, self.logits_dtype or self.dtype, device)

    def chunk_bytes(self, device: torch.device) -> int | None:
        """What makes chunks of ``chunk_rows`` rows."""
        return (
            None if self.chunk_rows is None else self.chunk_rows * self.vocabulary * self.dtypes(device).bytes_per_logit
        )


@dataclass
class LinearInputs(Arguments):
    """Arguments of ``linear_policy_loss``; ``base`` is the leaf that ``hidden`` is a view of."""

    base: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    active: Tensor
    kept: Tensor | None  # bool [..., V]
    keep: Any  # the same as the argument

    def restricted(self, z: Tensor) -> Tensor:
        """Logits with -inf outside the kept set."""
        return z if self.kept is None else torch.where(self.kept, z, -torch.inf)

    @property
    def attached(self) -> bool:
        """Whether anything needs a gradient."""
        return any(value is not None and value.requires_grad for value in (self.base, self.weight, self.bias))


def kept_set(tokens: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """bool [..., V]: of the rows in turn next to nothing, few ids, many, all; masked rows may keep nothing at all."""
    generator = torch.Generator().manual_seed(tokens.numel())
    share = torch.tensor((0.0, 0.1, 0.6, 1.0))[torch.arange(tokens.numel()).reshape(tokens.shape) % 4]
    kept = torch.rand(*tokens.shape, vocabulary, generator=generator) < share.unsqueeze(-1)
    sampled = torch.zeros_like(kept).scatter_(-1, tokens.clamp(min=0).unsqueeze(-1), True)
    return kept | sampled & mask.unsqueeze(-1)


def id_lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """``keep`` of a bool mask as ids and offsets: ids descend, every third of them is there twice."""
    vocabulary = kept.shape[-1]
    rows, ids = kept.reshape(-1, vocabulary).nonzero(as_tuple=True)
    rows, ids = (value.repeat_interleave(1 + (ids % 3 == 0).long()) for value in (rows, ids))
    order = (rows * vocabulary - ids).argsort()
    counts = torch.bincount(rows, minlength=kept[..., 0].numel())
    return ids[order].short(), torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def bit_mask(kept: Tensor) -> Tensor:
    """``keep`` of a bool mask as int32 words, of strided memory, all bits beyond V set."""
    *shape, vocabulary = kept.shape
    bits = torch.nn.functional.pad(kept, (0, -vocabulary % 32), value=True).reshape(*shape, -1, 32)
    words = torch.zeros(*(size + 1 for size in bits.shape[:-1]), dtype=torch.int32)[tuple(map(slice, bits.shape[:-1]))]
    return words.copy_((bits.long() << torch.arange(32)).sum(-1))


def build_linear(case: LinearCase, device: torch.device, *, skip_inactive: bool = True) -> LinearInputs:
    """Hidden states and head whose product is (nearly) the case's logits; NaN and inf where nothing may look.

    With orthonormal hidden states X, the head Z^T X gives X W^T = Z: the rows keep what makes them difficult. The
    log-ratios are then set anew from the logits that the rounded factors do give.
    """
    made = build(case, torch.device("cpu"))
    stored = case.stored or case.dtype
    z, mask = made.logits.detach().double(), made.mask
    shape, count = z.shape[:-1], z.shape[:-1].numel()
    generator = torch.Generator().manual_seed(count)
    width = -(-max(count, 1) // 8) * 8
    x = torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64))[0].t() * math.sqrt(width)
    offset = torch.randn(case.vocabulary, generator=generator, dtype=torch.float64) if case.bias else torch.zeros(())
    z = torch.where(mask.unsqueeze(-1), z, 3 * torch.randn(z.shape, generator=generator, dtype=torch.float64))
    weight = ((z - offset).reshape(count, -1).t() @ x / width).to(stored)
    hidden = x.reshape(*shape, width).to(stored)
    bias = offset.to(stored) if case.bias else None

    keywords = dict(made.keywords)
    tokens, advantages = made.positional
    kept = None if case.keep is None else kept_set(tokens, mask, case.vocabulary)
    inputs = LinearInputs(made.positional, keywords, mask, hidden, hidden, weight, bias, mask, kept, None)
    product = exact_logits(inputs, case.dtype)[0].to(case.logits_dtype or case.dtype).double()
    product = inputs.restricted(product)
    after, before = (
        reference.token_logprobs(values, tokens, mask=mask, **inputs.transform).logprobs
        for values in (product, made.logits.detach().double())
    )
    for name in {"old_logprobs", "ref_logprobs"} & keywords.keys():
        keywords[name] = keywords[name] + torch.where(mask, after - before, 0.0).float()
    zeros = torch.zeros(tokens.shape)
    inputs.active = hf.logprob_policy_loss(zeros, advantages, entropy=zeros, **inputs.terms).active

    hidden = torch.where(mask.unsqueeze(-1), hidden, torch.nan)
    if skip_inactive:
        hidden = torch.where((inputs.active | ~mask).unsqueeze(-1), hidden, torch.inf)
    base = hidden
    if case.layout == "padded":
        base = torch.full((shape[0], shape[1] + 1, width), torch.nan, dtype=stored)
        base[:, :-1] = hidden
    inputs.base = base.to(device).requires_grad_("hidden" not in case.frozen)
    inputs.hidden = inputs.base[:, :-1] if case.layout == "padded" else inputs.base
    inputs.weight = weight.to(device).requires_grad_("weight" not in case.frozen)
    inputs.bias = None if bias is None else bias.to(device).requires_grad_("bias" not in case.frozen)
    inputs.positional = tokens.to(device), advantages.to(device)
    inputs.mask, inputs.active = mask.to(device), inputs.active.to(device)
    if kept is not None:
        inputs.kept = kept.to(device)
        inputs.keep = bit_mask(kept).to(device) if case.keep == "bits" else tuple(x.to(device) for x in id_lists(kept))
    if device.type != "cpu":
        on_device = build(case, device).keywords  # statistics and groups
        inputs.keywords = on_device | {k: v.to(device) for k, v in keywords.items() if isinstance(v, Tensor)}
    return inputs


def exact_logits(inputs: LinearInputs, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden weight^T + bias of the factors as the GEMMs take them, and the sum of the products' absolute values."""
    x, w = (value.detach().to(compute).double() for value in (inputs.hidden, inputs.weight))
    z, size = x @ w.t(), x.abs() @ w.t().abs()
    if inputs.bias is not None:
        bias = inputs.bias.detach().to(compute).double()
        z, size = z + bias, size + bias.abs()
    return z, size
