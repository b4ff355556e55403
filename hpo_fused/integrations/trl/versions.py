"""Which TRL this integration was read and tested against."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

OLDEST, NEWEST_TESTED, TOO_NEW = (1, 15), (1, 16), (2, 0)


def check_trl() -> str | None:
    """What to warn of in the TRL that is installed, if anything.

    Raises:
        ImportError: none, or a version whose GRPOTrainer is another one.
    """
    expected = f"trl >= {_text(OLDEST)}, < {_text(TOO_NEW)}"
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            f"hpo_fused.integrations.trl: expected {expected}, found none; pip install 'hpo-fused[trl]'"
        ) from None
    release = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not OLDEST <= release < TOO_NEW:
        raise ImportError(f"hpo_fused.integrations.trl: expected {expected}, found trl {found}")
    if release <= NEWEST_TESTED:
        return None
    return f"trl {found} is newer than {_text(NEWEST_TESTED)}, the newest that hpo_fused was tested with"


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
