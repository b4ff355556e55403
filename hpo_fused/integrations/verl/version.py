"""The versions of verl whose interfaces the plug-in knows."""

from __future__ import annotations

import re

TESTED = "0.9"


def check_version(version: str) -> None:
    """ImportError for a verl that counts no totals of the optimiser batch, which is any before 0.9."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < (0, 9):
        raise ImportError(f"verl: expected version {TESTED} or later, got {version}")
