"""The model's forward with hpo_fused's LM head in it, in place of the one that TRL binds.

Loss and log-probabilities are computed inside the module's forward and leave through its output: only there are the
parameters of FSDP and ZeRO gathered, and DDP looks through the output for what took part.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from hpo_fused.checks import described
from hpo_fused.linear import linear_token_logprobs
from hpo_fused.losses import PolicyLossOutput


class LossCall:
    """What the head is to do with the completions' hidden states, and then what came out.

    Neither a dataclass nor a mapping: FSDP casts every floating tensor that it finds in a forward's arguments, or in
    the containers it knows, to the parameters' dtype. Old log-probabilities rounded to bfloat16 are off by more than
    the log-ratios that they are there for.
    """

    def __init__(self, length: int, run: Callable[..., PolicyLossOutput]) -> None:
        """``run(hidden, weight, **head)`` on the states that predict the last ``length`` tokens."""
        self.length = length
        self.run = run
        self.output: PolicyLossOutput | None = None


def add_head(model: Any, temperature: float, cast_to_fp32: bool) -> None:
    """Bind a forward that serves ``fused_lm_head=True``, TRL's way to ask for log-probabilities, and ``hpo=LossCall``.

    Everything else is left to the forward that is bound already. TRL's contract is kept: log-probabilities and
    entropies [B, L - 1], 0 where the label is -100.

    Raises:
        TypeError: no LM head with a floating weight [V, H], or no backbone apart from it.
        ValueError: a scale of the logits that is not above 0.
    """
    config, original = model.config.get_text_config(), model.forward
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = f"one without a floating weight ({described(weight)})" if head is not None else "none"
        raise TypeError(
            f"model: expected an LM head with a floating weight [V, H] from {type(model).__name__}."
            f"get_output_embeddings(), got {found}; head='logprobs' uses TRL's own way"
        )
    # Before transformers 5 a vision-language model's backbone was not what base_model_prefix names.
    nested = config is not model.config and int(transformers.__version__.split(".")[0]) < 5
    backbone = "model" if nested else "base_model"
    if getattr(model, backbone, model) is model:
        raise TypeError(
            f"model: expected a backbone apart from the LM head as {type(model).__name__}.{backbone}, got none; "
            "head='logprobs' uses TRL's own way"
        )
    transform = _transform(config, temperature)

    # generate() looks into the signature for what it may pass, logits_to_keep above all.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        hpo: LossCall | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        body = getattr(self, backbone)(*args, **kwargs)
        head = self.get_output_embeddings()  # FSDP and PEFT replace it
        hidden = body.last_hidden_state.to(head.weight.device)
        given = {"bias": getattr(head, "bias", None), **transform}
        if cast_to_fp32:
            hidden = hidden.float()
        context = torch.autocast(hidden.device.type, enabled=False) if cast_to_fp32 else nullcontext()
        with context, maybe_gather_lm_head_ctx(head.weight, given["bias"]):
            if hpo is None:
                labels = labels.to(hidden.device)[:, 1:]
                scored = linear_token_logprobs(hidden[:, :-1], head.weight, labels, mask=labels != -100, **given)
                result = {"log_probs": scored.logprobs, "entropy": scored.entropy}
            else:  # from the end: prompt and prefix tuning prepend positions
                out = hpo.output = hpo.run(hidden[:, -hpo.length - 1 : -1], head.weight, **given)
                result = {"loss": out.loss, "log_probs": out.logprobs, "entropy": out.entropy}
        return FusedCausalLMOutput(aux_loss=_balancing_loss(self, config, body, kwargs), **result)

    model.forward = types.MethodType(forward, model)


def _transform(config: Any, temperature: float) -> dict[str, float | None]:
    """Temperature and softcap of the logits, with the model's scale of them in both.

    A scale s comes before the cap: cap tanh(s z / cap) / T is (cap / s) tanh(z / (cap / s)) / (T / s).
    """
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for value in (getattr(config, name, None) for name in names) if value is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:  # HyperCLOVA X alone multiplies by what others divide by
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    scale = 1.0 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"model: expected logits scaled by a number > 0, got {scale} in {type(config).__name__}")
    softcap = getattr(config, "final_logit_softcapping", None)
    return {"temperature": temperature / scale, "softcap": None if softcap is None else softcap / scale}


def _balancing_loss(model: Any, config: Any, body: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, where the router's logits were asked for."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    named = (getattr(owner, "num_experts", None) for owner in (config, model))
    experts = next((count for count in named if count is not None), getattr(config, "num_local_experts", None))
    loss: Tensor = load_balancing_loss_func(
        body.router_logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
    return loss


def lies_on(model: Any, device: torch.device) -> bool:
    """Whether the whole model lies on one device, and that is this one; "cuda", as accelerate says, is any of its."""
    places = {value.device for value in model.parameters()}
    whole = len(places) == 1 and all(value.numel() > 0 for value in model.parameters())
    return whole and all(at.type == device.type and device.index in (None, at.index) for at in places)


def probe(model: Any, temperature: float, device: torch.device) -> None:
    """Compare the head with the logits that the model itself makes of a few tokens.

    Only where the whole model lies on ``device``: a sharded one cannot run before it is wrapped.

    Raises:
        ValueError: they differ: the model's forward does something to hidden states or logits that no LM head with a
            scale and a softcap does.
    """
    if not lies_on(model, device):
        return
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = (torch.arange(4, device=device) % vocabulary).unsqueeze(0)
    training, name = model.training, type(model).__name__
    model.eval()
    try:
        with torch.no_grad():
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**given, use_cache=False).logits
            found = model(**given, labels=ids, fused_lm_head=True).log_probs
    finally:
        model.train(training)
    # The largest rounding of a GEMM that its caller does not see: TF32's.
    precision = max(torch.finfo(logits.dtype).eps, 2**-10)
    logits = logits.float() / temperature
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    error = float((found - expected).abs().max())
    if not error <= 8 * precision * (1 + float(logits.abs().max())):
        raise ValueError(
            f"model: expected {name}.forward to give the LM head's logits of its backbone's hidden states, scaled and "
            f"capped as its config says; log-probabilities of four tokens differ by {error:.1e}. head='logprobs' uses "
            "TRL's own way"
        )
