"""The linear path against the float64 oracle, by table: the loss, then the log-probabilities alone."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch

import hpo_fused as hf
from hpo_fused.linear import head
from hpo_fused.linear.head import Float32Gemms
from hpo_fused.torch_backend.compiled_sweeps import ENVIRONMENT_VARIABLE, MINIMUM_WIDTH

from . import linear_equivalence
from .linear_cases import LinearCase
from .linear_equivalence import check_linear, check_linear_logprobs
from .test_equivalence import IN_EVERY_DTYPE, PRESETS, difficult_rows, sequences, shapings, terms
from .test_linear_gemms import Gemms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = {"kl_coef": 0.04, "entropy_coef": 0.02}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def small(name: str, objective: hf.Objective, dtype: torch.dtype = torch.float32, **options: Any) -> LinearCase:
    """A case of few rows: Triton's interpreter takes 20 ms for each."""
    if objective.ratio_level != "token":  # of this shape one response has no advantage
        return LinearCase(name, objective, dtype, responses=6, length=3, small_ratios=True, **options)
    return LinearCase(name, objective, dtype, responses=4, length=4, **options)


def covering() -> list[LinearCase]:
    """Presets in dtypes; layouts, biases, chunks and frozen sides in turn, so that each meets each dtype."""
    frozen = ((), (), ("hidden",), (), ("weight",))
    chunks = (3, None, 1, 3)
    cases = []
    for i, dtype in enumerate(DTYPES):
        for j, (name, objective) in enumerate(PRESETS.items()):
            if dtype != torch.float32 and name not in IN_EVERY_DTYPE:
                continue
            k = 3 * j + i
            cases.append(
                small(
                    f"{name}-{short(dtype)}",
                    objective,
                    dtype,
                    layout=("padded", "packed")[j % 2],
                    bias=k % 3 != 0,
                    chunk_rows=chunks[k % 4],
                    frozen=frozen[k % 5],
                )
            )
    return cases


def presets() -> list[LinearCase]:
    """Presets in dtypes, layouts and ways to cut chunks: 3 rows end inside responses."""
    return [
        LinearCase(
            f"{name}-{short(dtype)}-{layout}-{rows}",
            objective,
            dtype,
            layout,
            small_ratios=objective.ratio_level != "token",
            bias=(i + j // 2 + j) % 2 == 0,
            chunk_rows=rows,
        )
        for i, (name, objective) in enumerate(PRESETS.items())
        for dtype in DTYPES[: 3 if name in IN_EVERY_DTYPE else 1]
        for j, (layout, rows) in enumerate((("padded", None), ("padded", 3), ("packed", 1), ("packed", 3)))
    ]


def further() -> list[LinearCase]:
    """The logits' tables: shapings, sequences, penalties, weights, normalisers, statistics, transforms, hard rows."""
    table = [case for case in terms() + sequences() + shapings() if case.dtype == torch.float32]
    return [
        LinearCase.of(case, short(dtype), dtype=dtype, bias=i % 2 == 0, chunk_rows=(4, None)[i // 2 % 2])
        for i, case in enumerate(table)
        for dtype in (torch.float32, torch.bfloat16)
    ] + [
        # A product of hidden states and a head has no -inf.
        LinearCase.of(case, "linear", bias=True, chunk_rows=4)
        for case in difficult_rows()
        if case.rows not in ("minus_inf", "masked")
    ]


def frozen() -> list[LinearCase]:
    """Every combination of sides without a gradient."""
    sides = ("hidden", "weight", "bias")
    subsets = [tuple(side for bit, side in enumerate(sides) if number >> bit & 1) for number in range(1, 8)]
    return [
        LinearCase(
            f"frozen-{'-'.join(subset)}-{name}-{short(dtype)}",
            PRESETS[name],
            dtype,
            small_ratios=name == "gspo",
            bias=True,
            frozen=subset,
            chunk_rows=rows,
        )
        for subset in subsets
        for name, dtype, rows in (("mhpo_ahpo", torch.bfloat16, 3), ("gspo", torch.float32, None))
    ]


def variations() -> list[LinearCase]:
    """What only the linear path has: float32 logits, autocast, a caller's buffer, a known number of rows."""
    cases = []
    for name in ("mhpo_ahpo", "gspo"):
        for dtype in DTYPES:
            # With penalties no unmasked row is inactive.
            objective = hf.Objective.preset(name, **(BOTH if dtype == torch.bfloat16 else {}))
            for rows in (None, 3):
                head = f"{name}-{short(dtype)}-{rows}"
                options = {"bias": True, "chunk_rows": rows}
                cases.append(small(f"{head}-float32-logits", objective, dtype, logits_dtype=torch.float32, **options))
                cases.append(small(f"{head}-main-grad", objective, dtype, weight_grad=True, **options))
                cases.append(small(f"{head}-exact", objective, dtype, slack=0, **options))
                if dtype != torch.float32:
                    stored = torch.float32
                    cases.append(small(f"{head}-autocast", objective, dtype, stored=stored, **options))
        cases.append(small(f"{name}-autocast-half", PRESETS[name], torch.bfloat16, stored=torch.float16, chunk_rows=3))
        cases.append(
            small(f"{name}-all", PRESETS[name], torch.bfloat16, stored=torch.float32, logits_dtype=torch.float32,
                  weight_grad=True, slack=2, chunk_rows=3, frozen=("hidden",), keep="ids")
        )  # fmt: skip
        for form in ("ids", "bits"):
            for rows, slack in ((None, None), (3, None), (3, 4)):
                options = {"keep": form, "chunk_rows": rows, "slack": slack, "bias": True}
                cases.append(small(f"{name}-{form}-{rows}-{slack}", PRESETS[name], torch.bfloat16, **options))
        objective = hf.Objective.preset(name, **BOTH)
        cases.append(small(f"{name}-capped-bits", objective, keep="bits", options={"softcap": 4.0, "temperature": 0.6}))
    return cases


@pytest.mark.parametrize("case", covering(), ids=str)
def test_matches_the_oracle(case: LinearCase, backend: str, device: torch.device) -> None:
    check_linear(case, backend, device)


@pytest.mark.parametrize("case", presets() + further() + frozen() + variations(), ids=str)
def test_matches_the_oracle_at_large(case: LinearCase, device: torch.device) -> None:
    """With the backend that serves the device by itself: the tables are too long for Triton's interpreter."""
    check_linear(case, "auto", device)


@pytest.mark.parametrize(
    "case",
    [
        small("hard-token", hf.Objective.preset("mhpo_ahpo", **BOTH), torch.bfloat16, bias=True, chunk_rows=3,
              token_weights=True, options={"temperature": 0.7, "softcap": 6.0}),
        small("hard-sequence", hf.Objective.preset("gspo", **BOTH), torch.bfloat16, layout="packed", micro_batch=True,
              chunk_rows=3, options={"temperature": 1.3}),
        small("temperatures-token", PRESETS["mhpo_ahpo"], torch.bfloat16, temperature="token", slack=6, chunk_rows=4),
        small("temperatures-sequence", PRESETS["gspo"], torch.bfloat16, layout="packed", temperature="response",
              chunk_rows=3, options={"softcap": 6.0}),
        small("hard-groups", hf.Objective.preset("ahpo", normalization="group_mean_length"), micro_batch=True,
              chunk_rows=1),
        small("float32-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, logits_dtype=torch.float32, bias=True),
        small("main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, weight_grad=True, chunk_rows=3),
        small("autocast", PRESETS["mhpo_ahpo"], torch.bfloat16, stored=torch.float32, chunk_rows=3, bias=True),
        small("bound-token", PRESETS["mhpo_ahpo"], torch.bfloat16, slack=6, chunk_rows=4, bias=True),
        small("bound-sequence", PRESETS["gspo"], torch.bfloat16, slack=6, chunk_rows=4, bias=True),
        small("kept-ids", hf.Objective.preset("mhpo_ahpo", **BOTH), torch.bfloat16, keep="ids", chunk_rows=3, bias=True,
              options={"temperature": 0.7, "softcap": 6.0}),
        small("kept-bits", PRESETS["gspo"], layout="packed", keep="bits", chunk_rows=4),
    ],
    ids=str,
)  # fmt: skip
def test_options_match_the_oracle(case: LinearCase, backend: str, device: torch.device) -> None:
    check_linear(case, backend, device)


@pytest.mark.parametrize("able", [Float32Gemms(True, False), Float32Gemms(True, True)], ids=["writes", "adds"])
@pytest.mark.parametrize("case", [
    small("elsewhere-token", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, chunk_rows=3),
    small("elsewhere-sequence", PRESETS["gspo"], torch.bfloat16, bias=True, chunk_rows=3),
    small("elsewhere-main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=3, weight_grad=True),
    small("elsewhere-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, logits_dtype=torch.float32),
    small("elsewhere-half", PRESETS["mhpo_ahpo"], torch.float16, bias=True, chunk_rows=3),
    small("elsewhere-autocast", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, stored=torch.float32),
], ids=str)  # fmt: skip
def test_where_gemms_write_float32(case: LinearCase, able: Float32Gemms, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: chunks are then not rounded before they are added, and the bounds say so."""
    stand_in = Gemms(able)
    monkeypatch.setattr(head, "multiplies_in", lambda *_: True)
    monkeypatch.setattr(head, "float32_gemms", lambda *_: able)
    monkeypatch.setattr(linear_equivalence, "float32_gemms", lambda *_: able)
    monkeypatch.setattr(torch, "mm", stand_in.mm)
    monkeypatch.setattr(torch, "addmm", stand_in.addmm)
    check_linear(case, "torch", torch.device("cpu"))
    assert stand_in.written + stand_in.added > 0


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("case", [
    small("processor-token", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, chunk_rows=3),
    small("processor-sequence", PRESETS["gspo"], torch.float16, bias=True, chunk_rows=3),
    small("processor-one-chunk", PRESETS["mhpo_ahpo"], torch.bfloat16),
    small("processor-main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=3, weight_grad=True),
    small("processor-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, logits_dtype=torch.float32),
    small("processor-autocast", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=3, bias=True, stored=torch.float32),
], ids=str)  # fmt: skip
def test_whatever_the_processor_multiplies_in(
    case: LinearCase, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "multiplies_in", lambda dtype, device: multiplies or dtype == torch.float32)
    check_linear(case, "torch", torch.device("cpu"))
    check_linear_logprobs(case, "torch", torch.device("cpu"))


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("slack", [None, 0, 4])
def test_all_statistics(name: str, slack: int | None, backend: str, device: torch.device) -> None:
    options = {"slack": slack, "chunk_rows": 3, "temperature": "token" if slack is None else ""}
    case = small(f"statistics-{name}", PRESETS[name], torch.bfloat16, **options)
    check_linear(case, backend, device, skip_inactive=False)


@pytest.mark.parametrize(("case", "scale"), [
    (small("upstream-token", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, chunk_rows=3), 0.37),
    (small("upstream-sequence", PRESETS["gspo"], torch.bfloat16, bias=True, chunk_rows=3), -3.0),
], ids=str)  # fmt: skip
def test_upstream_gradient(case: LinearCase, scale: float, backend: str, device: torch.device) -> None:
    check_linear(case, backend, device, scale=scale)


@pytest.mark.parametrize("scale", [0.37, -3.0])
@pytest.mark.parametrize("case", [
    small("upstream-float32", PRESETS["hpo"], bias=True),
    small("upstream-autocast", PRESETS["hpo"], torch.bfloat16, stored=torch.float32),
    small("upstream-half", PRESETS["mhpo_ahpo"], torch.float16, bias=True),
    small("upstream-main-grad", PRESETS["ahpo"], torch.bfloat16, bias=True, weight_grad=True, chunk_rows=3),
], ids=str)  # fmt: skip
def test_upstream_gradient_of_variations(case: LinearCase, scale: float, device: torch.device) -> None:
    check_linear(case, "auto", device, scale=scale)


@pytest.mark.parametrize("scale", [2.0**8, 2.0**16])
@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("rows", [None, 3])
def test_loss_scale(name: str, scale: float, rows: int | None, device: torch.device) -> None:
    """2^16 would overflow float16 here, were the statistics' normaliser not as large as a real batch's."""
    statistics = hf.BatchStatistics(responses=2**9, tokens=2**13, positive=2, negative=3)
    case = LinearCase(f"scale-{name}", PRESETS[name], torch.float16, small_ratios=name == "gspo", chunk_rows=rows,
                      bias=True, options={"statistics": statistics})  # fmt: skip
    check_linear(case, "auto", device, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 3])
def test_compiled_vocabulary(
    dtype: torch.dtype, rows: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary that is not small: on the CPU the sweeps are compiled there."""
    if device.type == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")  # a compilation that fails is to be seen
    objective = hf.Objective.preset("mhpo_ahpo", **BOTH)
    case = small("compiled", objective, dtype, vocabulary=MINIMUM_WIDTH + 5, chunk_rows=rows, bias=True)
    check_linear(case, "auto", device)


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 997])
def test_vocabularies(vocabulary: int, device: torch.device) -> None:
    objective = hf.Objective.preset("mhpo_ahpo", **BOTH)
    for dtype in (torch.float32, torch.bfloat16):
        check_linear(
            LinearCase(f"V{vocabulary}", objective, dtype, vocabulary=vocabulary, chunk_rows=4), "auto", device
        )


# ---------------------------------------------------------------------------------------------------------------
# log-probabilities and entropies

OUTPUTS = ["logprobs", "entropy", "both"]
INPUTS = PRESETS["mhpo_ahpo"]  # only the inputs are used of an objective


def logprobs() -> list[LinearCase]:
    transforms = [{}, {"temperature": 0.6}, {"softcap": 4.0}, {"temperature": 1.7, "softcap": 9.0}]
    return [
        LinearCase(
            f"logprobs-{short(dtype)}-{i}",
            INPUTS,
            dtype,
            ("padded", "packed")[i % 2],
            options=options,
            bias=i % 3 == 0,
            chunk_rows=(3, None, 1)[i % 3],
        )
        for dtype in DTYPES
        for i, options in enumerate(transforms)
    ]


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("case", logprobs(), ids=str)
def test_logprobs_match_the_oracle_at_large(case: LinearCase, outputs: str, device: torch.device) -> None:
    check_linear_logprobs(case, "auto", device, outputs=outputs)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(
    "case",
    [
        small("padded", INPUTS, bias=True, chunk_rows=3),
        small("packed", INPUTS, torch.bfloat16, layout="packed", options={"temperature": 0.6}),
        small("half", INPUTS, torch.float16, chunk_rows=3, options={"softcap": 4.0}, temperature="token"),
        small("packed-temperatures", INPUTS, torch.bfloat16, layout="packed", temperature="response", chunk_rows=3),
    ],
    ids=str,
)
def test_logprobs_match_the_oracle(case: LinearCase, outputs: str, backend: str, device: torch.device) -> None:
    check_linear_logprobs(case, backend, device, outputs=outputs)


@pytest.mark.parametrize(
    "case",
    [
        LinearCase("frozen-hidden", INPUTS, torch.bfloat16, frozen=("hidden",), chunk_rows=3, bias=True),
        LinearCase("frozen-head", INPUTS, torch.bfloat16, frozen=("weight", "bias"), chunk_rows=3, bias=True),
        LinearCase("float32-logits", INPUTS, torch.bfloat16, logits_dtype=torch.float32, chunk_rows=3, bias=True),
        LinearCase("autocast", INPUTS, torch.bfloat16, stored=torch.float32, chunk_rows=3, bias=True),
        LinearCase("main-grad", INPUTS, torch.bfloat16, weight_grad=True, chunk_rows=3),
        LinearCase("exact", INPUTS, torch.bfloat16, slack=0, chunk_rows=3),
        LinearCase("bound", INPUTS, torch.bfloat16, slack=5, chunk_rows=3, bias=True),
        LinearCase("peaked", INPUTS, torch.bfloat16, rows="peaked", chunk_rows=3),
        LinearCase("peaked-float32", INPUTS, rows="peaked"),
        LinearCase("kept-ids", INPUTS, torch.bfloat16, keep="ids", chunk_rows=3, options={"softcap": 4.0}),
        LinearCase("kept-bits", INPUTS, torch.float16, keep="bits", layout="packed", slack=1, chunk_rows=3, bias=True),
    ],
    ids=str,
)
def test_logprobs_with_options_match_the_oracle(case: LinearCase, device: torch.device) -> None:
    check_linear_logprobs(case, "auto", device)
