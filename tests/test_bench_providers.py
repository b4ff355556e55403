"""Who can be measured: names, classes of other people, the list of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo_fused.bench import providers as of_logits
from hpo_fused.bench.linear import providers as of_heads
from hpo_fused.bench.providers import Unavailable, peers
from hpo_fused.bench.providers.plain import Eager

CPU = torch.device("cpu")
MODULE = """
import torch
from hpo_fused.bench.linear.providers.plain import Eager as LinearEager
from hpo_fused.bench.providers import Provider
from hpo_fused.bench.providers.plain import Eager

class Mine(Eager):
    can_inplace = True

class Head(LinearEager):
    pass

class Needy(Provider):
    def __init__(self, size):
        pass

class Stranger:
    pass

value = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of somebody else on Python's path."""
    (tmp_path / "bench_of_others.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_bench.py").write_text("import there_is_no_such_module", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_class_is_reported_under_what_named_it() -> None:
    one = of_logits.create("bench_of_others:Mine", inplace=True)
    assert isinstance(one, Eager)
    assert (one.name, one.inplace) == ("bench_of_others:Mine", True)
    assert of_logits.create("bench_of_others:Mine").inplace is False
    assert Eager().name == "eager"
    assert of_heads.create("bench_of_others:Head").name == "bench_of_others:Head"


KNOWN = r"expected one of hpo_fused, .*, or module:Class"


@pytest.mark.parametrize("create", [of_logits.create, of_heads.create])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eagre", rf"unknown provider 'eagre'; {KNOWN}$"),
        ("", rf"unknown provider ''; {KNOWN}$"),
        ("a:b:c", rf"unknown provider 'a:b:c'; {KNOWN}$"),
        (":Mine", rf"unknown provider ':Mine'; {KNOWN}$"),
        ("bench_of_others:", rf"unknown provider 'bench_of_others:'; {KNOWN}$"),
        ("./mine.py:Mine", rf"unknown provider './mine.py:Mine'; {KNOWN}$"),
        ("no_such_bench:Mine", rf"{KNOWN} \(no module 'no_such_bench' on Python's path\)$"),
        ("no_such_bench.part:Mine", rf"{KNOWN} \(no module 'no_such_bench' on Python's path\)$"),
        ("bench_of_others:Yours", rf"{KNOWN} \(module 'bench_of_others' has no 'Yours'\)$"),
        ("broken_bench:Mine", r"importing broken_bench failed: ModuleNotFoundError: .*there_is_no_such_module"),
        ("bench_of_others:Stranger", r"expected a subclass of hpo_fused\.bench\..*Provider, got <class"),
        ("bench_of_others:value", r"expected a subclass of hpo_fused\.bench\..*Provider, got 3$"),
    ],
)
def test_a_bad_name_says_what_is_wrong(create: Callable[[str], Any], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name)


def test_a_class_of_the_other_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"subclass of hpo_fused\.bench\.providers\.base\.Provider"):
        of_logits.create("bench_of_others:Head")
    with pytest.raises(ValueError, match=r"subclass of hpo_fused\.bench\.linear\.providers\.base\.LinearProvider"):
        of_heads.create("bench_of_others:Mine")


def test_a_class_that_cannot_be_made_says_why() -> None:
    with pytest.raises(ValueError, match=r"'bench_of_others:Needy': Needy\(\) failed: TypeError: .*size"):
        of_logits.create("bench_of_others:Needy")
    with pytest.raises(ValueError, match=r"LinearProvider\(\) failed: TypeError: .*abstract"):
        of_heads.create("hpo_fused.bench.linear.providers.base:LinearProvider")


def test_defaults_are_the_field() -> None:
    assert set(of_logits.DEFAULT) >= {"hpo_fused", "eager", "compile", "trl:eager", "trl:triton", "liger:triton"}
    assert set(of_heads.DEFAULT) >= {"hpo_fused", "eager", "trl:chunked", "liger:chunked", "cce", "gemms"}
    assert set(of_logits.DEFAULT) <= set(of_logits.PROVIDERS)
    assert set(of_heads.SLOW_ON_CPU) <= set(of_heads.DEFAULT) <= set(of_heads.PROVIDERS)
    assert of_heads.defaults("cuda") == of_heads.DEFAULT
    assert set(of_heads.DEFAULT) - set(of_heads.defaults("cpu")) == {"liger:chunked"}


def listing(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """What the command prints, as operation, provider and the text about it."""
    typer = pytest.importorskip("typer", reason="needs the bench extra")
    testing = pytest.importorskip("typer.testing")
    from hpo_fused.bench.providers_command import providers

    monkeypatch.setenv("COLUMNS", "80")
    app = typer.Typer()
    app.command()(providers)
    done = testing.CliRunner().invoke(app, ["--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    found: dict[str, dict[str, str]] = {}
    operation = name = ""
    for line in done.output.splitlines():
        if heading := re.fullmatch(r"(\w+) on cpu", line.strip()):
            operation = heading[1]
        elif not line.startswith(" ") and line.strip():
            name, _, rest = line.partition(" ")
            found.setdefault(operation, {})[name] = rest
        elif line.strip():
            found[operation][name] += f" {line.strip()}"
    return {key: {who: " ".join(text.split()) for who, text in values.items()} for key, values in found.items()}


def test_the_list_of_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        if distribution == "trl":
            return "99.1"
        raise peers.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(peers.metadata, "version", version)
    found = listing(monkeypatch)
    assert list(found) == ["logits", "linear", "logprobs"]
    assert set(found["logits"]) == set(of_logits.PROVIDERS) - {"liger:logprobs"}
    assert set(found["linear"]) == set(of_heads.PROVIDERS)
    assert {"liger:logprobs", "trl:triton", "hpo_fused"} <= set(found["logprobs"])
    assert not {"liger:triton"} & set(found["logprobs"])
    assert found["logits"]["trl:eager"].startswith("* trl 99.1 TRL >= 1.16 in PyTorch")
    absent = "no: not installed (extra: peers)"
    assert found["logits"]["liger:triton"].startswith(f"* {absent} Liger-Kernel")
    assert "leaves out: entropy, log-probabilities" in found["logits"]["liger:triton"]
    assert found["logits"]["eager"].startswith(f"* torch {torch.__version__} plain PyTorch")
    assert "leaves out" not in found["logits"]["eager"]
    assert found["logits"]["hpo_fused:triton"].startswith("no: needs a GPU")
    assert found["linear"]["cce"].startswith(f"* {absent}")
    assert found["linear"]["liger:chunked"].startswith(absent)  # no asterisk: not by default on a CPU
    assert "some 30 times eager's CPU time" in " ".join(found["logprobs"].values())


@pytest.mark.parametrize("name", of_logits.PROVIDERS)
def test_ours_has_everything_and_others_say_what_is_missing(name: str) -> None:
    one = of_logits.create(name)
    assert one.summary
    if one.ours:
        assert (one.ops(), one.leaves_out) == (("logits", "logprobs"), "")
    elif len(one.ops()) == 1:
        assert one.leaves_out


def test_linear_cross_entropy_needs_a_recent_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(Unavailable, match=rf"needs PyTorch >= 2\.13, this is {re.escape(torch.__version__)}"):
        of_heads.create("linear_cross_entropy").available(CPU)


@pytest.mark.parametrize("columns", [80, 60])
def test_spellings_of_shapes_are_whole(
    invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = invoke("shapes").stdout.splitlines()
    assert max(map(len, lines)) <= columns
    for word in ("custom:V=N[,softcap=C]", "custom:H=N,V=N[,softcap=C]", "qwen2.5-0.5b", "151936"):
        assert any(word in line for line in lines), word
