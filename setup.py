"""Packaging of hpo-fused: where each folder of the checkout is installed, and what it needs.

``kernels/`` and ``bench/`` lie at the top of the checkout but are installed *inside* the package, as
``hpo_fused.kernels`` and ``hpo_fused.bench``. Installed under their own names they would shadow modules of
other people: transformers and TRL, whose users are ours, import Hugging Face's distribution ``kernels``.
"""

from __future__ import annotations

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# A mapping for the two folders that move; everything below each of them is found, not listed.
MOVED = {"hpo_fused.kernels": "kernels", "hpo_fused.bench": "bench"}


def packages() -> list[str]:
    """Every importable package under the name that it is installed as."""
    found = ["hpo_fused", *(f"hpo_fused.{name}" for name in find_packages(str(ROOT / "hpo_fused")))]
    for package, folder in MOVED.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(str(ROOT / folder)))]
    return found


def version() -> str:
    """``hpo_fused.__version__``, read without importing it: a build environment has no torch."""
    source = (ROOT / "hpo_fused" / "__init__.py").read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == "__version__" for target in targets):
                return str(ast.literal_eval(statement.value))
    raise RuntimeError("hpo_fused/__init__.py assigns no literal to __version__")


# Triton is an extra, not a requirement. PyTorch's CUDA wheels pin the one Triton that their compiler works
# with, so those users have it already. ROCm and XPU wheels bring the same module in a distribution of another
# name (such as pytorch-triton-rocm), which a requirement on "triton" does not see: pip would lay the CUDA
# build over it and break both. CPU wheels bring none and the torch backend needs none; this extra adds it
# there, to run the kernels under Triton's interpreter. Triton publishes wheels for Linux only.
TRITON = ['triton>=3.4; platform_system == "Linux"']

# tests/test_packaging.py builds this project with the environment's own pip and setuptools: virtual
# environments of Python 3.12 and later start without setuptools, older ones with versions too old for it.
TEST = ["pytest>=8.2", "pytest-xdist>=3.6", "hypothesis>=6.100", "numpy>=1.26", "pip>=23.1", "setuptools>=77"]

BENCH = ["matplotlib>=3.8", "rich>=13.7", "typer>=0.12"]

# What the benchmark compares with, where it is installed; the first two run without a GPU, so that tests hold the
# adapters against them. Liger and cut-cross-entropy ask for the distribution named triton: on ROCm install them with
# --no-deps, or it is laid over ROCm's own.
TESTED_PEERS = ['trl[peft]>=1.16; python_version >= "3.11"', 'liger-kernel>=0.8; platform_system == "Linux"']
PEERS = [*TESTED_PEERS, 'cut-cross-entropy>=25.1; platform_system == "Linux"']

# The trainer that hpo_fused.integrations.trl subclasses, from the oldest version that it was tested with.
TRL = ['trl>=1.15,<2; python_version >= "3.11"']

# The trainer whose plug-in hpo_fused.integrations.verl is; the suite has it apart, tests/requirements-verl.txt.
VERL = ["verl>=0.9,<0.10"]

# Checkers that judge the source are held to one release line: a new release must not fail an old commit.
DEV = [*TEST, *BENCH, "pytest-benchmark>=5.1", "ruff~=0.17.5", "mypy~=2.4.1", "pre-commit>=4.0", "build>=1.2"]

# Everything that the suite has tests for. Apart from DEV because of what PEERS says of ROCm.
CI = [*DEV, *TESTED_PEERS]


setup(
    name="hpo-fused",
    version=version(),
    description="Fused Triton kernels for GRPO-style reinforcement-learning losses of language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["GRPO", "DAPO", "MHPO", "RLHF", "Triton", "PyTorch", "fused kernels"],
    package_dir={"hpo_fused": "hpo_fused", **MOVED},
    packages=packages(),
    package_data={"": ["py.typed"]},
    include_package_data=False,
    python_requires=">=3.10",
    install_requires=["torch>=2.8"],
    extras_require={
        "triton": TRITON,
        "trl": TRL,
        "verl": VERL,
        "test": TEST,
        "bench": BENCH,
        "peers": PEERS,
        "dev": DEV,
        "ci": CI,
    },
    entry_points={
        "console_scripts": ["hpo-fused-bench = hpo_fused.bench.cli:main"],
        "verl.plugins": ["hpo_fused = hpo_fused.integrations.verl"],
    },
    zip_safe=False,
)
