"""What a loss call costs the host: operations launched, arguments of a launch, recompilations. No GPU is needed.

The call runs on CPU tensors as it would on a GPU: kernels are replaced by counters, and what only a CPU does (looking
at values in order to raise ValueError) is switched off.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import jit

import hpo_fused as hf
from hpo_fused.backend import kernels
from hpo_fused.kernels import launch

from .linear_counters import LAUNCHES, arguments
from .test_equivalence import PRESETS

pytestmark = pytest.mark.skipif(kernels is None, reason="needs Triton")

# Each operation's kernels are in a module of its name.
MODULES = ("logprob_loss", "policy_loss", "scale_gradient", "token_gradient", "token_statistics", "token_terms")

# Operators of PyTorch that start nothing on a device.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "new_empty", "select", "slice", "split_with_sizes",
    "squeeze", "t", "unbind", "unsafe_split", "unsqueeze", "view", "_reshape_alias",
}  # fmt: skip
TERMS = ["response_statistics_kernel", "token_terms_kernel"]
ONE_KERNEL = [*TERMS, "policy_loss_kernel", "sum"]
TWO_KERNELS = [*TERMS, "token_statistics_kernel", "logprob_loss_kernel", "sum"]


class Launch(NamedTuple):
    """A kernel's name and arguments, by parameter; addresses stand for tensors, which autograd may hand on."""

    name: str
    arguments: dict[str, Any]


def addresses(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(addresses, value))
    return value.data_ptr() if isinstance(value, Tensor) else value


class Stub:
    """In a kernel's place: writes down what it is called with, and launches nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        signature = inspect.signature(self.kernel.fn)

        def launch(*arguments: Any, **options: Any) -> None:
            own = {name: value for name, value in options.items() if name in signature.parameters}
            bound = signature.bind(*arguments, **own).arguments
            by_name = {name: addresses(value) for name, value in bound.items()}
            self.launches.append(Launch(self.kernel.fn.__name__, by_name))

        return launch


class Operators(TorchDispatchMode):
    """Writes down PyTorch's operators that launch something."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        namespace, name = operator.name().split(".")[0].split("::")
        # Our own operators around a launcher allocate, and launch what the stubs write down.
        if name not in FREE and namespace != "hpo_fused":
            self.launches.append(Launch(name, {}))
        return operator(*arguments, **(keywords or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    made: list[Launch] = []
    for name in MODULES:
        module = importlib.import_module(f"hpo_fused.kernels.{name}")
        for key in [key for key in vars(module) if key.endswith("_kernel")]:
            monkeypatch.setattr(module, key, Stub(getattr(module, key), made))
    for name in ("batch", "checks", "layout", "ops"):
        monkeypatch.setattr(f"hpo_fused.{name}.values_readable", lambda value: False)
    # Whether a CPU tensor may go to the kernels at all: it may.
    monkeypatch.setattr(kernels, "serves", lambda tensor: True)
    return made


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


def counted(function: Callable[[], Any], launches: list[Launch]) -> list[str]:
    """Names of what ``function`` launches, in order."""
    function()  # first uses
    launches.clear()
    with Operators(launches):
        function()
    return [launch.name for launch in launches]


def backward_of(out: hf.PolicyLossOutput, launches: list[Launch]) -> list[str]:
    launches.clear()
    with Operators(launches):
        out.loss.backward()
    return [launch.name for launch in launches]


TOKEN_LEVEL = [name for name, objective in PRESETS.items() if objective.ratio_level == "token"]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_four_launches(name: str, layout: str, launches: list[Launch]) -> None:
    assert counted(call(PRESETS[name], layout), launches) == ONE_KERNEL


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
def test_four_launches_with(options: dict[str, Any], launches: list[Launch]) -> None:
    objective = hf.Objective.preset("mhpo_ahpo", kl_coef=0.1, entropy_coef=0.1)
    assert counted(call(objective, **options), launches) == ONE_KERNEL


@pytest.mark.parametrize(("layout", "count"), [("padded", 9), ("packed", 20)])
def test_temperatures_are_not_waited_for(layout: str, count: int, launches: list[Launch]) -> None:
    """One for each response: made one for each row and checked by small operations; a number needs none of them."""
    names = counted(call(PRESETS["grpo"], layout, temperature=torch.ones(4)), launches)
    assert names[-len(ONE_KERNEL) :] == ONE_KERNEL
    assert len(names) - len(ONE_KERNEL) <= count
    assert not {"_local_scalar_dense", "nonzero"} & set(names)


def test_backward_is_one_launch(launches: list[Launch]) -> None:
    # The seed of ones, and the kernel that multiplies by it unless it is 1.
    assert backward_of(call(PRESETS["mhpo_ahpo"])(), launches) == ["ones_like", "scale_gradient_kernel"]


@pytest.mark.parametrize("name", PRESETS)
def test_four_launches_from_logprobs(name: str, launches: list[Launch]) -> None:
    logprobs, old, mask = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8), torch.ones(4, 8, dtype=torch.bool)
    advantages = torch.ones(4)
    loss = counted(
        lambda: hf.logprob_policy_loss(
            logprobs, advantages, old_logprobs=old, mask=mask, objective=PRESETS[name], backend="triton"
        ),
        launches,
    )
    assert loss == [*TERMS, "logprob_loss_kernel", "sum"]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "options", [{}, {"skip_inactive": False}, {"inplace": True}], ids=["default", "every-row", "inplace"]
)
@pytest.mark.parametrize("name", ["gspo", *TOKEN_LEVEL])
def test_five_launches_of_two_sweeps(name: str, options: dict[str, Any], layout: str, launches: list[Launch]) -> None:
    """Sequence-level ratios and float16 logits: the loss between the sweeps is a kernel's."""
    dtype = torch.float32 if name == "gspo" else torch.float16
    assert counted(call(PRESETS[name], layout, dtype, **options), launches) == TWO_KERNELS


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_groups_are_sorted_once(level: Any, launches: list[Launch]) -> None:
    objective = hf.Objective(level, normalization="group_mean_length")
    names = counted(call(objective, groups=torch.tensor([0, 0, 1, 1])), launches)
    expected = ONE_KERNEL if level == "token" else TWO_KERNELS
    assert [name for name in names if name.endswith("_kernel")] == expected[:-1]
    assert names.count("sort") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_backward_of_two_sweeps(entropy_coef: float, dtype: torch.dtype, launches: list[Launch]) -> None:
    out = call(hf.Objective.preset("gspo", entropy_coef=entropy_coef), dtype=dtype)()
    # The seed of ones; its product with the tokens' coefficients; the second sweep.
    products = ["mul"] * (2 if entropy_coef else 1)
    assert backward_of(out, launches) == ["ones_like", *products, "token_gradient_kernel"]


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_from_hidden_states(name: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """``nonzero`` waits: the terms are before it, a GEMM soon after, and behind that what the GEMM does not need."""
    values = arguments(torch.device("cpu"))
    inputs = values["base"][:, 1:].clone().requires_grad_(), values["weight"].requires_grad_()
    batch, mask, old = (*inputs, values["tokens"], values["advantages"]), values["mask"], values["old_logprobs"]
    assert kernels is not None
    terms, targets = kernels.token_terms, mask.int() - 1
    monkeypatch.setattr(kernels, "token_terms", lambda *given: terms(*given)._replace(active=mask, targets=targets))

    def step() -> None:
        if name == "logprobs":
            hf.linear_token_logprobs(*batch[:3], mask=mask, backend="triton")
        else:
            out = hf.linear_policy_loss(*batch, old_logprobs=old, mask=mask, objective=name, backend="triton")
            torch.autograd.grad(out.loss, inputs)

    with torch.set_grad_enabled(name != "logprobs"):
        assert counted(step, launches) == LAUNCHES[name]


def test_metrics_cost_nothing_until_asked_for(launches: list[Launch]) -> None:
    out = call(PRESETS["mhpo_ahpo"])()
    launches.clear()
    with Operators(launches):
        out.metrics()
    assert len(launches) > 10


def test_tensors_are_not_copied(launches: list[Launch]) -> None:
    """Contiguous or shifted by one, in any dtype, the kernels get the caller's own tensors."""
    ids = torch.zeros(4, 9, dtype=torch.int32)
    mask, old = torch.ones(4, 9, dtype=torch.uint8), torch.zeros(4, 9, dtype=torch.bfloat16)
    logits, advantages, weights = torch.zeros(4, 8, 128), torch.ones(4, dtype=torch.float16), torch.ones(4, 1)
    hf.policy_loss(
        logits, ids[:, 1:], advantages, mask=mask[:, 1:], old_logprobs=old[:, :-1], token_weights=weights,
        backend="triton",
    )  # fmt: skip
    (terms,) = [launch.arguments for launch in launches if launch.name == "token_terms_kernel"]
    (loss,) = [launch.arguments for launch in launches if launch.name == "policy_loss_kernel"]
    given = {
        "tokens": ids[:, 1:], "mask": mask[:, 1:], "advantages": advantages, "token_weights": weights,
        "old_logprobs": old[:, :-1],
    }  # fmt: skip
    assert {name: terms[name] for name in given} == {name: value.data_ptr() for name, value in given.items()}
    assert loss["logits"] == logits.data_ptr()


def leaves(value: Any) -> int:
    """Arguments as Triton's launcher walks them: tuples entry by entry."""
    return sum(map(leaves, value)) if isinstance(value, tuple) else 1


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_arguments_of_the_fused_launch(name: str, launches: list[Launch]) -> None:
    """Each costs the host time at every launch."""
    assert kernels is not None
    call(PRESETS[name])()
    (arguments,) = [launch.arguments for launch in launches if launch.name == "policy_loss_kernel"]
    module = importlib.import_module("hpo_fused.kernels.policy_loss")
    parameters = inspect.signature(module.policy_loss_kernel.kernel.fn).parameters
    constants = {name for name, parameter in parameters.items() if "constexpr" in str(parameter.annotation)}
    assert sum(leaves(value) for name, value in arguments.items() if name not in constants) <= 22
    assert len(parameters) <= 25
    assert 0 < len(constants) <= 10


class Compiled(CompiledKernel):
    """In a compiled kernel's place: called straight, it demands arguments for which Triton would have found it."""

    def __init__(self, variant: str, look_up: Callable[..., str], calls: list[str]) -> None:
        self.variant, self.look_up, self.calls = variant, look_up, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            assert len(grid) == 3
            assert self.look_up(*arguments) == self.variant
            self.calls.append("straight")

        return call


def test_repeated_launches_are_straight(monkeypatch: pytest.MonkeyPatch, launches: list[Launch]) -> None:
    """Past Triton's search, and to the same kernel: whatever it specialises on is asked for."""
    target = make_backend(GPUTarget("cuda", 90, 32))
    calls: list[str] = []

    def run(self: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Compiled:
        bind = jit.create_function_from_signature(self.signature, self.params, target)
        own = {name: value for name, value in options.items() if name not in self.arg_names}

        def look_up(*everything: Any) -> str:
            return str(bind(*everything, **own)[1:])

        calls.append("searched")
        return Compiled(look_up(*bind(*arguments, **options)[0].values()), look_up, calls)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(launch, "_compiled", {})
    for name in MODULES:
        module = importlib.import_module(f"hpo_fused.kernels.{name}")
        for key in [key for key in vars(module) if key.endswith("_kernel")]:
            kernel = getattr(module, key).kernel
            given = getattr(kernel, "kwargs", vars(kernel))  # of the interpreter's; it keeps none before Triton 3.5
            if "do_not_specialize" not in given:
                pytest.skip("the interpreter does not say what is not specialised")
            monkeypatch.setattr(module, key, jit.JITFunction(kernel.fn, do_not_specialize=given["do_not_specialize"]))
    objectives = PRESETS["mhpo_ahpo"], PRESETS["cispo"], PRESETS["gspo"], hf.Objective(kl_coef=0.1)
    transforms = (1.0, None), (0.5, 20.0), (torch.tensor(0.5), None)
    shapes = (4, 8, 128), (1, 1, 128), (16, 16, 128), (2, 3, 997)
    for objective, (B, T, V), shift, dtype, (temperature, softcap) in itertools.product(
        objectives, shapes, (0, 1, 8), (torch.bfloat16, torch.float32), transforms
    ):
        room = torch.zeros(B * T * V + shift, dtype=dtype, requires_grad=True)
        rows = torch.zeros(B * T + shift, dtype=dtype)[shift:].view(B, T)
        hf.policy_loss(
            room[shift:].view(B, T, V), rows.long(), rows[:, 0], old_logprobs=rows, ref_logprobs=rows,
            objective=objective, temperature=temperature, softcap=softcap, backend="triton",
        ).loss.backward()  # fmt: skip
    assert calls.count("straight") > 2 * calls.count("searched") > 0


def _compilations(*arguments: str) -> dict[str, int]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("recompilations.py")), *arguments]
    finished = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    counts: dict[str, int] = json.loads(finished.stdout.splitlines()[-1])
    return counts


@pytest.mark.slow
def test_new_values_do_not_recompile() -> None:
    """New T, N, rows of hidden states, temperature, epsilon, alpha, kl_coef, alignment: one compilation per kernel.

    Two of kernels that sweep: with a number for a temperature and with a tensor, whatever its level and alignment.
    """
    once = ["logprob_loss_kernel", "response_statistics_kernel", "scale_gradient_kernel", "token_terms_kernel"]
    twice = ["policy_loss_kernel", "token_statistics_kernel"]
    more = {"token_gradient_kernel": 2 * 2}  # with entropy coefficients, from hidden states
    assert _compilations() == {**dict.fromkeys(once, 1), **dict.fromkeys(twice, 2), **more}


@pytest.mark.slow
def test_recompilations_are_seen() -> None:
    """The count itself: without do_not_specialize every kernel compiles several times."""
    assert min(_compilations("--specialized").values()) >= 2
