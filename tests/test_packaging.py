"""hpo_fused as it is installed, not as it lies in the checkout.

``kernels/`` and ``bench/`` change their names on the way into a wheel and into an editable installation, and
the name ``kernels`` belongs to somebody else. A mistake in that mapping shows only where the checkout is out
of reach, so everything here runs in subprocesses against what pip made of a copy of the source tree.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# Folder of the checkout -> folder of the wheel.
INSTALLED_AS = {"kernels": "hpo_fused/kernels", "bench": "hpo_fused/bench", "hpo_fused": "hpo_fused"}

# No index: nothing here may depend on what a registry serves, or on there being one.
PIP = ("-m", "pip", "--isolated", "--disable-pip-version-check")
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")


def run(*command: str | Path, cwd: Path, pythonpath: Path | None = None) -> str:
    """Standard output of a command that must succeed, free of this pytest run's own environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "TRITON_"))}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def answer(output: str) -> Any:
    """The JSON that a probe printed last; anything above it is some library's chatter."""
    return json.loads(output.strip().splitlines()[-1])


def copy_checkout(target: Path) -> Path:
    """Copy the sources alone: stale build products in the checkout must not decide what a wheel holds."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.whl")
    return Path(shutil.copytree(CHECKOUT, target, ignore=ignored))


class Editable(NamedTuple):
    """A virtual environment with an editable installation, and the copy of the checkout that it points at."""

    python: Path
    checkout: Path


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pristine copy of the checkout."""
    return copy_checkout(tmp_path_factory.mktemp("source") / "checkout")


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from the copy."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = shutil.copytree(source, folder / "checkout")
    run(sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", folder, tree, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed") / "site"
    run(sys.executable, *PIP, "install", *OFFLINE, "--target", target, wheel, cwd=target.parent)
    return target


@pytest.fixture(scope="session")
def metadata(installed: Path) -> Distribution:
    """The installed wheel's metadata."""
    (folder,) = installed.glob("*.dist-info")
    return Distribution.at(folder)


@pytest.fixture(scope="session")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Editable:
    """``pip install -e`` of a copy, in an environment that shares this one's packages but those under test.

    The packages are linked one by one: with ``--system-site-packages`` the environment would see the base
    interpreter's packages and not those of the virtual environment that runs these tests, and with this one's
    whole ``site-packages`` it would see an hpo_fused installed here.
    """
    folder = tmp_path_factory.mktemp("editable")
    tree = shutil.copytree(source, folder / "checkout")
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for place in map(Path, sys.path):
        if place.name in {"site-packages", "dist-packages"} and place.is_dir():
            for entry in place.iterdir():
                hidden = "hpo_fused" in entry.name or entry.name in INSTALLED_AS or entry.suffix == ".pth"
                if not hidden and not (borrowed / entry.name).is_symlink():
                    (borrowed / entry.name).symlink_to(entry)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    run(python, *PIP, "install", *OFFLINE, "--ignore-installed", "--editable", tree, cwd=folder)
    return Editable(python, tree)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with another project's distribution ``kernels``, as Hugging Face's is to our users."""
    site = tmp_path_factory.mktemp("foreign")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text('OWNER = "somebody else"\n', encoding="utf-8")
    information = site / "kernels-9.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n", encoding="utf-8")
    return site


def isolated(code: str, site: Path, cwd: Path) -> Any:
    """What ``code`` prints, run where ``site`` comes first and the checkout is out of reach.

    An editable hpo_fused in the running environment has a finder that would supply what the wheel lacks.
    """
    prelude = f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        sys.meta_path[:] = [f for f in sys.meta_path if "hpo_fused" not in getattr(f, "__module__", "")]
    """
    return answer(run(sys.executable, "-I", "-c", textwrap.dedent(prelude) + textwrap.dedent(code), cwd=cwd))


@pytest.fixture(scope="session")
def probed(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process finds that imports the wheel: one for several tests, since importing PyTorch takes seconds."""
    result: dict[str, Any] = isolated(
        """
        import importlib, json
        from importlib.machinery import PathFinder
        from importlib.metadata import distributions
        from importlib.util import find_spec

        import hpo_fused
        import hpo_fused.integrations

        trainers = [name for name in ("transformers", "trl", "verl") if name in sys.modules]
        (ours,) = distributions(name="hpo-fused", path=sys.path[:1])
        commands = ours.entry_points.select(group="console_scripts")
        packages = ["hpo_fused", "hpo_fused.bench", "hpo_fused.kernels"]
        if find_spec("triton") is None:  # kernels are Triton's language: located here, imported where it is
            origins = {name: find_spec(name).origin for name in packages}
        else:
            origins = {name: importlib.import_module(name).__file__ for name in packages}
        found = {
            "trainers": trainers,
            "commands": {point.name: callable(point.load()) for point in commands},
            "origins": origins,
            "leaked": [name for name in ("bench", "kernels") if PathFinder.find_spec(name, sys.path[:1])],
        }
        sys.path[:] = [place for place in sys.path if "-packages" not in place]
        try:
            import hpo_fused.integrations.trl
        except ImportError as error:
            print(json.dumps({**found, "error": str(error)}))
        """,
        installed,
        tmp_path_factory.mktemp("probe"),
    )
    return result


def wheel_name(path: Path) -> str | None:
    """Where a file of the checkout, named relative to it, belongs in the wheel; None: nowhere."""
    top, *rest = path.parts
    return "/".join([INSTALLED_AS[top], *rest]) if top in INSTALLED_AS else None


def test_wheel_holds_every_module_and_nothing_else(wheel: Path, source: Path) -> None:
    """A subpackage without ``__init__.py``, or a folder that the mapping misses, is left out silently.

    A second top-level name (``kernels``, ``bench``, ``tests``) would lie in everybody's site-packages; without py.typed
    a type checker ignores every annotation of an installed package (PEP 561).
    """
    relative = [path.relative_to(source) for path in source.rglob("*.py")]
    expected = {name for path in relative if (name := wheel_name(path)) is not None}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"{folder}/__init__.py" for folder in INSTALLED_AS.values()} <= expected
    assert {name for name in names if name.endswith(".py")} == expected
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hpo_fused"}
    assert {f"{folder}/py.typed" for folder in INSTALLED_AS.values()} <= names


def test_metadata(metadata: Distribution, source: Path) -> None:
    """Version, licence, command and requirements as a user's pip sees them."""
    tree = ast.parse((source / "hpo_fused" / "__init__.py").read_text(encoding="utf-8"))
    (version,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    assert (metadata.metadata["Name"], metadata.version) == ("hpo-fused", version)
    assert metadata.metadata["License-Expression"] == "Apache-2.0"
    assert metadata.read_text("licenses/LICENSE"), "the wheel carries no licence text"
    (command,) = (point for point in metadata.entry_points if point.group == "console_scripts")
    assert (command.name, command.value) == ("hpo-fused-bench", "hpo_fused.bench.cli:main")
    (plugin,) = (point for point in metadata.entry_points if point.group == "verl.plugins")
    assert (plugin.name, plugin.value) == ("hpo_fused", "hpo_fused.integrations.verl")
    assert (CHECKOUT / plugin.value.replace(".", "/")).is_dir()


def test_only_pytorch_is_required(metadata: Distribution) -> None:
    """A requirement on ``triton`` would lay the CUDA build over the one that a ROCm PyTorch came with."""
    required = [line for line in metadata.requires or () if "extra ==" not in line]
    assert [line.partition(">")[0] for line in required] == ["torch"]
    extras = metadata.metadata.get_all("Provides-Extra") or []
    assert {"triton", "trl", "verl", "test", "bench", "dev"} <= set(extras)


def test_command_loads(probed: dict[str, Any]) -> None:
    """An entry point that names a missing module or function is found out by the first user who runs it."""
    assert probed["commands"] == {"hpo-fused-bench": True}


def test_wheel_imports_without_the_checkout(probed: dict[str, Any], installed: Path) -> None:
    """All three packages come from the wheel; neither folder's own name is importable from it."""
    assert probed["origins"] == {
        name: str(installed.joinpath(*name.split("."), "__init__.py"))
        for name in ("hpo_fused", "hpo_fused.bench", "hpo_fused.kernels")
    }
    assert probed["leaked"] == []


def test_no_trainer_is_imported_unless_its_integration_is(probed: dict[str, Any]) -> None:
    """TRL and transformers take seconds to import; where they are missing, the integration says what to install."""
    message = "hpo_fused.integrations.trl: expected trl >= 1.15, < 2.0, found none; pip install 'hpo-fused[trl]'"
    assert probed["trainers"] == []
    assert probed["error"] == message


def test_loss_runs_where_triton_cannot_be_imported(installed: Path, tmp_path: Path) -> None:
    """CPU wheels of PyTorch bring no Triton, macOS and Windows have none: the torch backend needs none."""
    result = isolated(
        """
        import json
        import os

        os.environ["TRITON_INTERPRET"] = "1"  # where Triton is, it would serve CPU tensors

        class WithoutTriton:
            # Answers "not found", as an environment without it does, to `import` and to `find_spec` alike.
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                hidden = name.partition(".")[0] == "triton"
                return None if hidden else self.finder.find_spec(name, path, target)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = map(WithoutTriton, sys.meta_path)

        import torch
        import hpo_fused as hf

        def loss(backend):
            torch.manual_seed(0)
            logits = torch.randn(1, 3, 11, requires_grad=True)
            tokens, advantages = torch.randint(0, 11, (1, 3)), torch.tensor([1.0])
            out = hf.policy_loss(logits, tokens, advantages, objective="grpo", backend=backend)
            out.loss.backward()
            return logits.grad

        gradient = loss("auto")
        try:
            loss("triton")
        except (ValueError, RuntimeError) as error:
            refusal = str(error)
        else:
            refusal = None
        print(json.dumps({
            "finite": bool(gradient.isfinite().all()),
            "rows": gradient.abs().sum(-1).gt(0).tolist(),
            "refusal": refusal,
            "triton": "triton" in sys.modules,
            "from": hf.__file__,
        }))
        """,
        installed,
        tmp_path,
    )
    assert result["from"] == str(installed / "hpo_fused" / "__init__.py")
    assert result["finite"]
    assert result["rows"] == [[True, True, True]]
    assert not result["triton"], "the probe did not hide Triton"
    assert result["refusal"] is not None, 'backend="triton" was accepted without Triton'
    assert "triton" in result["refusal"].lower()


def test_editable_install_exposes_kernels_only_inside_hpo_fused(editable: Editable, tmp_path: Path) -> None:
    """A developer's environment has the same names as a user's."""
    code = """
        import json
        from importlib.util import find_spec

        inside = {name: find_spec(f"hpo_fused.{name}").origin for name in ("kernels", "bench")}
        print(json.dumps({"inside": inside, "outside": [n for n in ("kernels", "bench") if find_spec(n)]}))
    """
    result = answer(run(editable.python, "-c", textwrap.dedent(code), cwd=tmp_path))
    inside = {name: str(editable.checkout / name / "__init__.py") for name in ("kernels", "bench")}
    assert result == {"inside": inside, "outside": []}


PROBE = """
    import json
    import sys

    import hpo_fused.kernels
    import kernels

    print(json.dumps([hpo_fused.kernels.__file__, kernels.__file__, getattr(kernels, "OWNER", None)]))
"""


def test_foreign_kernels_wins_in_a_command_run_from_the_checkout(
    editable: Editable, foreign: Path, tmp_path: Path
) -> None:
    """As ``trl`` or ``hpo-fused-bench`` is run by someone who stands in the checkout."""
    script = tmp_path / "bin" / "command"
    script.parent.mkdir()
    script.write_text(textwrap.dedent(PROBE), encoding="utf-8")
    ours, theirs, owner = answer(run(editable.python, script, cwd=editable.checkout, pythonpath=foreign))
    assert ours == str(editable.checkout / "kernels" / "__init__.py")
    assert theirs == str(foreign / "kernels" / "__init__.py")
    assert owner == "somebody else"


def test_foreign_kernels_wins_under_pytest(editable: Editable, foreign: Path, source: Path, tmp_path: Path) -> None:
    """pytest's default import mode puts a ``conftest.py``'s folder, here the checkout root, on sys.path."""
    tree = shutil.copytree(source, tmp_path / "checkout")
    (tree / "conftest.py").touch()
    (tree / "tests" / "test_probe.py").write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path

            def test_probe():
                import kernels
                import hpo_fused.kernels

                root = Path({str(tree)!r})
                assert kernels.OWNER == "somebody else"
                assert Path(hpo_fused.kernels.__file__).parent.name == "kernels"
                assert root not in [Path(entry or ".").resolve() for entry in sys.path]
            """
        ),
        encoding="utf-8",
    )
    script = tmp_path / "bin" / "pytest"
    script.parent.mkdir()
    script.write_text("import sys\nfrom pytest import console_main\nsys.exit(console_main())\n", encoding="utf-8")
    output = run(editable.python, script, "tests/test_probe.py", cwd=tree, pythonpath=foreign)
    assert "1 passed" in output
