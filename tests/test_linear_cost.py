"""What the linear path does and does not do: GEMMs counted, nothing copied whole, no look at the device's values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hpo_fused as hf
from hpo_fused.interface import MASKED, SKIPPED
from hpo_fused.linear import head as linear_head
from hpo_fused.linear import keep as linear_keep
from hpo_fused.linear import rows as linear_rows
from hpo_fused.linear.keep import check_keep
from hpo_fused.linear.rows import Rows, choose_rows

from .linear_equivalence import bit_mask, id_lists, kept_set
from .samples import hidden_arguments

BATCH, STEPS, WIDTH, VOCABULARY = 6, 5, 16, 101
ACTIVE, UNMASKED = 12, 19

aten = torch.ops.aten


class Gemms(TorchDispatchMode):
    """Adds up the multiplications of every matrix product, and notes operands that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0
        self.finite = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.mm, aten.addmm):
            left, right = [value for value in args if isinstance(value, Tensor)][-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
            self.finite &= bool(left.isfinite().all()) and bool(right.isfinite().all())
        elif func.overloadpacket in (aten.bmm, aten.baddbmm, aten.linear, aten.matmul, aten._scaled_mm):
            raise AssertionError(f"a product that is not counted: {func}")
        return result

    @property
    def rows(self) -> float:
        """In rows of one product with the head."""
        return self.multiplications / (WIDTH * VOCABULARY)


class Allocations(TorchDispatchMode):
    """Shapes (and dtypes) of tensors that operations made, as opposed to views of what there was."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[torch.dtype] = []
        self.names: list[str] = []
        self.largest = 0  # bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        known = {
            value.untyped_storage().data_ptr()
            for value in (*args, *(kwargs or {}).values())
            if isinstance(value, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.shapes.append(tuple(value.shape))
                self.dtypes.append(value.dtype)
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result

    def rows(self, width: int, dtype: torch.dtype) -> int:
        """Of the largest new tensor of ``dtype`` whose last dimension is ``width``."""
        return max(
            (
                math.prod(shape[:-1])
                for shape, kind in zip(self.shapes, self.dtypes, strict=True)
                if len(shape) > 1 and shape[-1] == width and kind == dtype
            ),
            default=0,
        )


def arguments(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two responses of six inactive, a mask; hidden is a strided view."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(BATCH, STEPS + 1, WIDTH, generator=generator)
    tokens = torch.randint(VOCABULARY, (BATCH, STEPS), generator=generator)
    mask = torch.arange(STEPS) < torch.tensor([5, 2, 4, 3, 5, 0])[:, None]
    values = {
        "base": hidden.to(dtype),
        "weight": (torch.randn(VOCABULARY, WIDTH, generator=generator) / 2).to(dtype),
        "bias": torch.randn(VOCABULARY, generator=generator).to(dtype),
        "tokens": torch.where(mask, tokens, -100),
        "advantages": torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, 2.0]),
        "old_logprobs": torch.full((BATCH, STEPS), -4.0),
        "mask": mask,
    }
    assert int(mask.sum()) == UNMASKED
    return {name: value.to(device) for name, value in values.items()}


def call(values: dict[str, Tensor], bias: bool = True, **options: Any) -> hf.PolicyLossOutput:
    return hf.linear_policy_loss(
        values["base"][:, :-1],
        values["weight"],
        values["tokens"],
        values["advantages"],
        bias=values["bias"] if bias else None,
        old_logprobs=values["old_logprobs"],
        mask=values["mask"],
        **options,
    )


def requiring(values: dict[str, Tensor], *frozen: str) -> dict[str, Tensor]:
    for name in ("base", "weight", "bias"):
        values[name].requires_grad_(name not in frozen)
    return values


def warm(values: dict[str, Tensor], **options: Any) -> None:
    """What a device can do is found out by trying, once; those products are not counted."""
    call(values, **options).loss.backward()
    for value in values.values():
        value.grad = None


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize(
    ("name", "frozen", "products"),
    [
        ("grpo", (), 3),
        ("grpo", ("base",), 2),
        ("grpo", ("weight",), 2),
        ("grpo", ("base", "weight"), 1),  # the bias's gradient needs no product
        ("gspo", (), 4),
        ("gspo", ("base",), 3),
        ("gspo", ("weight",), 3),
        ("gspo", ("base", "weight"), 2),
    ],
)
def test_products_of_active_rows_only(
    name: str, frozen: tuple[str, ...], products: int, chunk_rows: int | None, device: torch.device
) -> None:
    values = requiring(arguments(device), *frozen)
    options = {"objective": name, "chunk_bytes": None if chunk_rows is None else chunk_rows * VOCABULARY * 4}
    warm(values, **options)
    with Gemms() as gemms:
        out = call(values, **options)
        forward = gemms.rows
        out.loss.backward()
    assert int(out.active.sum()) == ACTIVE
    assert gemms.rows == products * ACTIVE
    assert forward == (products if name == "grpo" else 1) * ACTIVE  # backward of a token-level objective only scales


@pytest.mark.parametrize(
    ("dtype", "options", "products"),
    [
        (torch.bfloat16, {}, 3),
        (torch.bfloat16, {"chunk_bytes": 5 * VOCABULARY * 2}, 3),
        (torch.bfloat16, {"logits_dtype": torch.float32}, 3),
        (torch.float16, {}, 4),  # the loss scaler's factor is known in backward only
        (torch.bfloat16, {"weight_grad": True}, 4),
    ],
)
def test_products_in_low_precision(
    dtype: torch.dtype, options: dict[str, Any], products: int, device: torch.device
) -> None:
    values = requiring(arguments(device, dtype))
    if "weight_grad" in options:
        options = {"weight_grad": torch.zeros(VOCABULARY, WIDTH, device=device)}
    warm(values, **options)
    with Gemms() as gemms:
        call(values, **options).loss.backward()
    assert gemms.rows == products * ACTIVE


@pytest.mark.parametrize(("name", "products"), [("grpo", 3), ("gspo", 4)])
def test_products_under_autocast(name: str, products: int, device: torch.device) -> None:
    values = requiring(arguments(device))
    with torch.autocast(device.type, torch.bfloat16):
        warm(values, objective=name)
        with Gemms() as gemms:
            call(values, objective=name).loss.backward()
    assert gemms.rows == products * ACTIVE


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_products_of_statistics(name: str, device: torch.device) -> None:
    """One product under no_grad, and one more for unmasked rows without a signal where they are asked for."""
    values = requiring(arguments(device))
    warm(values, objective=name)
    for skip, rows in ((True, ACTIVE), (False, UNMASKED)):
        with Gemms() as gemms, torch.no_grad():
            call(values, objective=name, skip_inactive=skip)
        assert gemms.rows == rows
    with Gemms() as gemms:
        call(values, objective=name, skip_inactive=False).loss.backward()
    assert gemms.rows == (3 if name == "grpo" else 4) * ACTIVE + UNMASKED - ACTIVE


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_rows_up_to_a_bound_cost_as_active_ones(name: str, device: torch.device) -> None:
    values = requiring(arguments(device))
    warm(values, objective=name)
    for count in (ACTIVE, ACTIVE + 4):
        with Gemms() as gemms:
            call(values, objective=name, active_count=count).loss.backward()
        assert gemms.rows == (3 if name == "grpo" else 4) * count


def test_products_of_log_probabilities(device: torch.device) -> None:
    """One product of unmasked rows under no_grad, four where differentiated, fewer with a frozen side."""
    values = requiring(arguments(device))

    def call() -> hf.TokenLogprobs:
        return hf.linear_token_logprobs(
            values["base"][:, :-1], values["weight"], values["tokens"], mask=values["mask"],
            chunk_bytes=5 * VOCABULARY * 4,
        )  # fmt: skip

    call().logprobs.sum().backward()
    with Gemms() as gemms, torch.no_grad():
        quiet = call()
    assert gemms.rows == UNMASKED
    with Gemms() as gemms:
        loud = call()
        assert gemms.rows == UNMASKED
        loud.logprobs.sum().backward()
    assert gemms.rows == 4 * UNMASKED
    assert not quiet.logprobs.requires_grad
    assert torch.equal(quiet.logprobs, loud.logprobs)
    requiring(values, "weight", "bias")
    with Gemms() as gemms:
        call().logprobs.sum().backward()
    assert gemms.rows == 3 * UNMASKED


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("slack", [None, 4])
def test_masked_and_inactive_rows_are_never_read(
    name: str, poison: float, slack: int | None, device: torch.device
) -> None:
    """Whatever they hold: no operand of a product is touched by it, and no bit of a result."""
    results = []
    for garbage in (0.0, poison):
        values = arguments(device)
        active = call(values, objective=name).active
        values["base"][:, :-1][~active] = garbage
        values["base"][:, -1] = garbage
        values["old_logprobs"][~values["mask"]] = garbage
        count = None if slack is None else ACTIVE + slack
        with Gemms() as gemms:
            out = call(requiring(values), objective=name, active_count=count)
            out.loss.backward()
        assert gemms.finite
        assert torch.equal(out.active, active)
        results.append((out.loss.detach(), out.logprobs, *(values[leaf].grad for leaf in ("base", "weight", "bias"))))
    for clean, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0, equal_nan=True)
    assert results[1][0].isfinite()
    assert all(gradient.isfinite().all() for gradient in results[1][2:])


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
def test_nothing_is_copied_whole(
    name: str, everything: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither strided hidden states nor logits: no tensor with more rows than a chunk is made from them.

    In bfloat16, because the torch backend works with a few float32 rows of its own, and on a processor that multiplies
    in it: others widen slices of the weight, whose memory test_linear_gemms.py looks at.
    """
    monkeypatch.setattr(linear_head, "multiplies_in", lambda *_: True)
    values = requiring(arguments(device, torch.bfloat16), "base", "weight")
    if everything:
        values["mask"] = torch.ones_like(values["mask"])
        values["tokens"] = values["tokens"].clamp(min=0)
        values["advantages"] = torch.ones_like(values["advantages"])
    options = {"objective": name, "chunk_bytes": 4 * VOCABULARY * 2}
    with Allocations() as made:
        out = call(values, **options)
        out.loss.backward()
    assert int(out.active.sum()) == (BATCH * STEPS if everything else ACTIVE)
    assert made.rows(WIDTH, torch.bfloat16) == 4
    assert made.rows(WIDTH, torch.float32) == 0
    assert made.rows(VOCABULARY, torch.bfloat16) == 4


def test_contiguous_rows_are_not_even_gathered(device: torch.device) -> None:
    values = requiring(arguments(device), "base", "weight")
    hidden, tokens = values["base"][:2, :3].detach().clone(), torch.zeros(2, 3, dtype=torch.long, device=device)
    advantages = torch.ones(2, device=device)
    with Allocations() as made:
        out = hf.linear_policy_loss(hidden, values["weight"], tokens, advantages, bias=values["bias"])
        out.loss.backward()
    assert made.rows(WIDTH, torch.float32) == 0


@pytest.mark.parametrize("frozen", [(), ("base",), ("weight",), ("bias",)])
def test_gradients_of_frozen_inputs_are_not_allocated(frozen: tuple[str, ...], device: torch.device) -> None:
    values = requiring(arguments(device), *frozen)
    hidden = values["base"][:, :-1].detach().requires_grad_("base" not in frozen)
    with Allocations() as made:
        out = hf.linear_policy_loss(
            hidden, values["weight"], values["tokens"], values["advantages"], bias=values["bias"], mask=values["mask"]
        )
        out.loss.backward()
    assert (made.shapes.count((BATCH, STEPS, WIDTH)) > 0) == ("base" not in frozen)
    assert (made.shapes.count((VOCABULARY, WIDTH)) > 0) == ("weight" not in frozen)
    # The bias's sum is the only one of its shape; in float32 its gradient is that sum.
    assert (made.shapes.count((VOCABULARY,)) > 0) == ("bias" not in frozen)


def test_stored_gradients_are_handed_over(device: torch.device) -> None:
    """What forward made becomes .grad: no copy of [V, H] in backward."""
    values = requiring(arguments(device, torch.bfloat16))
    hidden = values["base"].detach().requires_grad_()
    tokens = torch.zeros(BATCH, STEPS + 1, dtype=torch.long, device=device)
    out = hf.linear_policy_loss(hidden, values["weight"], tokens, torch.ones(BATCH, device=device), bias=values["bias"])
    pointers = [saved.data_ptr() for saved in out.loss.grad_fn.saved_tensors]
    out.loss.backward()
    assert [leaf.grad.data_ptr() for leaf in (hidden, values["weight"], values["bias"])] == pointers


# ---------------------------------------------------------------------------------------------------------------
# synchronisation

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique", "_unique2"}


def chosen(device: torch.device) -> tuple[Tensor, Tensor]:
    """Targets [5, 7] and which rows are active: every second one; of the others every second is masked."""
    targets = torch.arange(35, dtype=torch.int32, device=device)
    active = targets % 2 == 1
    return torch.where(targets % 4 == 0, MASKED, targets).view(5, 7), active.view(5, 7)


@pytest.mark.parametrize("idle", [False, True])
def test_choosing_rows_looks_at_values_once(idle: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all selections together; a bool mask as an index would be a nonzero for each."""
    targets, active = chosen(device)
    original, looks = Tensor.tolist, []
    with Allocations() as made, monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", lambda self: looks.append("tolist") or original(self))
        rows, *others = choose_rows(targets, active, None, idle=idle)
    assert len([*looks, *(name for name in made.names if name in SYNCHRONISING)]) == 1
    assert rows.exact
    assert rows.positions.tolist() == rows.targets.tolist() == list(range(1, 35, 2))
    assert [other.positions.tolist() for other in others] == ([list(range(2, 35, 4))] if idle else [])


@pytest.mark.parametrize("count", [20, 35])
def test_choosing_a_known_number_looks_at_nothing(
    count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device whose values cannot be read for nothing."""
    targets, active = chosen(device)
    targets = torch.where(active, targets, SKIPPED)
    monkeypatch.setattr(linear_rows, "values_readable", lambda value: False)
    with Allocations() as made:
        (rows,) = choose_rows(targets, active, count, idle=False)
    assert not SYNCHRONISING & set(made.names)
    assert len(rows) == count
    assert not rows.exact
    assert rows.positions[rows.targets >= 0].tolist() == list(range(1, 35, 2))
    assert rows.positions.unique().numel() == count


def test_choosing_too_few_is_asserted_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_rows, "values_readable", lambda value: False)
    with pytest.raises(RuntimeError, match="active_count: expected at least the number of active rows"):
        choose_rows(torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 3, dtype=torch.bool), 5, idle=False)


FORMS = {"ids": id_lists, "bits": bit_mask}


def kept_by(values: dict[str, Tensor], form: str | None) -> Any:
    """A kept set of ``arguments`` as the argument, on their device."""
    if form is None:
        return None
    keep = FORMS[form](kept_set(values["tokens"].cpu(), values["mask"].cpu(), VOCABULARY))
    return tuple(part.to(values["mask"].device) for part in keep) if isinstance(keep, tuple) else keep.to("cuda")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
def test_kept_sets_look_at_nothing(
    form: str, everything: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device whose values cannot be read for nothing; and they work in slices, of whatever rows a chunk has."""
    tile, vocabulary = 1 << 14, 3001
    targets, active = chosen(device)
    tokens, active = targets.clamp(min=0).long(), torch.ones_like(active) if everything else active
    kept = kept_set(tokens.cpu(), active.cpu(), vocabulary).to(device)
    keep = FORMS[form](kept.cpu())
    keep = tuple(part.to(device) for part in keep) if isinstance(keep, tuple) else keep.to(device)
    monkeypatch.setattr(linear_head, "TILE_BYTES", (tile, tile))
    monkeypatch.setattr(linear_keep, "values_readable", lambda value: False)
    rows = Rows.all(tokens.int()) if everything else Rows.at(active.view(-1).nonzero().squeeze(1), targets)
    rows = rows.part(slice(6, 17))
    logits = torch.randn(len(rows), vocabulary, device=device)
    expected = logits.masked_fill(~rows.of(kept), -torch.inf)
    with Allocations() as made:
        found = check_keep(keep, tokens, active, vocabulary)
        assert found is not None
        found.restrict(logits, rows, 0)
    assert torch.equal(logits, expected)
    assert not SYNCHRONISING & set(made.names)
    # A slice; the table over bytes, and the listed ids' own logits.
    assert made.largest <= max(tile, 256 * 8 * 8, len(keep[0]) * 4 if form == "ids" else 0)


def test_an_id_beyond_the_vocabulary_is_asserted_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_keep, "values_readable", lambda value: False)
    tokens, offsets = torch.zeros(1, 2, dtype=torch.long), torch.tensor([0, 1, 2])
    for ids, boundaries, words in (
        ([0, 11], offsets, "keep's ids: expected ids in"),
        ([0, 0], offsets - 1, "keep's offsets: expected to rise"),
        ([0, 1], offsets, "keep: expected every unmasked row's"),
    ):
        with pytest.raises(RuntimeError, match=words):
            check_keep((torch.tensor(ids), boundaries), tokens, None, 11)


@pytest.mark.parametrize("function", ["linear_policy_loss", "policy_loss"])
def test_adaptive_alpha_stays_on_the_device(function: str, device: torch.device) -> None:
    """masked_fill with a 0-d tensor fetches it to the host on CUDA."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (aten.masked_fill, aten.masked_fill_):
                assert not isinstance(args[2], Tensor), "a value that CUDA would synchronise to read"
            return func(*args, **(kwargs or {}))

    hidden, weight, tokens, advantages, _ = hidden_arguments(device)
    with Watch():
        if function == "policy_loss":
            hf.policy_loss(hidden @ weight.t(), tokens, advantages, objective="ahpo", backend="torch")
        else:
            hf.linear_policy_loss(hidden, weight, tokens, advantages, objective="ahpo", backend="torch")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_known_number_needs_no_synchronisation(name: str, slack: int, form: str | None, device: torch.device) -> None:
    values = requiring(arguments(device, torch.bfloat16))
    options: dict[str, Any] = {"objective": name, "chunk_bytes": 5 * VOCABULARY * 2, "keep": kept_by(values, form)}
    warm(values, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = call(values, active_count=ACTIVE + slack, **options)
        out.loss.backward()
        with torch.no_grad():
            quiet = call(values, active_count=ACTIVE + slack, **options)
            hf.linear_token_logprobs(
                values["base"][:, :-1], values["weight"], values["tokens"], mask=values["mask"], keep=options["keep"],
                active_count=UNMASKED,
            )  # fmt: skip
        with pytest.raises(RuntimeError, match="synchroniz"):  # the mode does notice
            call(values, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert quiet.loss.item() == out.loss.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_captured_in_a_cuda_graph(name: str, form: str | None, device: torch.device) -> None:
    """Replayed with other hidden states in place: the gradient of those."""
    values = requiring(arguments(device, torch.bfloat16))
    other = torch.randn_like(values["base"])
    options: dict[str, Any] = {
        "objective": name, "active_count": ACTIVE + 4, "chunk_bytes": 5 * VOCABULARY * 2,
        "keep": kept_by(values, form),
    }  # fmt: skip
    twin = {key: value.detach().clone() for key, value in values.items()}
    twin["base"] = other.clone()
    expected = call(requiring(twin), **options)
    expected.loss.backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            warm(values, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(values, **options)
        out.loss.backward()
    with torch.no_grad():
        values["base"].copy_(other)
    graph.replay()
    torch.testing.assert_close(out.loss.detach(), expected.loss.detach())
    for leaf in ("base", "weight", "bias"):
        torch.testing.assert_close(values[leaf].grad, twin[leaf].grad)
