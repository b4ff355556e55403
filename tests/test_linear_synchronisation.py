"""Where the linear path looks at the device's values: once, or never."""

from __future__ import annotations

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

from .linear_cases import bit_mask, id_lists, kept_set
from .linear_counters import (
    ACTIVE,
    UNMASKED,
    VOCABULARY,
    Allocations,
    arguments,
    aten,
    call,
    requiring,
    warm,
)
from .samples import hidden_arguments

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
        found.restrict(logits, rows)
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
