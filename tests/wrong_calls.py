"""Calls that are refused, by argument: what was passed, the error, its words."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import hpo_fused as hf

ONES, CU = torch.ones(2, 3), torch.tensor([0, 2, 6])
LOGITS, TOKENS, ADVANTAGES = torch.randn(2, 3, 11), torch.randint(11, (2, 3)), torch.tensor([1.0, -1.0])
HIDDEN, WEIGHT, BIAS = torch.randn(2, 3, 4), torch.randn(11, 4), torch.randn(11)
META = torch.ones(11, 4, device="meta")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "policy_loss": {"logits": LOGITS, "tokens": TOKENS, "advantages": ADVANTAGES},
    "token_logprobs": {"logits": LOGITS, "tokens": TOKENS},
    "linear_policy_loss": {
        "hidden": HIDDEN, "weight": WEIGHT.clone().requires_grad_(), "tokens": TOKENS, "advantages": ADVANTAGES,
    },
    "linear_token_logprobs": {"hidden": HIDDEN, "weight": WEIGHT.clone().requires_grad_(), "tokens": TOKENS},
    "logprob_policy_loss": {"logprobs": torch.zeros(2, 3), "advantages": ADVANTAGES},
    "linear_memory": {"rows": 8, "hidden_size": 4, "vocabulary": 11},
}  # fmt: skip
LOGITS_PATH = ("policy_loss", "token_logprobs")
HEAD = ("linear_policy_loss", "linear_token_logprobs")
LOSSES = ("policy_loss", "linear_policy_loss", "logprob_policy_loss")
GROUPED = {"objective": hf.Objective.preset("ahpo", normalization="group_mean_length")}
# Every row keeps its token: as id lists, and as the whole vocabulary.
IDS, OFFSETS, WORDS = TOKENS.flatten(), torch.arange(7), torch.full((2, 3, 1), -1, dtype=torch.int32)
LORA = torch.nn.Linear(4, 11)
LORA.base_layer, LORA.lora_A = torch.nn.Linear(4, 11), torch.nn.ModuleDict()
HALF = {"hidden": HIDDEN.bfloat16(), "weight": WEIGHT.bfloat16()}
INPLACE = ("policy_loss",)
# A batch of as many responses as tokens, and responses of which a call has parts.
SINGLES = {"packed": True, "cu_seqlens": torch.arange(7), "advantages": torch.ones(6, 1)}
PARTS = {"lengths": torch.tensor([3, 9]), "statistics": hf.BatchStatistics(2, 12, 1, 1)}
MEANS = {**PARTS, "response_mean_log_ratios": torch.zeros(2)}
REFERRED = {"ref_logprobs": torch.zeros(2, 3), "objective": hf.Objective.preset("gspo", kl="k3_ratio", kl_coef=0.1)}
Wrong = tuple[dict[str, Any], type[Exception], str]


def call(function: str, packed: bool = False, **options: Any) -> Any:
    arguments = ARGUMENTS[function]
    if packed:  # [B, T] and [B, T, ...] become [N] and [N, ...]
        arguments = {k: v.flatten(0, 1) if v.shape[:2] == (2, 3) else v for k, v in arguments.items()}
    return getattr(hf, function)(**{**arguments, **options})


def token_at(value: int) -> Tensor:
    tokens = TOKENS.clone()
    tokens[1, 2] = value
    return tokens


# Of the functions with logits or hidden states: ids, mask, transform, backend.
ROWS: dict[str, Wrong] = {
    "tokens-shape": ({"tokens": TOKENS[:, :2]}, ValueError, r"tokens: expected shape \[2, 3\].*\[2, 2\]"),
    "tokens-dtype": ({"tokens": TOKENS.float()}, TypeError, "tokens: expected an integer.*float32"),
    "tokens-list": ({"tokens": [[1]]}, TypeError, "tokens: .*list"),
    "tokens-high": ({"tokens": token_at(11)}, ValueError, r"tokens: expected ids in \[0, 11\).*11"),
    "tokens-far": ({"tokens": token_at(2**40)}, ValueError, r"tokens: expected ids in \[0, 11\).*1099511627776"),
    "tokens-negative": ({"tokens": token_at(-1)}, ValueError, "tokens: .*-1"),
    "tokens-ignored-id": ({"tokens": token_at(-100)}, ValueError, "tokens: .*-100"),
    "mask-shape": ({"mask": torch.ones(2, 4)}, ValueError, r"mask: .*\[2, 3\].*\[2, 4\]"),
    "mask-dims": ({"mask": torch.ones(2)}, ValueError, r"mask: .*\[2, 3\].*\[2\]"),
    "mask-type": ({"mask": [1]}, TypeError, "mask: .*list"),
    "mask-list": ({"mask": [[1] * 999] * 2}, TypeError, r"mask: .* got list \[\[1, 1.{150,199}\.\.\.$"),
    "mask-fractional": ({"mask": ONES / 2}, ValueError, "mask: .*0 and 1.*token_weights"),
    "mask-complex": ({"mask": ONES + 0j}, TypeError, "mask: .*complex"),
    "temperature-zero": ({"temperature": 0.0}, ValueError, "temperature: .*> 0.*0.0"),
    "temperature-nan": ({"temperature": math.nan}, ValueError, "temperature: .*nan"),
    "temperature-inf": ({"temperature": math.inf}, ValueError, "temperature: .*inf"),
    "temperature-type": ({"temperature": "1"}, TypeError, "temperature: .*str"),
    "temperature-list": ({"temperature": [1.0]}, TypeError, "temperature: expected a finite number .* tensor.*list"),
    "temperatures-shape": ({"temperature": torch.ones(3)}, ValueError, r"temperature: .*\[2\].*\[2, 3\].*\[3\]"),
    "temperatures-dtype": ({"temperature": ONES.bool()}, TypeError, "temperature: .*bool"),
    "temperatures-device": ({"temperature": META[:2, 0]}, ValueError, "temperature: .*cpu.*meta"),
    "temperatures-zero": ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature: .*unmasked.*got 0.0"),
    "temperatures-nan": ({"temperature": ONES * math.nan}, ValueError, "temperature: .*nan"),
    "temperatures-inf": ({"temperature": torch.tensor(math.inf)}, ValueError, "temperature: .*inf"),
    "temperatures-grad": (
        {"temperature": torch.ones(2, requires_grad=True)},
        ValueError,
        "temperature: .*not require grad.*detach",
    ),
    "softcap-negative": ({"softcap": -30.0}, ValueError, "softcap: .*-30"),
    "softcap-nan": ({"softcap": math.nan}, ValueError, "softcap: .*nan"),
    "backend-name": ({"backend": "cuda"}, ValueError, "backend: expected one of .*'cuda'"),
}
# Of every loss: what describes the batch.
BATCH: dict[str, Wrong] = {
    "advantages-shape": ({"advantages": torch.ones(3)}, ValueError, r"advantages: .*\[2\].*\[3\]"),
    "advantages-type": ({"advantages": 1.0}, TypeError, "advantages: .*float"),
    "advantages-bool": ({"advantages": torch.ones(2).bool()}, TypeError, "advantages: .*bool"),
    "advantages-device": ({"advantages": META[:2, 0]}, ValueError, "advantages: .*cpu.*meta"),
    "level-name": ({"advantage_level": "sequence"}, ValueError, "advantage_level: expected one of .*'sequence'"),
    "level-token": ({"advantage_level": "token"}, ValueError, r"advantages: expected shape \[2, 3\], got .*\[2\]"),
    "level-response": (
        {"advantages": ONES, "advantage_level": "response"},
        ValueError, r"advantages: .*\[2\] or \[2, 1\], got .*\[2, 3\]",
    ),
    "advantages-ambiguous": (
        {**SINGLES, "advantages": torch.ones(6)},
        ValueError, "advantages: expected advantage_level='response' or 'token'.*as many responses as tokens",
    ),
    "weights-ambiguous": (
        {**SINGLES, "token_weights": torch.ones(6)}, ValueError, r"token_weights: expected \[B, 1\] or \[1, N\].*\[6\]"
    ),
    "entropy-weights-ambiguous": (
        {**SINGLES, "entropy_weights": torch.ones(6)}, ValueError, r"entropy_weights: expected \[B, 1\] or \[1, N\]"
    ),
    "entropy-weights-number": (
        {"entropy_weights": 0.1}, TypeError, r"entropy_weights: .*\[\] or \[2\] or \[2, 1\] or \[2, 3\], got float 0.1"
    ),
    "entropy-weights-shape": ({"entropy_weights": torch.ones(3)}, ValueError, r"entropy_weights: .*\[2\].*\[3\]"),
    "entropy-weights-one": ({"entropy_weights": torch.ones(1)}, ValueError, r"entropy_weights: .*\[1\]"),
    "entropy-weights-dtype": ({"entropy_weights": ONES.bool()}, TypeError, "entropy_weights: .*bool"),
    "entropy-weights-device": ({"entropy_weights": META[0, 0]}, ValueError, "entropy_weights: .*cpu.*meta"),
    "lengths-type": ({**PARTS, "lengths": [3, 9]}, TypeError, "lengths: .*list"),
    "lengths-dtype": ({**PARTS, "lengths": torch.ones(2)}, TypeError, "lengths: expected an integer.*float32"),
    "lengths-shape": ({**PARTS, "lengths": CU}, ValueError, r"lengths: .*\[2\].*\[3\]"),
    "lengths-device": ({**PARTS, "lengths": META[:2, 0].long()}, ValueError, "lengths: .*cpu.*meta"),
    "lengths-alone": ({"lengths": PARTS["lengths"]}, ValueError, "lengths: .*statistics beside it.*None"),
    "lengths-short": (
        {**PARTS, "lengths": torch.tensor([3, 2])}, ValueError, r"lengths: expected at least .*\[3, 2\] for \[3, 3\]"
    ),
    "lengths-of-ratios": (
        {**PARTS, "objective": "gspo"}, ValueError, "response_mean_log_ratios: .*beside lengths.*None; .*first sweep"
    ),
    "lengths-of-bounded-ratios": (
        {**PARTS, "objective": "gmpo"}, ValueError, r"lengths: expected None for GeometricMean.*int64 \[2\]"
    ),
    "means-of-bounded-ratios": (
        {"response_mean_log_ratios": torch.zeros(2), "objective": "gmpo"},
        ValueError, r"response_mean_log_ratios: expected None for GeometricMean.*float32 \[2\]",
    ),
    "means-of-tokens": (
        {**MEANS, "objective": "grpo"}, ValueError, "response_mean_log_ratios: expected None for ratio_level='token'"
    ),
    "means-alone": (
        {"response_mean_log_ratios": torch.zeros(2), "objective": "gspo"},
        ValueError, "lengths: expected .*beside response_mean_log_ratios, got None",
    ),
    "means-type": (
        {**MEANS, "objective": "gspo", "response_mean_log_ratios": 0.0}, TypeError, "response_mean_log_ratios: .*float"
    ),
    "means-dtype": (
        {**MEANS, "objective": "gspo", "response_mean_log_ratios": torch.tensor([0, 0])},
        TypeError, "response_mean_log_ratios: expected a floating.*int64",
    ),
    "means-shape": (
        {**MEANS, "objective": "gspo", "response_mean_log_ratios": ONES},
        ValueError, r"response_mean_log_ratios: .*\[2\].*\[2, 3\]",
    ),
    "means-device": (
        {**MEANS, "objective": "gspo", "response_mean_log_ratios": META[:2, 0]},
        ValueError, "response_mean_log_ratios: .*cpu.*meta",
    ),
    "means-per-token": (
        {**MEANS, "objective": "gspo", "advantages": ONES},
        ValueError, r"response_mean_log_ratios: expected advantages and token_weights \[B\].*per token",
    ),
    "means-weighted": (
        {**MEANS, "objective": "gspo", "token_weights": ONES},
        ValueError, r"response_mean_log_ratios: expected advantages and token_weights \[B\].*per token",
    ),
    "means-k3-ratio": (
        {**MEANS, **REFERRED}, ValueError, "response_mean_log_ratios: expected None for kl='k3_ratio'.*float32"
    ),
    "means-k3-ratio-old": (
        {**MEANS, **REFERRED, "objective": hf.Objective.preset("gspo_token", kl="k3_ratio", kl_coef=0.1)},
        ValueError, "old_logprobs: expected .*response_mean_log_ratios for kl='k3_ratio', got None",
    ),
    "old-shape": ({"old_logprobs": torch.zeros(2)}, ValueError, r"old_logprobs: .*\[2, 3\].*\[2\]"),
    "old-dtype": ({"old_logprobs": TOKENS}, TypeError, "old_logprobs: .*int64"),
    "ref-missing": ({"objective": hf.Objective(kl_coef=0.1)}, ValueError, "ref_logprobs: .*kl_coef=0.1.*None"),
    "ref-shape": ({"ref_logprobs": torch.zeros(3, 2)}, ValueError, r"ref_logprobs: .*\[2, 3\].*\[3, 2\]"),
    "weights-shape": ({"token_weights": torch.ones(3)}, ValueError, r"token_weights: .*\[3\]"),
    "cu-missing": ({"packed": True}, ValueError, "cu_seqlens: expected response boundaries.*None"),
    "cu-padded": ({"cu_seqlens": CU}, ValueError, "cu_seqlens: expected None"),
    "cu-falling": (
        {"packed": True, "cu_seqlens": torch.tensor([0, 5, 4, 6])}, ValueError, r"cu_seqlens: .*\[0, 5, 4, 6\]"
    ),
    "cu-beyond": (
        {"packed": True, "cu_seqlens": torch.tensor([0, 7, 6])}, ValueError, r"cu_seqlens: .*\[0, 7, 6\]"
    ),
    "cu-start": (
        {"packed": True, "cu_seqlens": torch.tensor([1, 2, 6])}, ValueError, "cu_seqlens: .*from 0 to N = 6"
    ),
    "cu-end": (
        {"packed": True, "cu_seqlens": torch.tensor([0, 2, 5])}, ValueError, "cu_seqlens: .*from 0 to N = 6"
    ),
    "cu-none": (
        {"packed": True, "cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens: .*at least for N = 6, got one entry"
    ),
    "cu-dtype": ({"packed": True, "cu_seqlens": CU.float()}, TypeError, "cu_seqlens: .*float32"),
    "cu-dims": ({"packed": True, "cu_seqlens": CU[None]}, ValueError, r"cu_seqlens: .*\[B \+ 1\].*\[1, 3\]"),
    "cu-type": ({"packed": True, "cu_seqlens": [0, 2, 6]}, TypeError, "cu_seqlens: .*list"),
    "groups-missing": (GROUPED, ValueError, "groups: .*group_mean_length.*None"),
    "groups-shape": ({**GROUPED, "groups": CU}, ValueError, r"groups: .*\[2\].*\[3\]"),
    "groups-unseen": (
        {
            **GROUPED, "groups": torch.tensor([1, 2]),
            "statistics": hf.BatchStatistics(2, 6, 1, 1, torch.tensor([1, 1]), torch.tensor([3, 3])),
        },
        ValueError, "groups: .*seen",
    ),
    "groups-uncounted": (
        {**GROUPED, "groups": torch.tensor([1, 2]), "statistics": hf.BatchStatistics(2, 6, 1, 1)},
        ValueError, "statistics: .*group",
    ),
    "max-length": ({"objective": "dr_grpo"}, ValueError, "max_length: .*constant.*None"),
    "objective-name": ({"objective": "grpoo"}, ValueError, "objective: expected one of grpo.*'grpoo'"),
    "objective-type": ({"objective": 3}, TypeError, "objective: .*int"),
    "objective-kind": ({"objective": {"shaping": {"kind": "ppo"}}}, ValueError, "shaping.kind: .*one of clip.*'ppo'"),
    "statistics-device": (
        {"statistics": hf.BatchStatistics(2, 6, 1, torch.tensor(1, device="meta"))},
        ValueError, "statistics: expected negative on cpu.*meta",
    ),
    "statistics-type": ({"statistics": {}}, TypeError, "statistics: expected a BatchStatistics.*dict"),
}  # fmt: skip
OF_PACKED_LOSSES: dict[str, Wrong] = {
    "temperatures-ambiguous": (
        {
            "packed": True, "cu_seqlens": torch.arange(7), "advantages": torch.ones(6, 1), "temperature": torch.ones(6),
        },
        ValueError, r"temperature: expected \[B, 1\] or \[1, N\]",
    ),
}  # fmt: skip
OF_PACKED_LOGPROBS: dict[str, Wrong] = {
    "temperatures-of-responses": (
        {"packed": True, "temperature": torch.ones(2), "mask": None},
        ValueError, r"temperature: expected shape .*\[6\] or \[1, 6\], got .*\[2\]",
    ),
}  # fmt: skip
OF_LOGITS: dict[str, Wrong] = {
    "logits-list": ({"logits": [1.0]}, TypeError, "logits: expected a float16.*list"),
    "logits-float64": ({"logits": LOGITS.double()}, TypeError, r"logits: .*float64 \[2, 3, 11\]"),
    "logits-dims": ({"logits": LOGITS[0, 0]}, ValueError, r"logits: .*\[11\]"),
    "logits-empty": ({"logits": LOGITS[..., :0]}, ValueError, r"logits: .*V > 0.*\[2, 3, 0\]"),
    "logits-strided": ({"logits": LOGITS[..., ::2]}, ValueError, "logits: .*contiguous last dimension"),
}
IN_PLACE: dict[str, Wrong] = {
    "leaf": ({"logits": LOGITS.clone().requires_grad_(), "inplace": True}, ValueError, "inplace: .*leaf"),
    "view-of-leaf": (
        {"logits": torch.randn(2, 4, 11, requires_grad=True)[:, :-1], "inplace": True}, ValueError, "inplace: .*leaf"
    ),
    "expanded": (
        {"logits": (torch.randn(1, 3, 11, requires_grad=True) * 2).expand(2, 3, 11), "inplace": True},
        ValueError, "inplace: .*strides",
    ),
}  # fmt: skip
OF_LOGPROBS: dict[str, Wrong] = {
    "logprobs-dtype": ({"logprobs": TOKENS}, TypeError, "logprobs: .*int64"),
    "logprobs-dims": ({"logprobs": LOGITS}, ValueError, r"logprobs: .*\[2, 3, 11\]"),
    "entropy-missing": (
        {"objective": hf.Objective(entropy_coef=0.1)}, ValueError, "entropy: .*entropy_coef=0.1.*None"
    ),
    "entropy-missing-weights": (
        {"entropy_weights": torch.tensor(0.1)}, ValueError, "entropy: .*for entropy_weights, got None"
    ),
    "entropy-shape": ({"entropy": torch.zeros(2)}, ValueError, r"entropy: .*\[2, 3\]"),
    "backend-name": ({"backend": "cuda"}, ValueError, "backend: expected one of .*'cuda'"),
}  # fmt: skip
OF_HEAD: dict[str, Wrong] = {
    "hidden-list": ({"hidden": [1.0]}, TypeError, "hidden: expected a float16, bfloat16 or float32 tensor, got list"),
    "hidden-none": ({"hidden": None}, TypeError, "hidden: .*NoneType"),
    "hidden-float64": ({"hidden": HIDDEN.double()}, TypeError, r"hidden: .*float64 \[2, 3, 4\]"),
    "hidden-integer": ({"hidden": HIDDEN.long()}, TypeError, "hidden: .*int64"),
    "hidden-dims": ({"hidden": HIDDEN[0, 0]}, ValueError, r"hidden: expected shape \[B, T, H\] or \[N, H\].*\[4\]"),
    "hidden-four": ({"hidden": HIDDEN[None]}, ValueError, r"hidden: .*\[1, 2, 3, 4\]"),
    "hidden-empty": ({"hidden": HIDDEN[..., :0]}, ValueError, r"hidden: .*H > 0.*\[2, 3, 0\]"),
    "weight-list": ({"weight": [1.0]}, TypeError, "weight: expected a float16.*list"),
    "weight-module": ({"weight": torch.nn.Linear(4, 11)}, TypeError, r"weight: .* got Linear; pass its \.weight"),
    "weight-lora": ({"weight": LORA}, TypeError, r"weight: .*got Linear.*base \+ scale \* B @ A.*get_delta_weight"),
    "weight-float64": ({"weight": WEIGHT.double()}, TypeError, r"weight: .*float64 \[11, 4\]"),
    "weight-dims": ({"weight": WEIGHT[0]}, ValueError, r"weight: expected shape \[V, 4\].*\[4\]"),
    "weight-transposed": ({"weight": WEIGHT.t()}, ValueError, r"weight: .*nn.Linear.*\[4, 11\]"),
    "weight-empty": ({"weight": WEIGHT[:0]}, ValueError, r"weight: .*V > 0.*\[0, 4\].*GatheredParameters"),
    "weight-released": ({"weight": torch.empty(0)}, ValueError, r"weight: .*got float32 \[0\].*weight_context=.*regis"),
    "weight-device": ({"weight": META}, ValueError, "weight: expected a tensor on cpu.*meta"),
    "weight-dtype": (
        {"weight": WEIGHT.bfloat16()}, TypeError, r"weight: expected hidden's dtype float32 \(or torch.autocast\).*bfl"
    ),
    "bias-list": ({"bias": [1.0]}, TypeError, "bias: expected a float16.*list"),
    "bias-float64": ({"bias": BIAS.double()}, TypeError, "bias: .*float64"),
    "bias-shape": ({"bias": BIAS[:4]}, ValueError, r"bias: expected shape \[11\].*\[4\]"),
    "bias-dims": ({"bias": BIAS[None]}, ValueError, r"bias: .*\[11\].*\[1, 11\]"),
    "bias-device": ({"bias": META[:, 0]}, ValueError, "bias: expected a tensor on cpu.*meta"),
    "bias-dtype": ({"bias": BIAS.bfloat16()}, TypeError, "bias: expected hidden's dtype float32.*bfloat16"),
    "context-number": ({"weight_context": 3}, TypeError, "weight_context: expected a callable that makes.*int 3"),
    "context-made": ({"weight_context": nullcontext()}, TypeError, "weight_context: expected a callable.*nullcontext"),
    "context-none": ({"weight_context": lambda: 3}, TypeError, "weight_context: .*context manager, got one that .*int"),
    "logits-dtype": ({"logits_dtype": torch.bfloat16}, TypeError, "logits_dtype: expected None or torch.float32, got "),
    "logits-dtype-half": (
        {**HALF, "logits_dtype": torch.float16},
        TypeError, "logits_dtype: expected None, torch.float32 or torch.bfloat16, got torch.float16",
    ),
    "logits-dtype-double": ({"logits_dtype": torch.float64}, TypeError, "logits_dtype: .*float64"),
    "logits-dtype-name": ({"logits_dtype": "float32"}, TypeError, "logits_dtype: .*'float32'"),
    "chunk-bytes-low": ({"chunk_bytes": 43}, ValueError, "chunk_bytes: .*at least one row.* 44 bytes at V = 11.* 43"),
    "chunk-bytes-zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes: .*0"),
    "chunk-bytes-negative": ({"chunk_bytes": -1}, ValueError, "chunk_bytes: .*-1"),
    "chunk-bytes-bool": ({"chunk_bytes": True}, TypeError, "chunk_bytes: expected an int or None, got bool True"),
    "chunk-bytes-float": ({"chunk_bytes": 1e9}, TypeError, "chunk_bytes: .*float"),
    "chunk-bytes-logits": (  # float32 logits; where bfloat16 is multiplied, a row has its gradient in that beside it
        {**HALF, "logits_dtype": torch.float32, "chunk_bytes": 43}, ValueError, "chunk_bytes: .* (44|66) bytes.*43"
    ),
    "count-bool": ({"active_count": True}, TypeError, "active_count: expected an int or None, got bool True"),
    "count-float": ({"active_count": 6.0}, TypeError, "active_count: .*float"),
    "count-tensor": ({"active_count": torch.tensor(6)}, TypeError, "active_count: .*int64"),
    "count-float-tensor": ({"active_count": torch.tensor(6.0)}, TypeError, "active_count: .*float32"),
    "count-tensors": ({"active_count": torch.tensor([6, 6])}, TypeError, r"active_count: .*int64 \[2\]"),
    "count-negative": ({"active_count": -1}, ValueError, "active_count: expected between 0 and 6 rows, got -1"),
    "count-high": ({"active_count": 7}, ValueError, "active_count: .*between 0 and 6 rows, got 7"),
    "count-low": ({"active_count": 5}, ValueError, "active_count: expected at least the 6 active rows, got 5"),
    "keep-list": ({"keep": [1]}, TypeError, r"keep: expected a tuple \(ids, .* \[2, 3, 1\], got list \[1\]"),
    "keep-bool": ({"keep": torch.ones(2, 3, 11).bool()}, TypeError, r"keep: .*int32.*got bool \[2, 3, 11\]"),
    "keep-shape": ({"keep": WORDS[..., :0]}, ValueError, r"keep: expected shape \[2, 3, 1\], got .*\[2, 3, 0\]"),
    "keep-device": ({"keep": WORDS.to("meta")}, ValueError, "keep: expected a tensor on cpu.*meta"),
    "keep-without": (
        {"keep": WORDS.index_fill(1, torch.tensor([2]), 0)},
        ValueError, rf"keep: expected every unmasked row's sampled token in its own set, got token {int(TOKENS[0, 2])} "
        r"at \[0, 2\]",
    ),
    "keep-one": ({"keep": (IDS,)}, TypeError, r"keep: expected a tuple \(ids, offsets\) of two.*got \(int64 \[6\]"),
    "keep-ids-list": ({"keep": ([1], OFFSETS)}, TypeError, r"keep: expected a tuple \(ids, offsets\) of two.*list"),
    "keep-ids-dtype": ({"keep": (IDS.float(), OFFSETS)}, TypeError, "keep's ids: expected an integer.*float32"),
    "keep-ids-dims": ({"keep": (TOKENS, OFFSETS)}, ValueError, r"keep's ids: expected shape \[6\], got .*\[2, 3\]"),
    "keep-ids-device": ({"keep": (IDS.to("meta"), OFFSETS)}, ValueError, "keep's ids: .*on cpu.*meta"),
    "keep-ids-high": ({"keep": (IDS * 0 + 11, OFFSETS)}, ValueError, r"keep's ids: .* in \[0, 11\), got 11 to"),
    "keep-ids-negative": ({"keep": (IDS - 20, OFFSETS)}, ValueError, r"keep's ids: expected ids in \[0, 11\), got -"),
    "keep-offsets-list": ({"keep": (IDS, [0])}, TypeError, r"keep's offsets: .*\[7\].*list"),
    "keep-offsets-shape": ({"keep": (IDS, OFFSETS[1:])}, ValueError, r"keep's offsets: .*\[7\], got .*\[6\]"),
    "keep-offsets-dtype": ({"keep": (IDS, OFFSETS.float())}, TypeError, "keep's offsets: .*float32"),
    "keep-offsets-end": (
        {"keep": (IDS, OFFSETS.clamp(max=5))},
        ValueError, "keep's offsets: expected to rise from 0 to the number of ids, 6, got 0 to 5, falling 0 times",
    ),
    "keep-offsets-falling": (
        {"keep": (IDS, torch.tensor([0, 2, 1, 3, 4, 5, 6]))}, ValueError, "keep's offsets: .*0 to 6, falling 1 times"
    ),
    "keep-ids-without": ({"keep": ((IDS + 1) % 11, OFFSETS)}, ValueError, "keep: expected every .* at \\[0, 0\\]"),
    "main-grad-list": ({"weight_grad": [1.0]}, TypeError, r"weight_grad: expected a float32 tensor \[11, 4\].* list"),
    "main-grad-dtype": ({"weight_grad": WEIGHT.bfloat16()}, TypeError, "weight_grad: .*float32.*bfloat16"),
    "main-grad-shape": ({"weight_grad": torch.zeros(4, 11)}, ValueError, r"weight_grad: .*\[11, 4\].*\[4, 11\]"),
    "main-grad-device": ({"weight_grad": META}, ValueError, "weight_grad: expected a tensor on cpu.*meta"),
    "main-grad-leaf": (
        {"weight_grad": torch.zeros(11, 4, requires_grad=True)},
        ValueError, "weight_grad: expected a buffer that does not require grad",
    ),
    "main-grad-frozen": (
        {"weight": WEIGHT, "weight_grad": torch.zeros(11, 4)},
        ValueError, "weight_grad: expected None for a weight that does not require grad",
    ),
}  # fmt: skip
OF_SIZES: dict[str, Wrong] = {
    "rows-float": ({"rows": 8.0}, TypeError, "rows: expected an int, got float 8.0"),
    "rows-bool": ({"rows": True}, TypeError, "rows: .*bool True"),
    "device": ({"device": "gpu"}, ValueError, "device: expected one of PyTorch's, .* got 'gpu'"),
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
TABLES: tuple[tuple[tuple[str, ...], dict[str, Wrong]], ...] = (
    ((*LOGITS_PATH, *HEAD), ROWS),
    (LOSSES, BATCH),
    (("policy_loss", "linear_policy_loss"), OF_PACKED_LOSSES),
    (("token_logprobs", "linear_token_logprobs"), OF_PACKED_LOGPROBS),
    (LOGITS_PATH, OF_LOGITS),
    (INPLACE, IN_PLACE),
    (("logprob_policy_loss",), OF_LOGPROBS),
    (HEAD, OF_HEAD),
    (("linear_memory",), OF_SIZES),
)
