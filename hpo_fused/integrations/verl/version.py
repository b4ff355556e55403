"""The versions of verl whose interfaces the plug-in knows."""

from __future__ import annotations

import re
import warnings

TESTED = "0.9"


def check_version(version: str) -> None:
    """ImportError for a verl that counts no totals of the optimiser batch, any before 0.9; a warning of a newer one."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < (0, 9):
        raise ImportError(f"verl: expected version {TESTED} or later, got {version}")
    if numbers > tuple(map(int, TESTED.split("."))):
        warnings.warn(
            f"verl: expected version {TESTED}, which the plug-in was tested with, got {version}", stacklevel=2
        )
