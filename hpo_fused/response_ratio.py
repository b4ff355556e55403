"""A ratio that the tokens of a response share: log-ratios in, one for the whole response at each of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from .context_parallel import shared_over_ranks
from .interface import LossSpec, TokenTerms
from .layout import Layout
from .surrogate import ResponseRatio


def response_ratio(terms: TokenTerms, spec: LossSpec) -> ResponseRatio | None:
    """How the tokens of a response share a ratio; None: each has its own."""
    if not spec.shared_ratio:
        return None
    layout, given, context = Layout.of_terms(terms), terms.response_log_ratios, terms.context
    shared: Callable[[Tensor], Tensor]
    shared = layout.response_total if spec.ratio_level == "sequence_sum" else layout.response_mean
    if context is not None:
        shared = partial(shared_over_ranks, layout=layout, spec=spec, context=context)
    reduced = shared if given is None else lambda _: layout.unmasked(given)
    return ResponseRatio(reduced, shared if spec.spreads else None)
