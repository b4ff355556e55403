"""The sampler's kept set: top-p and top-k leave a few ids of a row's vocabulary, and probabilities are over those.

A chunk's logits outside the set become -inf before anything else looks at them: log-probability, entropy, loss and
gradient are then those of the renormalised softmax. Two forms: packed id lists and bit masks. Neither waits for a
device, and what is made aside has the size of a slice, but for one logit per listed id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hpo_fused.checks import check_tensor, described, values_readable
from hpo_fused.layout import rises

from .head import slices
from .rows import Rows

_WORD = 32  # ids in an entry of a bit mask

# Bytes that a slice takes: of each id its number, row, destination and some comparisons; of each of a mask's words
# itself, its four bytes as indices, and 32 bools.
_BYTES_PER_ID = 48
_BYTES_PER_WORD = 72


class KeptIds(NamedTuple):
    """Packed id lists: row b * T + t keeps ``ids[offsets[row]:offsets[row + 1]]``; an id may occur twice.

    ``ids``: integer [M]. ``offsets``: integer [rows + 1], from 0 to M.
    """

    ids: Tensor
    offsets: Tensor

    def _slices(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The ids (int64) and their rows, a slice at a time."""
        ends = self.offsets[1:].to(torch.int64)
        for part in slices(len(self.ids), _BYTES_PER_ID, self.ids.device):
            number = torch.arange(part.start, part.stop, device=self.ids.device)
            yield part, self.ids[part].to(torch.int64), torch.searchsorted(ends, number, right=True)

    def holds(self, tokens: Tensor) -> Tensor:
        """Whether each row's set has the row's token: bool, of the shape of ``tokens``, int64 with an entry per row."""
        found = torch.zeros(tokens.numel(), dtype=torch.int32, device=tokens.device)
        for _, ids, row in self._slices():
            found.index_add_(0, row, (ids == tokens.reshape(-1)[row]).to(torch.int32))
        return (found > 0).view(tokens.shape)

    def restrict(self, logits: Tensor, rows: Rows, first: int) -> None:
        """-inf in place of the ``rows``' logits [r, columns], ids from ``first`` on, outside their sets.

        How many ids the rows have is not known to the host, so that all ids are gone through. Those of other rows and
        other columns take the place of the first logit, which is put right at the end.
        """
        flat, width = logits.view(-1), logits.shape[1]
        if len(flat) == 0:
            return
        start = torch.full((len(self.offsets) - 1,), -1, device=flat.device)
        start[rows.positions] = torch.arange(0, flat.numel(), width, device=flat.device)

        def places() -> Iterator[tuple[slice, Tensor, Tensor]]:
            for part, ids, row in self._slices():
                inside = (start[row] >= 0) & (ids >= first) & (ids < first + width)
                yield part, torch.where(inside, start[row] + ids - first, 0), inside

        spare, stays = flat[:1].clone(), torch.zeros(1, dtype=torch.bool, device=flat.device)
        kept = flat.new_empty(len(self.ids))
        for part, place, inside in places():
            torch.index_select(flat, 0, place, out=kept[part])
            stays |= (inside & (place == 0)).any()
        flat.fill_(-torch.inf)
        for part, place, _ in places():
            flat[place] = kept[part]
        flat[:1] = torch.where(stays, spare, -torch.inf)


class KeptBits(NamedTuple):
    """A bit mask, ``words`` int32 [B, T, ceil(V / 32)]: row b, t keeps id j where bit j % 32 of word j // 32 is set."""

    words: Tensor

    def holds(self, tokens: Tensor) -> Tensor:
        """Whether each row's set has the row's token: bool [B, T], as ``tokens`` (int64)."""
        word = self.words.gather(-1, (tokens // _WORD).unsqueeze(-1)).squeeze(-1)
        return (word >> tokens % _WORD) & 1 != 0

    def restrict(self, logits: Tensor, rows: Rows, first: int) -> None:
        """-inf in place of the ``rows``' logits [r, columns], ids from ``first`` on, outside their sets.

        8 at a time, by a table over bytes.
        """
        device, offset = logits.device, first % _WORD
        words = self.words[..., first // _WORD : -(-(first + logits.shape[1]) // _WORD)]
        bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
        dropped = (bits & 1 == 0).view(torch.int64).squeeze(1)  # 8 bools in one entry
        for part in slices(len(rows), _BYTES_PER_WORD * words.shape[-1], device):
            octets = rows.part(part).of(words).contiguous().view(torch.uint8)
            outside = dropped[octets.to(torch.int64)].view(torch.bool)
            logits[part].masked_fill_(outside[:, offset : offset + logits.shape[1]], -torch.inf)


Keep: TypeAlias = KeptIds | KeptBits


def check_keep(keep: object, tokens: Tensor, mask: Tensor | None, vocabulary: int) -> Keep | None:
    """``keep`` as one of its two forms; ``tokens`` and ``mask`` [B, T], or packed [N], are checked already.

    Raises:
        TypeError: neither a tuple of two integer tensors nor an int32 tensor.
        ValueError: another shape or device; and on the CPU, elsewhere a device-side assert: offsets that do not rise
            from 0 to M, an id outside [0, V), or an unmasked row whose sampled token is not in its own set.
    """
    if keep is None:
        return None
    kept = _lists(keep, tokens, vocabulary) if isinstance(keep, tuple) else _mask(keep, tokens, vocabulary)
    padded = tokens if tokens.dim() == 2 else tokens.unsqueeze(0)
    found = kept.holds(padded.to(torch.int64).clamp(0, vocabulary - 1)).view(tokens.shape)
    found = found if mask is None else found | (mask == 0)

    def first() -> str:
        place = tuple((~found).nonzero()[0].tolist())
        return f"token {int(tokens[place])} at {list(place)}"

    _demand(found, "keep: expected every unmasked row's sampled token in its own set", first)
    return kept


def _demand(valid: Tensor, expected: str, got: Callable[[], str]) -> None:
    """ValueError unless all of ``valid`` holds; an assertion on the device where reading it would synchronise."""
    if not values_readable(valid):
        torch._assert_async(valid.all(), expected)
    elif not bool(valid.all()):
        raise ValueError(f"{expected}, got {got()}")


def _mask(keep: object, tokens: Tensor, vocabulary: int) -> KeptBits:
    shape = (*tokens.shape, -(-vocabulary // _WORD))
    if not isinstance(keep, Tensor) or keep.dtype != torch.int32:
        raise TypeError(
            f"keep: expected a tuple (ids, offsets), or a bit mask as an int32 tensor of shape {list(shape)}, got "
            f"{described(keep)}"
        )
    check_tensor("keep", keep, [shape], "integer", tokens.device)
    return KeptBits(keep if keep.dim() == 3 else keep.unsqueeze(0))


def _lists(keep: tuple[object, ...], tokens: Tensor, vocabulary: int) -> KeptIds:
    if len(keep) != 2 or not isinstance(keep[0], Tensor):
        raise TypeError(
            f"keep: expected a tuple (ids, offsets) of two integer tensors, got ({', '.join(map(described, keep))})"
        )
    ids = check_tensor("keep's ids", keep[0], [(keep[0].numel(),)], "integer", tokens.device)
    offsets = check_tensor("keep's offsets", keep[1], [(tokens.numel() + 1,)], "integer", tokens.device)
    _demand(
        rises(offsets, len(ids)),
        f"keep's offsets: expected to rise from 0 to the number of ids, {len(ids)}",
        lambda: f"{int(offsets[0])} to {int(offsets[-1])}, falling {int((offsets[1:] < offsets[:-1]).sum())} times",
    )
    if len(ids) > 0:
        low, high = (bound.to(torch.int64) for bound in ids.aminmax())  # V may lie outside a narrower type
        _demand(
            (low >= 0) & (high < vocabulary),
            f"keep's ids: expected ids in [0, {vocabulary})",
            lambda: f"{int(low)} to {int(high)}",
        )
    return KeptIds(ids, offsets)
