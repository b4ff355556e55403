"""Write objectives.json: loss and dloss/dlogp of every shaping and KL kind to 50 digits, derivatives by differences.

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
REF_RATIOS = ["-19", "-5", "-1", "-0.1", "-0.01", "0", "0.01", "0.1", "0.5", "1", "5", "19"]


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


def truncated_ratio_zero(x: Any, a: Any, logp: Any, x0: Any) -> Any:
    r = exp(x0)
    return r * a * logp if mpf("0.6") <= r <= 2 else mpf(0)


def truncated_ratio_signs(x: Any, a: Any, logp: Any, x0: Any) -> Any:
    low, high = (mpf("0.5"), mpf(3)) if a > 0 else (mpf("0.05"), mpf("0.9"))
    return min(max(exp(x0), low), high) * a * logp


def gamma_gate(x: Any, a: Any, logp: Any, x0: Any) -> Any:
    r, k, rate = exp(x0), *((2, 3) if a > 0 else (3, 2))
    return r**k * exp(rate - rate * r) * a * logp


def geometric_mean(x: Any, a: Any, *_: Any) -> Any:
    sign = 1 if a > 0 else -1
    return exp(sign * min(sign * x, sign * min(max(x, mpf("-0.4")), mpf("0.4")))) * a


def dro(x: Any, a: Any, logp: Any, _: Any) -> Any:
    return a * logp - mpf("0.3") / 2 * x**2


def k3(d: Any) -> Any:
    return exp(d) - d - 1


# From d = log p_ref - log p, its value at the point, and the log-ratio to the old policy.
KL: dict[str, Callable[..., Any]] = {
    "k1": lambda d, *_: -d,
    "k2": lambda d, *_: d**2 / 2,
    "k3": lambda d, *_: k3(d),
    "k3+": lambda d, d0, _: k3(d0) + (d**2 - d0**2) / 2,
    "k3_ratio": lambda d, _, x: exp(x) * k3(d),
}
SHAPES: dict[str, Callable[..., Any]] = {
    "grpo": clip("0.2", "0.2"),
    "dapo": clip("0.2", "0.28"),
    "clip_delta_dual": clip("0.2", "0.2", mpf("1.5"), mpf(3)),
    "sapo": soft_gate,
    "cispo": truncated_ratio,
    "mhpo": log_fidelity,
    "truncated_ratio_zero": truncated_ratio_zero,
    "truncated_ratio_signs": truncated_ratio_signs,
    "vespo": gamma_gate,
    "gmpo": geometric_mean,
    "dro": dro,
}


def main() -> None:
    rows = []
    for name, s in SHAPES.items():
        for advantage in map(mpf, [*ADVANTAGES, "0"] if name == "dro" else ADVANTAGES):
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
    penalties = []
    for name, estimate in KL.items():
        for d0 in map(mpf, REF_RATIOS):
            for x0 in map(mpf, ["-2", "-0.3", "0", "0.7", "1.5"] if name == "k3_ratio" else ["0.7"]):

                def kl(rise: Any, estimate: Any = estimate, d0: Any = d0, x0: Any = x0) -> Any:
                    return estimate(d0 - rise, d0, x0 + rise)  # of log p

                values = {"kl": name, "log_ratio_to_reference": d0, "log_ratio": x0, "value": kl(mpf(0))}
                values["slope"] = diff(kl, mpf(0), h=mpf(10) ** -20)
                penalties.append({key: v if key == "kl" else float(v) for key, v in values.items()})
    tables = {"rows": rows, "penalties": penalties}
    lines = (f'"{name}": [\n' + ",\n".join(map(json.dumps, table)) + "\n]" for name, table in tables.items())
    Path(__file__).with_name("objectives.json").write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
