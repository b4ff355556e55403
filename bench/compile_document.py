"""The compile report as one JSON document: what was compiled, on what, what it breaks, what the model predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import SHAPES
from .compile_limits import broken_limits
from .compile_plan import CAPPED, DEFAULT, ITEMSIZE, Variant, coverage, plan
from .compile_report import Report
from .environment import environment
from .gpus import GPUS, Gpu
from .roofline import Prediction, predict

SCHEMA_VERSION = 2
TOKENS = 8192
MODEL = "prediction of bench/roofline.py from counted instructions; nothing was timed"


@dataclass
class CompileDocument:
    """What ``compile --json`` writes.

    Attributes:
        environment: of the compilation, the assemblers' versions included.
        covered: what was compiled, in a line.
        records: a ``CompiledKernel`` as a dict each.
        unavailable: target to reason, where nothing can be compiled here.
        broken: a line for each limit that does not hold, and each compilation that failed.
        predictions: of the named GPUs.
    """

    environment: dict[str, Any]
    covered: str
    records: list[dict[str, Any]]
    unavailable: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; GPUs' figures beside the predictions that were made from them."""
        named = dict.fromkeys(prediction.gpu for prediction in self.predictions)
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "compile",
            **dataclasses.asdict(self),
            "model": MODEL,
            "gpus": [dataclasses.asdict(GPUS[name]) for name in named],
        }


def _rows() -> Iterable[tuple[str, int, Variant]]:
    """Vocabularies and what runs on them; one whose model caps its logits twice, for its successors do not."""
    for shape in SHAPES.values():
        yield shape.name, shape.vocabulary, DEFAULT
        if shape.softcap is not None:
            yield f"{shape.name} capped", shape.vocabulary, CAPPED


def predictions(records: Iterable[dict[str, Any]], gpus: Sequence[Gpu]) -> list[Prediction]:
    """For each of ``gpus`` whose target's counts are among ``records``, each vocabulary at ``TOKENS`` tokens."""
    counted = {(record["target"], record["kernel"], record["variant"]): record for record in records}
    wanted = [
        (gpu, name, V, variant, record)
        for gpu in gpus
        for name, V, variant in _rows()
        if (record := counted.get((gpu.target, variant.kernel, variant.name))) is not None
    ]
    if not wanted:
        return []
    from .compile_variant import launch_of  # needs Triton, which is there where something was compiled

    return [
        predict(
            gpu, record, launch_of(variant, gpu, V),
            shape=name, vocabulary=V, itemsize=ITEMSIZE[variant.dtype], tokens=TOKENS,
        )
        for gpu, name, V, variant, record in wanted
    ]  # fmt: skip


def document(
    report: Report,
    targets: Sequence[str],
    only: str = "",
    every: bool = False,
    gpus: Sequence[Gpu] = (),
) -> CompileDocument:
    """Of ``report`` on ``plan(targets, only, every)``."""
    jobs = [job for job in plan(targets, only, every) if job.target not in report.unavailable]
    return CompileDocument(
        environment={**environment(torch.device("cpu")), "tools": report.tools},
        covered=coverage(jobs) if jobs else "Covered: nothing.",
        records=report.records,
        unavailable=report.unavailable,
        broken=report.failures + broken_limits(report.records),
        predictions=predictions(report.records, gpus),
    )
