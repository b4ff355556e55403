"""What a loss call costs the host: operations launched, Python time, recompilations. No GPU is needed for any of them.

The call runs on CPU tensors as it would on a GPU: kernels are replaced by counters, and what only a CPU does (looking
at values in order to raise ValueError) is switched off.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hpo_fused as hf
from hpo_fused.backend import kernels

from .test_equivalence import PRESETS

pytestmark = pytest.mark.skipif(kernels is None, reason="needs Triton")

MODULES = [
    "computed_rows", "fused_policy_loss", "logprob_policy_loss", "scale_gradient", "token_gradient",
    "token_statistics", "token_weights",
]  # fmt: skip
# Operators of PyTorch that start nothing on a device.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "new_empty", "slice", "unsqueeze", "view", "_reshape_alias"
}  # fmt: skip
MICROSECONDS = 60.0  # of a forward call, kernels left out; the test allows thrice that on a busy machine


class Stub:
    """In a kernel's place: writes down its name, and launches nothing."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.launched.append(self.name)

        return launch


class Operators(TorchDispatchMode):
    """Writes down PyTorch's operators that launch something."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        namespace, name = operator.name().split(".")[0].split("::")
        # Our own operators around a launcher allocate, and launch what the stubs write down.
        if name not in FREE and namespace != "hpo_fused":
            self.launched.append(name)
        return operator(*arguments, **(keywords or {}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for name in MODULES:
        module = importlib.import_module(f"hpo_fused.kernels.{name}")
        for key in [key for key in vars(module) if key.endswith("_kernel")]:
            monkeypatch.setattr(module, key, Stub(key, names))
    for name in ("hpo_fused.batch", "hpo_fused.checks", "hpo_fused.policy_loss"):
        monkeypatch.setattr(importlib.import_module(name), "values_readable", lambda value: False)
    # The interpreter's constant says whether a CPU tensor may go to the kernels at all: it may.
    monkeypatch.setattr(kernels, "interpreting", lambda: True)
    return names


def call(
    objective: hf.Objective, layout: str = "padded", dtype: torch.dtype = torch.float32, **options: Any
) -> Callable[[], hf.PolicyLossOutput]:
    """A loss call as trainers make it: shifted views of ids and masks, an integer mask, old log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(128, (4, 9), generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
    if layout == "padded":
        logits = torch.randn(4, 8, 128, generator=generator).to(dtype).requires_grad_()
        keywords: dict[str, Any] = {
            "mask": torch.ones(4, 9, dtype=torch.long)[:, 1:],
            "old_logprobs": torch.zeros(4, 8),
        }
        tokens = ids[:, 1:]
    else:
        logits = torch.randn(36, 128, generator=generator).to(dtype).requires_grad_()
        keywords = {"cu_seqlens": torch.tensor([0, 9, 18, 27, 36], dtype=torch.int32), "old_logprobs": torch.zeros(36)}
        tokens = ids.flatten()
    if objective.kl_coef != 0:
        keywords["ref_logprobs"] = keywords["old_logprobs"].bfloat16()
    keywords |= {"objective": objective, "backend": "triton", **options}
    if options.get("inplace"):  # not a leaf
        logits = logits * 1
    return lambda: hf.policy_loss(logits, tokens, advantages, **keywords)


def counted(function: Callable[[], Any], launched: list[str]) -> list[str]:
    """What ``function`` launches, in order."""
    function()  # first uses
    launched.clear()
    with Operators(launched):
        function()
    return list(launched)


TOKEN_LEVEL = [name for name, objective in PRESETS.items() if objective.ratio_level == "token"]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_three_launches(name: str, layout: str, launched: list[str]) -> None:
    expected = ["response_statistics_kernel", "fused_policy_loss_kernel", "sum"]
    assert counted(call(PRESETS[name], layout), launched) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"token_weights": torch.ones(4, 1)},
        {"token_weights": torch.ones(4, 8).double(), "temperature": 0.7, "softcap": 30.0, "skip_inactive": False},
        {"mask": None, "entropy": False},
        {"statistics": hf.BatchStatistics(8, 64, 4, 4)},
        {"statistics": hf.BatchStatistics(*torch.tensor([8, 64, 4, 4]).unbind(), gradient_average=2.0)},
    ],
    ids=["response-weights", "token-weights", "no-mask", "numbers", "tensors"],
)
def test_three_launches_with(options: dict[str, Any], launched: list[str]) -> None:
    objective = hf.Objective.preset("mhpo_ahpo", kl_coef=0.1, entropy_coef=0.1)
    assert len(counted(call(objective, **options), launched)) == 3


def test_backward_is_one_launch(launched: list[str]) -> None:
    out = call(PRESETS["mhpo_ahpo"])()
    launched.clear()
    with Operators(launched):
        out.loss.backward()
    # The seed of ones, and the kernel that multiplies by it unless it is 1.
    assert launched == ["ones_like", "scale_gradient_kernel"]


@pytest.mark.parametrize("name", PRESETS)
def test_three_launches_from_logprobs(name: str, launched: list[str]) -> None:
    logprobs, old, mask = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8), torch.ones(4, 8, dtype=torch.bool)
    advantages = torch.ones(4)
    loss = counted(
        lambda: hf.logprob_policy_loss(
            logprobs, advantages, old_logprobs=old, mask=mask, objective=PRESETS[name], backend="triton"
        ),
        launched,
    )
    assert loss == ["response_statistics_kernel", "logprob_policy_loss_kernel", "sum"]


TWO_KERNELS = [
    "response_statistics_kernel", "computed_rows_kernel", "clone", "token_statistics_kernel",
    "logprob_policy_loss_kernel", "sum",
]  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "options", [{}, {"skip_inactive": False}, {"inplace": True}], ids=["default", "every-row", "inplace"]
)
@pytest.mark.parametrize("name", ["gspo", *TOKEN_LEVEL])
def test_two_kernels_launches(name: str, options: dict[str, Any], layout: str, launched: list[str]) -> None:
    """Sequence-level ratios and float16 logits: the rows to sweep and the loss between the sweeps are kernels'."""
    dtype = torch.float32 if name == "gspo" else torch.float16
    function = call(PRESETS[name], layout, dtype, **options)
    # Ids shifted by one are copied, contiguous ones are not.
    expected = [launch for launch in TWO_KERNELS if launch != "clone" or layout == "padded"]
    assert counted(function, launched) == expected


def test_shared_rows_take_one_launch_more(launched: list[str]) -> None:
    tokens, advantages = torch.zeros(1, 2, dtype=torch.long), torch.ones(1)
    logits = torch.zeros(1, 2, 262144, dtype=torch.float16)
    launches = counted(lambda: hf.policy_loss(logits, tokens, advantages, backend="triton"), launched)
    expected = [name for name in TWO_KERNELS if name != "clone"]
    expected.insert(expected.index("token_statistics_kernel") + 1, "combine_statistics_kernel")
    assert launches == expected


def test_normalizers_are_made_once(launched: list[str]) -> None:
    """Both kernels between the caller and the loss weigh tokens; the groups are sorted for one of them."""
    objective = hf.Objective("sequence", normalization="group_mean_length")
    launches = counted(call(objective, groups=torch.tensor([0, 0, 1, 1])), launched)
    assert [name for name in launches if name.endswith("_kernel")] == [
        name for name in TWO_KERNELS if name.endswith("_kernel")
    ]
    assert launches.count("sort") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_two_kernels_backward(entropy_coef: float, dtype: torch.dtype, launched: list[str]) -> None:
    out = call(hf.Objective.preset("gspo", entropy_coef=entropy_coef), dtype=dtype)()
    launched.clear()
    with Operators(launched):
        out.loss.backward()
    # The seed of ones; its product with the tokens' coefficients, 0 where not computed; the second sweep.
    operators = ["mul", "scalar_tensor", "where"] * (2 if entropy_coef else 1)
    assert sorted(launched) == sorted(["ones_like", *operators, "token_gradient_kernel"])


def test_metrics_cost_nothing_until_asked_for(launched: list[str]) -> None:
    function = call(PRESETS["mhpo_ahpo"])
    out = function()
    launched.clear()
    with Operators(launched):
        out.metrics()
    assert len(launched) > 40  # what a call no longer does


def test_tensors_are_not_copied(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous or shifted by one, in any dtype, the kernels get the caller's own tensors."""
    seen: list[Tensor] = []
    module = importlib.import_module("hpo_fused.kernels.fused_policy_loss")

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: seen.extend(arguments[2:8])

    monkeypatch.setattr(module, "fused_policy_loss_kernel", Spy())
    ids = torch.zeros(4, 9, dtype=torch.int32)
    mask, old = torch.ones(4, 9, dtype=torch.uint8), torch.zeros(4, 9, dtype=torch.bfloat16)
    logits, advantages, weights = torch.zeros(4, 8, 128), torch.ones(4, dtype=torch.float16), torch.ones(4, 1)
    hf.policy_loss(
        logits, ids[:, 1:], advantages, mask=mask[:, 1:], old_logprobs=old[:, :-1], token_weights=weights,
        backend="triton",
    )  # fmt: skip
    pointers = [None if value is None else value.data_ptr() for value in seen]
    assert pointers == [
        value.data_ptr() for value in (ids[:, 1:], mask[:, 1:], advantages, weights, old[:, :-1])
    ] + [None]  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_python_time(layout: str, launched: list[str]) -> None:
    """Median of a forward call, its kernels left out: 60 us at most, thrice that on a busy machine (it was 231)."""
    function = call(PRESETS["mhpo_ahpo"], layout)
    for _ in range(100):
        function()
    medians = []
    for _ in range(10):
        times = []
        for _ in range(200):
            start = time.thread_time()
            function()
            times.append(time.thread_time() - start)
        medians.append(1e6 * statistics.median(times))
    print(f"{layout}: {min(medians):.1f} us a call")
    assert min(medians) <= 3 * MICROSECONDS


def _compilations(*arguments: str) -> dict[str, int]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("recompilations.py")), *arguments]
    finished = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    found: dict[str, int] = json.loads(finished.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("compile")
def test_new_values_do_not_recompile() -> None:
    """New T, N, temperature, epsilon, alpha, kl_coef and alignment of micro-batches: one compilation per kernel."""
    once = dict.fromkeys(
        ["computed_rows_kernel", "fused_policy_loss_kernel", "logprob_policy_loss_kernel", "scale_gradient_kernel",
         "token_gradient_kernel", "combine_statistics_kernel"], 1,
    )  # fmt: skip
    # With tokens to check, and without; with rows of its own, and shared.
    assert _compilations() == {**once, "response_statistics_kernel": 2, "token_statistics_kernel": 2}


@pytest.mark.slow
@pytest.mark.xdist_group("compile")
def test_recompilations_are_seen() -> None:
    """The count itself: without do_not_specialize every kernel compiles several times."""
    assert min(_compilations("--specialized").values()) >= 5
