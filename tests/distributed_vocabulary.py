"""Logits and heads sharded over the vocabulary: every rank's columns against the whole."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import distributed

import hpo_fused as hf

from .equivalence import Case, check
from .test_equivalence import PRESETS


def columns_of(rank: int, world: int, vocabulary: int) -> slice:
    """Uneven shards, the second of which is empty where there are more than two."""
    sizes = [vocabulary // 3, 0, 5, vocabulary - vocabulary // 3 - 5] if world == 4 else [41, vocabulary - 41]
    edges = [0, *itertools.accumulate(sizes)]
    return slice(edges[rank], edges[rank + 1])


def logits(rank: int, world: int) -> None:
    n = 0
    for backend in ("torch", "triton"):
        for name, objective in PRESETS.items():
            for dtype in (torch.float32, torch.bfloat16):
              for options in ({}, {"softcap": 30.0, "temperature": 0.7}):
               for rows in ("random", "peaked", "minus_inf", "flat", "negative"):
                objective2 = dataclasses.replace(objective, entropy_coef=0.01, kl_coef=0.05) if n % 2 else objective
                n += 1
                case = Case(f"{name}-{n}", objective2, dtype, "padded", small_ratios=objective.ratio_level != "token", rows=rows, options=options)
                try:
                    check(case, backend, torch.device("cpu"), columns=columns_of(rank, world, case.vocabulary), vocab_group=distributed.group.WORLD)
                except AssertionError as e:
                    if rank == 0: print(backend, name, dtype, options, rows, str(e)[:150], flush=True)
