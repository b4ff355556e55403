"""Counts what a GPU would compile for a series of loss calls. Run as a script, without TRITON_INTERPRET; prints JSON.

The public functions run as on a GPU, on CPU tensors: the machine is described to them, and a launch only compiles (for
sm_90) what is not in the kernel's cache. ``--specialized``: kernels without their do_not_specialize, to see that it
counts.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import hpo_fused as hf
from hpo_fused.kernels import launch

MODULES = ("logprob_loss", "policy_loss", "scale_gradient", "token_gradient", "token_statistics", "token_terms")


class Device:
    """What Triton asks of a GPU's driver in order to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


class Launcher:
    """A kernel whose launch compiles and does not run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.kernel.run(*arguments, grid=grid, warmup=True, **options)

    @property
    def compilations(self) -> int:
        return len(self.kernel.device_caches[0][0])


def replace_kernels(specialized: bool) -> dict[str, Launcher]:
    launchers = {}
    for name in MODULES:
        module = importlib.import_module(f"hpo_fused.kernels.{name}")
        for key in [key for key in vars(module) if key.endswith("_kernel")]:
            kernel = getattr(module, key)
            launchers[key] = Launcher(triton.jit(kernel.fn, debug=kernel.debug) if specialized else kernel)
            setattr(module, key, launchers[key])
    return launchers


def call(
    B: int, T: int, V: int, temperature: float | str, epsilon: float, alpha: float, kl: float, offset: int
) -> None:
    """Every launcher, with tensors that start ``offset`` entries into their storage, as a micro-batch's do.

    ``temperature``: a number, or the levels of a tensor: "response", "token".
    """

    def sliced(value: Tensor) -> Tensor:
        return value.flatten().repeat(3)[offset : offset + value.numel()].view(value.shape)

    tokens, mask = sliced(torch.zeros(B, T, dtype=torch.long)), sliced(torch.ones(B, T, dtype=torch.bool))
    old, ref, weights = (sliced(torch.zeros(B, T)) for _ in range(3))
    for level in ("token", "sequence"):
        objective = hf.Objective(level, hf.Clip(epsilon, epsilon), hf.AdaptiveHysteretic(alpha), "response", kl_coef=kl)
        logits = torch.zeros(B, T, V, dtype=torch.bfloat16, requires_grad=True)
        levels = {"response": sliced(torch.ones(B)), "token": sliced(torch.ones(B, T))}
        hf.policy_loss(
            logits, tokens, sliced(torch.ones(B)), old_logprobs=old, ref_logprobs=ref, mask=mask, token_weights=weights,
            objective=objective, temperature=levels.get(temperature, temperature), backend="triton",
        ).loss.backward()  # fmt: skip


def call_linear(rows: int, V: int, temperature: float | Tensor) -> None:
    """Hidden states, whose rows' statistics are gathered: their tensors start wherever the number of rows puts them."""
    hidden, weight = (torch.zeros(size, 8, dtype=torch.bfloat16, requires_grad=True) for size in (rows, V))
    tokens = torch.zeros(1, rows, dtype=torch.long)
    out = hf.linear_token_logprobs(
        hidden.unsqueeze(0), weight, tokens, temperature=temperature, backend="triton", chunk_bytes=14 * V
    )
    (out.logprobs.sum() + out.entropy.sum()).backward()


if __name__ == "__main__":
    driver.set_active(Device())
    specialized = "--specialized" in sys.argv
    launchers = replace_kernels(specialized)
    with launch.override(machine=launch.Machine("sm_90", 132, 50 << 20, 32)):
        # Lengths of 1, odd and divisible by 16: the values that Triton specialises on.
        for B, T in ((4, 8), (1, 1), (3, 5)) if specialized else ((4, 8), (1, 1), (3, 5), (16, 16), (2, 1), (1, 32)):
            call(B, T, 4096, 1.0, 0.2, 0.1, 0.05, 0)
        if not specialized:
            for changed in ((0.7, 0.2, 0.1, 0.05), (1.0, 0.3, 0.1, 0.05), (1.0, 0.2, 0.5, 0.05), (1.0, 0.2, 0.1, 1.0)):
                call(4, 8, 4096, *changed, 0)
            for offset in (1, 3, 8):
                call(4, 8, 4096, 1.0, 0.2, 0.1, 0.05, offset)
            for B, T, level, offset in ((4, 8, "token", 0), (3, 5, "response", 0), (1, 1, "token", 1)):
                call(B, T, 4096, level, 0.2, 0.1, 0.05, offset)
            call(4, 8, 4112, 1.0, 0.2, 0.1, 0.05, 0)  # another vocabulary of the same parity and launch
            for rows in (8, 9, 10, 11, 30):
                for temperature in (1.0, torch.ones(1, rows)):
                    call_linear(rows, 4096, temperature)
    print(json.dumps({name: launcher.compilations for name, launcher in launchers.items()}))
