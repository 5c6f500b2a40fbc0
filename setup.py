"""Packaging: everything about what is built and what an installation needs.

Tool settings are in ``pyproject.toml``. The metadata is here, in code, because native kernels are
optional: an installation without a compiler must succeed, which only code can decide.

The bounds below are what the code admits; ``requirements.lock`` holds what the tests run on.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

RUNTIME = [
    "torch>=2.11,<2.14",
    "deepspeed>=0.16.9,<0.20",
    "transformers>=5.0,<6",
    "mpi4py>=4.1",
    "numpy>=1.26",
    "pydantic>=2.8",
    "click>=8.1",
    "rich>=13",
    "safetensors>=0.4.3",
    "tokenizers>=0.22",
    "matplotlib>=3.8",
    "psutil>=5.9",
]


def version() -> str:
    """The version as the package itself states it."""
    source = (ROOT / "zo_offload" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found, "zo_offload/__init__.py states no __version__"
    return found[1]


setup(
    name="zo_offload",
    version=version(),
    description="Fine-tune language models far larger than the accelerator, with forward passes "
    "only, from one DeepSpeed configuration file.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["zo_offload", "zo_offload.*"]),
    install_requires=RUNTIME,
    # accelerate is what transformers.Trainer needs to drive a DeepSpeed engine.
    extras_require={"trainer": ["accelerate>=1.10"], "tasks": ["datasets>=3"]},
    entry_points={"console_scripts": ["zo-offload = zo_offload.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
