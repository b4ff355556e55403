"""The suites have to reject wrong code: what a mutant is, and the cases that have to notice it.

Every mutant replaces one piece of the package by a mistake that somebody has made or could make, and must fail at
least one case of its suites with an assertion (not a crash). A mutant that survives means a hole in a table. The cases
are those that the tests hold the right code against. Mutants stand in the files ``test_wrong_*.py``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

import hpo_fused as hf
from hpo_fused import torch_backend
from hpo_fused.backend import kernels

from . import test_logprob_loss, test_shards, test_token_terms
from .equivalence import check
from .linear_cases import LinearCase
from .linear_equivalence import check_linear, check_linear_logprobs
from .test_equivalence import PRESETS, difficult_rows, presets, sequences, shapings, terms

Patch = pytest.MonkeyPatch
Place = tuple[Any, str]  # an object and its attribute
CPU = torch.device("cpu")

# The most discerning first, and first of all what finds wrong weights: Triton's interpreter takes its time.
_FIRST = (
    "uncounted-response", "peaked-float32", "response-packed-True", "group_mean_length-padded-False", "weights",
    "kl-entropy-transform", "mean_length-padded-True", "entropy-weights", "temperatures-of-tokens",
)  # fmt: skip
LOGITS = sorted(
    (c for c in difficult_rows() + terms() + sequences() + shapings() + presets() if c.dtype == torch.float32),
    key=lambda case: _FIRST.index(case.name) if case.name in _FIRST else len(_FIRST),
)
# Few cases, each with much in it: all that test_linear_equivalence.py holds the right code against is far more.
_OBJECTIVE = hf.Objective.preset("mhpo_ahpo", kl_coef=0.04, entropy_coef=0.02)
LINEAR = [
    LinearCase(
        "token", _OBJECTIVE, torch.bfloat16, bias=True, chunk_rows=3, temperature="token", options={"softcap": 6.0}
    ),
    LinearCase("token-float32", PRESETS["mhpo_ahpo"], bias=True, chunk_rows=4),
    LinearCase("one-chunk", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, layout="packed"),
    LinearCase("sequence", PRESETS["gspo"], torch.bfloat16, bias=True, chunk_rows=3, small_ratios=True),
    LinearCase("half", PRESETS["mhpo_ahpo"], torch.float16, chunk_rows=4, bias=True),
    LinearCase("main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=3, weight_grad=True),
    LinearCase("bound", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=4, slack=12),
    LinearCase("float32-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, logits_dtype=torch.float32),
    LinearCase("kept-ids", PRESETS["gspo"], chunk_rows=3, small_ratios=True, slack=1, keep="ids"),
    LinearCase("kept-bits", PRESETS["mhpo_ahpo"], chunk_rows=3, keep="bits"),
]


class Suite(NamedTuple):
    """Cases, and what is asserted of each on a device."""

    cases: Sequence[Any]
    check: Callable[[Any, torch.device], None]

    def fails(self, device: torch.device) -> bool:
        for case in self.cases:
            try:
                self.check(case, device)
            except AssertionError:
                return True
        return False


SUITES = {
    "torch": Suite(LOGITS, lambda case, _: check(case, "torch", CPU)),
    "triton": Suite(LOGITS, lambda case, device: check(case, "triton", device)),
    "token_terms": Suite(test_token_terms.CASES, lambda case, device: test_token_terms.check(case, "triton", device)),
    "logprob_loss": Suite(
        test_logprob_loss.CASES[::-1], lambda case, device: test_logprob_loss.check(*case, "triton", device)
    ),
    "shards_in_torch": Suite(list(test_shards.CASES), lambda case, device: test_shards.check(case, "torch", device)),
    "shards": Suite(list(test_shards.CASES), lambda case, device: test_shards.check(case, "triton", device)),
    "linear": Suite(
        LINEAR, lambda case, _: check_linear(case, "torch", CPU, scale=None if case.dtype == torch.float16 else 0.5)
    ),
    "linear_logprobs": Suite(LINEAR[:1], lambda case, _: check_linear_logprobs(case, "torch", CPU)),
}
TORCH, BOTH, OF_LINEAR = ("torch",), ("torch", "triton"), ("linear", "linear_logprobs")
OF_KERNELS = ("triton", "token_terms", "logprob_loss", "shards")


class Instead:
    """A function, method or kernel by which ``change(original, *arguments)`` stands in for the original."""

    def __init__(self, original: Any, change: Callable[..., Any]) -> None:
        self.original, self.change = original, change

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.change(self.original, *arguments, **options)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __getitem__(self, grid: Any) -> Instead:
        return Instead(self.original[grid], self.change)


class Mutant(NamedTuple):
    """What stands in for the original at each of ``places``; ``interpreted``: a device function, so not on a GPU."""

    places: Sequence[Place]
    change: Callable[..., Any]
    interpreted: bool

    def apply(self, patch: Patch) -> None:
        for owner, attribute in self.places:
            patch.setattr(owner, attribute, Instead(getattr(owner, attribute), self.change))


class Mutants:
    """The mutants of a file, by suite and name."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str], Mutant] = {}

    def wrong(
        self,
        name: str,
        suites: Sequence[str],
        places: Sequence[Place],
        change: Callable[..., Any],
        interpreted: bool = False,
    ) -> None:
        """Each of ``suites`` has to reject the mutant."""
        for suite in suites:
            self._all[suite, name] = Mutant(places, change, interpreted)

    def mutant(
        self, suites: Sequence[str], *places: Place, interpreted: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The same as a decorator of ``change``."""

        def register(change: Callable[..., Any]) -> Callable[..., Any]:
            self.wrong(change.__name__, suites, places, change, interpreted)
            return change

        return register

    def parameters(self) -> list[Any]:
        """(suite, name) of all, for a test."""
        return [pytest.param(*key, id="-".join(key)) for key in self._all]

    def reject(self, suite: str, name: str, patch: Patch, device: torch.device) -> None:
        """Apply a mutant and see its suite fail."""
        if suite in OF_KERNELS and kernels is None:
            pytest.skip("needs Triton")
        mutated = self._all[suite, name]
        if mutated.interpreted and (kernels is None or not kernels.interpreting()):
            pytest.skip("replaces a device function: only in the interpreter")
        mutated.apply(patch)
        assert SUITES[suite].fails(device), f"no case of the suite notices {name}"


def kernel_module(name: str) -> Any:
    """A module of the kernels; None without Triton."""
    return None if kernels is None else importlib.import_module(f"hpo_fused.kernels.{name}")


def of_backends(attribute: str) -> list[Place]:
    """A function of the same name in every backend."""
    return [(module, attribute) for module in (torch_backend, kernels) if module is not None]
