"""Bad input to the linear path, one by one: the error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused.linear_plan import ChunkPlan

HIDDEN, WEIGHT, BIAS = torch.randn(2, 3, 4), torch.randn(11, 4), torch.randn(11)
TOKENS, ADVANTAGES = torch.randint(11, (2, 3)), torch.tensor([1.0, -1.0])
PARAMETER = WEIGHT.clone().requires_grad_()
CU = torch.tensor([0, 2, 6])
META = torch.ones(11, 4, device="meta")


def token_at(value: int) -> Tensor:
    tokens = TOKENS.clone()
    tokens[1, 2] = value
    return tokens


def autocast(call: Callable[[], object]) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


# Of both functions: (arguments, error, words). "hidden", "weight" and "tokens" are positional.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden-list": ({"hidden": [1.0]}, TypeError, "hidden: expected a float16, bfloat16 or float32 tensor, got list"),
    "hidden-none": ({"hidden": None}, TypeError, "hidden: .*NoneType"),
    "hidden-float64": ({"hidden": HIDDEN.double()}, TypeError, r"hidden: .*float64 \[2, 3, 4\]"),
    "hidden-integer": ({"hidden": HIDDEN.long()}, TypeError, "hidden: .*int64"),
    "hidden-dims": ({"hidden": HIDDEN[0, 0]}, ValueError, r"hidden: expected shape \[B, T, H\] or \[N, H\].*\[4\]"),
    "hidden-four": ({"hidden": HIDDEN[None]}, ValueError, r"hidden: .*\[1, 2, 3, 4\]"),
    "hidden-empty": ({"hidden": HIDDEN[..., :0]}, ValueError, r"hidden: .*H > 0.*\[2, 3, 0\]"),
    "weight-list": ({"weight": [1.0]}, TypeError, "weight: expected a float16.*list"),
    "weight-float64": ({"weight": WEIGHT.double()}, TypeError, r"weight: .*float64 \[11, 4\]"),
    "weight-dims": ({"weight": WEIGHT[0]}, ValueError, r"weight: expected shape \[V, 4\].*\[4\]"),
    "weight-transposed": ({"weight": WEIGHT.t()}, ValueError, r"weight: .*nn.Linear.*\[4, 11\]"),
    "weight-empty": ({"weight": WEIGHT[:0]}, ValueError, r"weight: .*V > 0.*\[0, 4\]"),
    "weight-device": ({"weight": META}, ValueError, "weight: expected a tensor on cpu.*meta"),
    "weight-dtype": (
        {"weight": WEIGHT.bfloat16()},
        TypeError,
        r"weight: expected hidden's dtype float32 \(or torch.autocast\).*bfloat16",
    ),
    "bias-list": ({"bias": [1.0]}, TypeError, "bias: expected a float16.*list"),
    "bias-float64": ({"bias": BIAS.double()}, TypeError, "bias: .*float64"),
    "bias-shape": ({"bias": BIAS[:4]}, ValueError, r"bias: expected shape \[11\].*\[4\]"),
    "bias-dims": ({"bias": BIAS[None]}, ValueError, r"bias: .*\[11\].*\[1, 11\]"),
    "bias-device": ({"bias": META[:, 0]}, ValueError, "bias: expected a tensor on cpu.*meta"),
    "bias-dtype": ({"bias": BIAS.bfloat16()}, TypeError, "bias: expected weight's dtype.*bfloat16.*float32"),
    "logits-dtype": ({"logits_dtype": torch.bfloat16}, TypeError, "logits_dtype: expected None, torch.float32, got "),
    "logits-dtype-half": (
        {"hidden": HIDDEN.bfloat16(), "weight": WEIGHT.bfloat16(), "logits_dtype": torch.float16},
        TypeError,
        "logits_dtype: expected None, torch.float32 or torch.bfloat16, got torch.float16",
    ),
    "logits-dtype-double": ({"logits_dtype": torch.float64}, TypeError, "logits_dtype: .*float64"),
    "logits-dtype-name": ({"logits_dtype": "float32"}, TypeError, "logits_dtype: .*'float32'"),
    "tokens-shape": ({"tokens": TOKENS[:, :2]}, ValueError, r"tokens: expected shape \[2, 3\].*\[2, 2\]"),
    "tokens-dtype": ({"tokens": TOKENS.float()}, TypeError, "tokens: expected an integer.*float32"),
    "tokens-list": ({"tokens": [[1]]}, TypeError, "tokens: .*list"),
    "tokens-high": ({"tokens": token_at(11)}, ValueError, r"tokens: expected ids in \[0, 11\).*11"),
    "tokens-negative": ({"tokens": token_at(-100)}, ValueError, "tokens: .*-100"),
    "mask-shape": ({"mask": torch.ones(2, 4)}, ValueError, r"mask: .*\[2, 3\].*\[2, 4\]"),
    "mask-type": ({"mask": [1]}, TypeError, "mask: .*list"),
    "mask-fractional": ({"mask": torch.full((2, 3), 0.5)}, ValueError, "mask: .*0 and 1"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: .*> 0.*0.0"),
    "temperature-type": ({"temperature": "1"}, TypeError, "temperature: .*str"),
    "softcap": ({"softcap": -30.0}, ValueError, "softcap: .*-30"),
    "softcap-nan": ({"softcap": math.nan}, ValueError, "softcap: .*nan"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: expected one of .*'cuda'"),
    "chunk-bytes-low": ({"chunk_bytes": 43}, ValueError, "chunk_bytes: .*at least one row.* 44 bytes at V = 11.* 43"),
    "chunk-bytes-zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes: .*0"),
    "chunk-bytes-negative": ({"chunk_bytes": -1}, ValueError, "chunk_bytes: .*-1"),
    "chunk-bytes-bool": ({"chunk_bytes": True}, TypeError, "chunk_bytes: expected an int or None, got bool True"),
    "chunk-bytes-float": ({"chunk_bytes": 1e9}, TypeError, "chunk_bytes: .*float"),
    "chunk-bytes-logits": (  # a row of float32 logits has its bfloat16 gradient beside it
        {"hidden": HIDDEN.bfloat16(), "weight": WEIGHT.bfloat16(), "logits_dtype": torch.float32, "chunk_bytes": 65},
        ValueError,
        "chunk_bytes: .* 66 bytes.*65",
    ),
    "count-bool": ({"active_count": True}, TypeError, "active_count: expected an int or None, got bool True"),
    "count-float": ({"active_count": 6.0}, TypeError, "active_count: .*float"),
    "count-tensor": ({"active_count": torch.tensor(6)}, TypeError, "active_count: .*int64"),
    "count-float-tensor": ({"active_count": torch.tensor(6.0)}, TypeError, "active_count: .*float32"),
    "count-tensors": ({"active_count": torch.tensor([6, 6])}, TypeError, r"active_count: .*int64 \[2\]"),
    "count-negative": ({"active_count": -1}, ValueError, "active_count: expected between 0 and 6 rows, got -1"),
    "count-high": ({"active_count": 7}, ValueError, "active_count: .*between 0 and 6 rows, got 7"),
    "count-low": ({"active_count": 5}, ValueError, "active_count: expected at least the 6 active rows, got 5"),
    "main-grad-list": ({"weight_grad": [1.0]}, TypeError, r"weight_grad: expected a float32 tensor \[11, 4\].* list"),
    "main-grad-dtype": ({"weight_grad": WEIGHT.bfloat16()}, TypeError, "weight_grad: .*float32.*bfloat16"),
    "main-grad-shape": ({"weight_grad": torch.zeros(4, 11)}, ValueError, r"weight_grad: .*\[11, 4\].*\[4, 11\]"),
    "main-grad-device": ({"weight_grad": META}, ValueError, "weight_grad: expected a tensor on cpu.*meta"),
    "main-grad-leaf": (
        {"weight_grad": torch.zeros(11, 4, requires_grad=True)},
        ValueError,
        "weight_grad: expected a buffer that does not require grad",
    ),
    "main-grad-frozen": (
        {"weight": WEIGHT, "weight_grad": torch.zeros(11, 4)},
        ValueError,
        "weight_grad: expected None for a weight that does not require grad",
    ),
}  # fmt: skip


def loss(hidden: Any = HIDDEN, weight: Any = PARAMETER, tokens: Any = TOKENS, **options: Any) -> object:
    advantages = options.pop("advantages", ADVANTAGES)
    return hf.linear_policy_loss(hidden, weight, tokens, advantages, **options)


def logprobs(hidden: Any = HIDDEN, weight: Any = PARAMETER, tokens: Any = TOKENS, **options: Any) -> object:
    return hf.linear_token_logprobs(hidden, weight, tokens, **options)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_bad_input(name: str, objective: str) -> None:
    options, error, words = BAD[name]
    with pytest.raises(error, match=words):
        loss(**options, objective=objective)
    with torch.no_grad(), pytest.raises(error, match=words):
        loss(**options, objective=objective)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("masked", [False, True])
def test_bad_input_to_log_probabilities(name: str, masked: bool) -> None:
    """With a mask and without one, where no row has to be chosen."""
    options, error, words = BAD[name]
    options = {"mask": torch.ones(2, 3, dtype=torch.bool), **options} if masked else options
    with pytest.raises(error, match=words):
        logprobs(**options)


LOSS_ONLY: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "advantages-shape": ({"advantages": torch.ones(3)}, ValueError, r"advantages: .*\[2\].*\[3\]"),
    "advantages-type": ({"advantages": 1.0}, TypeError, "advantages: .*float"),
    "advantages-device": ({"advantages": torch.ones(2, device="meta")}, ValueError, "advantages: .*cpu.*meta"),
    "old-shape": ({"old_logprobs": torch.zeros(2)}, ValueError, r"old_logprobs: .*\[2, 3\].*\[2\]"),
    "ref-missing": ({"objective": hf.Objective(kl_coef=0.1)}, ValueError, "ref_logprobs: .*kl_coef=0.1.*None"),
    "weights-shape": ({"token_weights": torch.ones(3)}, ValueError, r"token_weights: .*\[3\]"),
    "cu-missing": (
        {"hidden": HIDDEN.view(6, 4), "tokens": TOKENS.view(6)},
        ValueError,
        "cu_seqlens: expected response boundaries.*None",
    ),
    "cu-padded": ({"cu_seqlens": CU}, ValueError, "cu_seqlens: expected None"),
    "cu-falling": (
        {"hidden": HIDDEN.view(6, 4), "tokens": TOKENS.view(6), "cu_seqlens": torch.tensor([0, 7, 6])},
        ValueError,
        r"cu_seqlens: .*\[0, 7, 6\]",
    ),
    "groups-missing": (
        {"objective": hf.Objective(normalization="group_mean_length")},
        ValueError,
        "groups: .*group_mean_length.*None",
    ),
    "max-length": ({"objective": "dr_grpo"}, ValueError, "max_length: .*constant.*None"),
    "objective-name": ({"objective": "grpoo"}, ValueError, "objective: expected one of grpo.*'grpoo'"),
    "objective-type": ({"objective": 3}, TypeError, "objective: .*int"),
    "statistics-type": ({"statistics": {}}, TypeError, "statistics: expected a BatchStatistics.*dict"),
}


@pytest.mark.parametrize("name", LOSS_ONLY)
def test_bad_loss_input(name: str) -> None:
    options, error, words = LOSS_ONLY[name]
    with pytest.raises(error, match=words):
        loss(**options)


def test_bad_input_under_autocast() -> None:
    """Any of the three dtypes goes, and no other; float32 logits or the GEMMs' own."""
    autocast(lambda: loss(weight=WEIGHT.half().requires_grad_(), bias=BIAS.bfloat16()))
    with pytest.raises(TypeError, match=r"weight: .*float64"):
        autocast(lambda: loss(weight=WEIGHT.double()))
    with pytest.raises(TypeError, match=r"logits_dtype: expected None, torch.float32 or torch.bfloat16, got .*16"):
        autocast(lambda: loss(logits_dtype=torch.float16))


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
@pytest.mark.parametrize("options", [{"chunk_bytes": 1}, {"chunk_bytes": True}, {"active_count": 99}], ids=str)
def test_bad_options_are_noticed_without_an_active_row(objective: str, options: dict[str, Any]) -> None:
    """Or they would come up on the first batch that has one."""
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))}: "):
        loss(advantages=torch.zeros(2), objective=objective, **options)


@pytest.mark.parametrize("token", [-1, 11, 2**40, -100])
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_token_ids_of_uncomputed_rows(token: int, objective: str) -> None:
    """Checked at all unmasked positions, though nothing is computed there; at masked ones nothing is.

    (On the CPU. On a GPU an assert on the device, which would end this process.)
    """
    with pytest.raises(ValueError, match=f"tokens: .*{token}"):
        loss(tokens=token_at(token), advantages=torch.zeros(2), objective=objective)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    loss(tokens=token_at(token), mask=mask, objective=objective)
    logprobs(tokens=token_at(token), mask=mask)


def test_a_failed_call_leaves_the_buffer_alone() -> None:
    buffer = torch.ones(11, 4)
    with pytest.raises(ValueError, match="tokens"):
        loss(tokens=token_at(11), weight_grad=buffer)
    assert torch.equal(buffer, torch.ones(11, 4))


MEMORY: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows-float": ({"rows": 8.0}, TypeError, "rows: expected an int, got float 8.0"),
    "rows-bool": ({"rows": True}, TypeError, "rows: .*bool True"),
    "rows-negative": ({"rows": -1}, ValueError, "rows: expected a count >= 0, got -1"),
    "hidden-size": ({"hidden_size": None}, TypeError, "hidden_size: .*NoneType"),
    "hidden-size-negative": ({"hidden_size": -4}, ValueError, "hidden_size: .*-4"),
    "vocabulary": ({"vocabulary": "11"}, TypeError, "vocabulary: .*'11'"),
    "vocabulary-negative": ({"vocabulary": -11}, ValueError, "vocabulary: .*-11"),
    "tokens": ({"tokens": 1.5}, TypeError, "tokens: .*1.5"),
    "tokens-negative": ({"tokens": -2}, ValueError, "tokens: .*-2"),
    "dtype": ({"dtype": torch.float64}, TypeError, "dtype: expected float16, bfloat16 or float32, got .*float64"),
    "dtype-name": ({"dtype": "bfloat16"}, TypeError, "dtype: .*'bfloat16'"),
    "autocast": ({"autocast": torch.int8}, TypeError, "autocast: .*int8"),
    "logits-dtype": ({"logits_dtype": torch.float64}, TypeError, "logits_dtype: .*float64"),
    "logits-dtype-half": ({"logits_dtype": torch.float16}, TypeError, "logits_dtype: .*bfloat16.*float16"),
    "chunk-bytes": ({"chunk_bytes": 21}, ValueError, "chunk_bytes: .* 22 bytes.*21"),
    "chunk-bytes-type": ({"chunk_bytes": "1"}, TypeError, "chunk_bytes: .*'1'"),
}


@pytest.mark.parametrize("name", MEMORY)
def test_bad_sizes(name: str) -> None:
    options, error, words = MEMORY[name]
    with pytest.raises(error, match=words):
        hf.linear_memory(**{"rows": 8, "hidden_size": 4, "vocabulary": 11, **options})


@pytest.mark.parametrize("chunk_bytes", [None, 100])
@pytest.mark.parametrize("sizes", [(0, 4, 11), (8, 0, 11), (8, 4, 0), (8, 0, 0), (0, 0, 0)])
def test_sizes_of_zero(sizes: tuple[int, int, int], chunk_bytes: int | None) -> None:
    """Nothing is held for nothing, or the size is refused by name; no arithmetic breaks down."""
    try:
        memory = hf.linear_memory(*sizes, chunk_bytes=chunk_bytes)
    except ValueError as error:
        message = str(error)
    else:
        rows, width, vocabulary = sizes
        assert memory.gradients == 2 * width * (rows + vocabulary)
        assert memory.peak >= memory.gradients
        return
    assert message.startswith(("rows: ", "hidden_size: ", "vocabulary: "))


def test_counts_of_other_kinds() -> None:
    """A count that NumPy made is a count; a tensor is not, for reading one would synchronise."""
    numpy = pytest.importorskip("numpy")
    for count in (6, numpy.int64(6)):
        loss(active_count=count)
        logprobs(active_count=count)


def test_plan_refuses_as_the_call_does() -> None:
    for chunk_bytes, error in ((True, TypeError), (2.5, TypeError), (21, ValueError)):
        with pytest.raises(error, match="chunk_bytes"):
            ChunkPlan.of(8, 11, torch.bfloat16, torch.bfloat16, "cpu", chunk_bytes)
    assert ChunkPlan.of(8, 11, torch.bfloat16, torch.bfloat16, "cpu", 22) == (1, 8)
