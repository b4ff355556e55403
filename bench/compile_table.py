"""The compile report for people: counted instructions and the model's predictions, as text and as markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, groupby
from typing import Any

from .gpus import GPUS
from .roofline import Prediction

SWEEPS = {"statistics": "statistics sweep", "gradient": "gradient sweep"}
WIDE = 96  # columns from which nothing is left out
NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A heading, a width in characters (the space before it included), and the cell of a record."""

    heading: str
    width: int
    cell: Callable[[dict[str, Any]], str]
    optional: bool = False  # left out where there is no room


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _general(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda record: str(record[key])


def _widths(load: int, store: int) -> str:
    return f"{load}/{store}" if store else str(load)


def _of_sweep(role: str, value: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    def cell(record: dict[str, Any]) -> str:
        loop = next((loop for loop in record["loops"] if loop["role"] == role), None)
        return NOTHING if loop is None else value(loop)

    return cell


def _count(*names: str) -> Callable[[dict[str, Any]], str]:
    """Of the first class that the loop has: NVIDIA and AMD have different ones."""
    return lambda loop: _number(next(loop["counts"][name] for name in names if name in loop["counts"]), 1)


GENERAL = (
    Column("target", 6, _general("target")),
    Column("regs", 5, _general("registers")),
    Column("spill", 6, _general("spills")),
    Column("smem", 6, _general("shared_bytes")),
    Column("occ", 5, lambda record: f"{record['occupancy']['share']:.0%}"),
    Column("ld/st", 6, lambda record: _widths(record["widest_load"], record["widest_store"]), optional=True),
)


def _sweep(role: str) -> tuple[Column, ...]:
    return (
        Column("instr", 6, _of_sweep(role, lambda loop: _number(loop["instructions"], 1))),
        Column("MUFU", 5, _of_sweep(role, lambda loop: _number(loop["counts"]["mufu"], 2))),
        Column("FP", 5, _of_sweep(role, _count("fp", "vector"))),
        Column("INT", 4, _of_sweep(role, _count("integer", "scalar"))),
        Column("mem", 4, _of_sweep(role, _count("memory"))),
        Column(
            "bytes", 6, _of_sweep(role, lambda loop: _widths(loop["load_bytes"], loop["store_bytes"])), optional=True
        ),
    )


def _columns(wide: bool) -> dict[str, list[Column]]:
    """By the heading that stands over them."""
    groups = {"": GENERAL, **{SWEEPS[role]: _sweep(role) for role in SWEEPS}}
    return {name: [column for column in group if wide or not column.optional] for name, group in groups.items()}


def _line(columns: Iterable[Column], cells: Iterable[str]) -> str:
    """The first column to the left, the others to the right."""
    texts = [
        cell.ljust(column.width) if index == 0 and column.heading == "target" else cell.rjust(column.width)
        for index, (column, cell) in enumerate(zip(columns, cells, strict=True))
    ]
    return "".join(texts)


def lines(records: Iterable[dict[str, Any]], width: int = WIDE) -> Iterator[tuple[str, bool]]:
    """Lines of text and whether each is a heading: for each kernel and variant its name, then a line per target."""
    groups = _columns(width >= WIDE)
    flat = [column for group in groups.values() for column in group]
    over = "".join(
        name.center(sum(column.width for column in group) - 3, "─").rjust(sum(column.width for column in group))
        if name else " " * sum(column.width for column in group)
        for name, group in groups.items()
    )  # fmt: skip
    yield over, True
    yield _line(flat, [column.heading for column in flat]), True
    ordered = sorted(records, key=lambda record: (record["kernel"], record["variant"]))  # stable: targets stay
    for (kernel, variant), group in groupby(ordered, key=lambda record: (record["kernel"], record["variant"])):
        yield f"{kernel}/{variant}", True
        for record in group:
            yield _line(flat, [column.cell(record) for column in flat]), False


def notes() -> Iterator[str]:
    """What the columns mean."""
    yield (
        "regs: registers of a thread; spill: bytes (NVIDIA) or registers (AMD) that did not fit into them; smem: bytes "
        "of shared memory of a program; occ: theoretical occupancy."
    )
    yield (
        "ld/st: bytes of a thread's widest load and store. Sweeps: instructions per element, of them special functions "
        "(MUFU), floating point (AMD: all other vector instructions), integer and logic (AMD: scalar) and memory; the "
        "rest is control. bytes: narrowest load/store of the main loop."
    )


# ---------------------------------------------------------------------------------------------------------------
# predictions

MODEL_TITLE = "Predicted by a roofline model from these counts, not measured:"


def _binding(prediction: Prediction) -> str:
    """What binds: one resource, or that of each sweep."""
    return "+".join(dict.fromkeys(prediction.binding.values()))


def _prediction_cells(prediction: Prediction) -> list[str]:
    shares = prediction.shares
    return [
        prediction.shape,
        str(prediction.vocabulary),
        str(prediction.rows_in_flight),
        f"{prediction.hit:.0%}",
        _number(prediction.ns_per_element * 1e3, 3),
        _number(prediction.seconds * 1e3, 2),
        _number(prediction.time_over_copy, 2),
        _number(prediction.time_over_copy_no_reuse, 2),
        f"{shares['issue']:.0%}",
        f"{shares['special']:.0%}",
        _binding(prediction),
    ]


PREDICTION_HEADINGS = (
    "shape", "V", "rows", "hit", "ps/elem", "ms", "÷copy", "no hit", "issue", "MUFU", "binds",
)  # fmt: skip
PREDICTION_WIDTHS = (12, 7, 5, 5, 8, 6, 6, 7, 6, 5, 18)
NARROW = ("V", "no hit")  # headings left out where there is no room


def describe_gpu(name: str) -> str:
    """A GPU's figures in a line."""
    gpu = GPUS[name]
    unit = "CUs" if gpu.vendor == "amd" else "SMs"
    return (
        f"{gpu.name} ({gpu.target}): {gpu.processors} {unit}, {gpu.clock_hz / 1e9:.2f} GHz, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s ({gpu.bandwidth_is}), {gpu.cache_bytes >> 20} MB cache"
    )


def prediction_lines(predictions: Iterable[Prediction], width: int = WIDE) -> Iterator[tuple[str, bool]]:
    """Lines of text and whether each is a heading: for each GPU its figures, then a line per shape."""
    shown = [heading not in NARROW or width >= WIDE for heading in PREDICTION_HEADINGS]

    def line(cells: Sequence[str]) -> str:
        first, *rest = compress(zip(cells, PREDICTION_WIDTHS, strict=True), shown)
        return first[0].ljust(first[1]) + "".join(cell.rjust(width) for cell, width in rest)

    yield line(PREDICTION_HEADINGS), True
    for gpu, group in groupby(predictions, key=lambda prediction: prediction.gpu):
        yield describe_gpu(gpu), True
        for prediction in group:
            yield line(_prediction_cells(prediction)), False


def prediction_notes(predictions: Sequence[Prediction]) -> Iterator[str]:
    """What the columns mean."""
    tokens = predictions[0].tokens
    yield (
        f"{tokens} tokens, bf16, entropy included; ÷copy: time over that of one read and one write of the logits at "
        "the same bandwidth. rows: in flight; hit: share of the second sweep's read that the cache serves; no hit: "
        "÷copy if it served none."
    )
    yield (
        "issue, MUFU: time of the instruction slots and of the special functions, of the copy's. binds: the slowest "
        "resource of the statistics and of the gradient sweep. Lanes beyond a row's end are counted."
    )
    if any("softcap" in prediction.variant for prediction in predictions):
        yield "capped: softcap; the variant that was counted has an entropy and a KL term as well."


# ---------------------------------------------------------------------------------------------------------------
# markdown


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Iterator[str]:
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "|".join("---" if index < left else "---:" for index in range(len(headings))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def markdown(records: Sequence[dict[str, Any]], predictions: Sequence[Prediction], covered: str) -> str:
    """Tables for the documentation: the records (of the variants that the model reads, if it read any)."""
    read = {(prediction.target, prediction.variant) for prediction in predictions}
    shown = [record for record in records if not read or (record["target"], record["variant"]) in read]
    flat = [column for group in _columns(wide=True).values() for column in group]
    sweeps = [""] * len(GENERAL) + [role[:4] + " " for role in SWEEPS for _ in _sweep(role)]
    headings = ["kernel/variant"] + [(over + column.heading).strip() for over, column in zip(sweeps, flat, strict=True)]
    rows = [[f"{r['kernel']}/{r['variant']}", *(column.cell(r) for column in flat)] for r in shown]
    parts = ["\n".join(_markdown(headings, rows, left=2)), "\n".join(f"- {note}" for note in (covered, *notes()))]
    if predictions:
        parts += [MODEL_TITLE, prediction_markdown(predictions)]
    return "\n\n".join(parts)


def prediction_markdown(predictions: Sequence[Prediction]) -> str:
    """Every prediction's table and notes, for the documentation."""
    table = [[prediction.gpu, *_prediction_cells(prediction)] for prediction in predictions]
    names = dict.fromkeys(prediction.gpu for prediction in predictions)
    rows = "\n".join(_markdown(["GPU", *PREDICTION_HEADINGS], table, left=2))
    return (
        rows + "\n\n" + "\n".join(f"- {note}" for note in (*map(describe_gpu, names), *prediction_notes(predictions)))
    )


def summary(predictions: Sequence[Prediction]) -> str:
    """Time over copy time of each GPU and vocabulary, for a reader in a hurry."""
    shapes = dict.fromkeys((prediction.shape, prediction.vocabulary) for prediction in predictions)
    found = {(prediction.gpu, prediction.shape): prediction for prediction in predictions}
    headings = ["predicted time ÷ copy", *(f"{shape} ({V})" for shape, V in shapes)]
    rows = [
        [gpu]
        + [
            f"{one.time_over_copy:.2f} ({one.time_over_copy_no_reuse:.2f})"
            if (one := found.get((gpu, shape)))
            else NOTHING
            for shape, _ in shapes
        ]
        for gpu in dict.fromkeys(prediction.gpu for prediction in predictions)
    ]
    note = (
        f"A roofline model's predictions from counted instructions, not measurements: {predictions[0].tokens} tokens, "
        "bf16, loss, entropy and gradient, over one read and one write of the logits at the same bandwidth. In "
        "brackets: if the cache never served the second sweep. capped: with the model's softcap."
    )
    return "\n".join(_markdown(headings, rows)) + "\n\n" + note
