"""Write objectives.json: loss and dloss/dlogp of every shaping in 50-digit arithmetic, derivatives by differences.

Independent of the package: the formulas are typed here from the papers, with what a stop-gradient covers held at the
point, and differentiated numerically. Run it by hand (`python tests/make_objectives.py`, needs mpmath); the tests read
the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpmath import diff, exp, inf, log, mp, mpf, tanh

mp.dps = 50
RATIOS = ["-19", "-5", "-2", "-1", "-0.5", "-0.24", "-0.2", "-0.1", "-0.01", "0", "0.01", "0.1", "0.17", "0.2", "0.26"]
RATIOS += ["0.5", "0.5764", "1", "2", "5", "19"]
ADVANTAGES = ["1", "-1", "0.5", "-2"]


def clip(low: str, high: str, delta: Any = inf, dual: Any = inf) -> Callable[..., Any]:
    def s(x: Any, a: Any, *_: Any) -> Any:
        r = exp(x)
        value = min(min(r, delta) * a, min(max(r, 1 - mpf(low)), 1 + mpf(high)) * a)
        return max(value, dual * a) if a < 0 else value

    return s


def log_fidelity(x: Any, a: Any, logp: Any, x0: Any) -> Any:
    c = mpf("1.5")
    frozen = c * tanh(x0 / c)
    zeta = log(1 + exp(frozen)) ** mpf("1.5") + (log(1 + exp(-frozen)) / mpf("0.8")) ** 2
    return exp(c * tanh(x / c) - zeta) * a


def soft_gate(x: Any, a: Any, *_: Any) -> Any:
    tau = mpf(1) if a > 0 else mpf("1.05")
    return 4 / tau / (1 + exp(-tau * (exp(x) - 1))) * a


def truncated_ratio(x: Any, a: Any, logp: Any, x0: Any) -> Any:
    return min(exp(x0), 5) * a * logp


SHAPES: dict[str, Callable[..., Any]] = {
    "grpo": clip("0.2", "0.2"),
    "dapo": clip("0.2", "0.28"),
    "clip_delta_dual": clip("0.2", "0.2", mpf("1.5"), mpf(3)),
    "sapo": soft_gate,
    "cispo": truncated_ratio,
    "mhpo": log_fidelity,
}


def main() -> None:
    rows = []
    for name, s in SHAPES.items():
        for advantage in map(mpf, ADVANTAGES):
            for x0 in map(mpf, RATIOS):

                def loss(logp: Any, s: Any = s, a: Any = advantage, x0: Any = x0) -> Any:
                    return -s(x0 + (logp + 1), a, logp, x0)  # old log-probability -1 - x0, evaluated at logp = -1

                rows.append(
                    {
                        "objective": name,
                        "log_ratio": float(x0),
                        "advantage": float(advantage),
                        "loss": float(loss(mpf(-1))),
                        "dloss_dlogp": float(diff(loss, mpf(-1), h=mpf(10) ** -20)),
                    }
                )
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(__file__).with_name("objectives.json").write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
