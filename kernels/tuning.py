"""Launch parameters that ``hpo-fused-bench tune`` measured on this machine: read once, never measured here.

The file is JSON in the user's cache directory, one for each GPU model:

    {"schema_version": 1, "hpo_fused": "0.1.0", "triton": "3.7.1", "gpu": "NVIDIA H200",
     "entries": [{"itemsize": 2, "V": 151936, "reread": true, "narrow": false,
                  "threads": 1024, "unroll": 4, "rows_in_flight": 132}]}

A file of another version of this package or of Triton is stale: other machine code was measured. It is ignored, as a
damaged one is, with one warning, and the shipped table (``launch.py``) holds. An entry holds for its V alone.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton

SCHEMA_VERSION = 1
DIRECTORY_VARIABLE = "HPO_FUSED_CACHE_DIR"
# What a launch can be given.
THREADS = (128, 256, 512, 1024)
UNROLLS = (1, 2, 4)


class LaunchParameters(NamedTuple):
    """What can be chosen for a launch: threads of a program, loads that each has outstanding, rows in flight."""

    threads: int
    unroll: int
    rows_in_flight: int


class Launches(NamedTuple):
    """What a set of parameters is for: bytes of an element, elements of a row, and which sort of kernel."""

    itemsize: int
    V: int
    reread: bool
    narrow: bool


def package_version() -> str:
    """The version of hpo_fused, which is being imported when this module is."""
    return str(sys.modules["hpo_fused"].__version__)


def tuning_file(gpu: str) -> Path:
    """Where the parameters for GPUs of this name are: HPO_FUSED_CACHE_DIR, else the user's cache directory."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if not directory:
        directory = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "hpo_fused")
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(os.path.expanduser(directory)) / f"tuning-{name}.json"  # Path's raises where there is no home


def tuning_content(gpu: str, entries: Mapping[Launches, LaunchParameters]) -> dict[str, Any]:
    """A tuning file's content, for JSON."""
    return {
        "schema_version": SCHEMA_VERSION, "hpo_fused": package_version(), "triton": triton.__version__, "gpu": gpu,
        "entries": [{**launches._asdict(), **parameters._asdict()} for launches, parameters in entries.items()],
    }  # fmt: skip


def _integer(entry: Mapping[str, Any], name: str) -> int:
    value = entry[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return value


def _flag(entry: Mapping[str, Any], name: str) -> bool:
    value = entry[name]
    if type(value) is not bool:
        raise ValueError(f"{name}: expected true or false, got {value!r}")
    return value


def _one_of(entry: Mapping[str, Any], name: str, allowed: tuple[int, ...]) -> int:
    value = _integer(entry, name)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value}")
    return value


def parse(content: Any, gpu: str) -> dict[Launches, LaunchParameters]:
    """The entries of a tuning file for ``gpu``.

    Raises:
        ValueError: not such a file, damaged, or of another GPU or version; the message says what.
    """
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError("not a tuning file")
    wanted = tuning_content(gpu, {})
    for name in ("schema_version", "hpo_fused", "triton", "gpu"):
        if content.get(name) != wanted[name]:
            raise ValueError(f"{name} is {content.get(name)!r}, here it is {wanted[name]!r}")
    try:
        return {
            Launches(
                _one_of(entry, "itemsize", (2, 4)), _integer(entry, "V"), _flag(entry, "reread"), _flag(entry, "narrow")
            ): LaunchParameters(
                _one_of(entry, "threads", THREADS), _one_of(entry, "unroll", UNROLLS), _integer(entry, "rows_in_flight")
            )
            for entry in content["entries"]
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"damaged entry: {error!r}") from None


@functools.cache
def _read(path: Path, gpu: str) -> dict[Launches, LaunchParameters]:
    """Once for each file, so that what is wrong with it is told once."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), gpu)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # a JSON or UTF-8 error is a ValueError
        warnings.warn(
            f"hpo_fused: ignoring the launch parameters in {path}: {error}. Run `hpo-fused-bench tune` again, or "
            "delete the file",
            stacklevel=2,
        )
        return {}


def forget_files() -> None:
    """Read them again when they are next needed."""
    _read.cache_clear()


def tuned_launches(gpu: str) -> int:
    """How many entries there are for GPUs of that name."""
    return len(_read(tuning_file(gpu), gpu))


def tuned_parameters(gpu: str, itemsize: int, V: int, reread: bool, narrow: bool) -> LaunchParameters | None:
    """What was measured for these launches on this machine's GPUs of that name; None where nothing was."""
    return _read(tuning_file(gpu), gpu).get(Launches(itemsize, V, reread, narrow))
