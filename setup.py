"""Packaging: everything about what is built and what an installation needs.

Tool settings are in ``pyproject.toml``. The metadata is here, in code, because native kernels are
optional: an installation without a compiler must succeed, which only code can decide.

The bounds below are what the code admits; ``requirements.lock`` holds what the tests run on.
"""

import os
import platform
import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("zo_offload", "ops", "csrc")

RUNTIME = [
    "torch>=2.11,<2.14",
    "deepspeed>=0.16.9,<0.20",
    "transformers>=5.0,<6",
    "mpi4py>=4.1",
    "numpy>=1.26",
    "greenlet>=3.1",
    "pydantic>=2.8",
    "click>=8.1",
    "rich>=13",
    "safetensors>=0.4.3",
    "tokenizers>=0.22",
    "matplotlib>=3.8",
    "jinja2>=3.1",
    "psutil>=5.9",
]

# Every instruction set of the machine at hand is built, and one chosen when the kernels are loaded.
X86_64 = {
    "AVX2": ["-mavx2"],
    "AVX512": [
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
        "-mprefer-vector-width=512",
    ],
}
ISAS = {"x86_64": X86_64, "AMD64": X86_64, "aarch64": {"NEON": []}, "arm64": {"NEON": []}}
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",  # the bit contract: no multiply is fused with an add
    "-fno-math-errno",
    "-fno-trapping-math",  # a choice between two sums is made without a branch
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # g++ 12 sees uninitialized variables in its own AVX-512 header
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",  # which clang does not know
]


class BuildKernels(build_ext):
    """Compiles one source once for each instruction set, and links a library without Python in it.

    The extension is optional: without a compiler the installation goes on, and torch serves.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compile and link."""
        if "CXX" not in os.environ and not shutil.which("g++") and shutil.which("clang++"):
            kinds = ("compiler", "compiler_so", "compiler_cxx", "compiler_so_cxx")
            self.compiler.set_executables(
                **dict.fromkeys(kinds, "clang++ -fPIC"),
                **dict.fromkeys(("linker_so", "linker_so_cxx"), "clang++ -shared"),
            )
        isas = ISAS.get(platform.machine(), {})
        kernels, dispatch = (str(CSRC / name) for name in ("kernels.cpp", "dispatch.cpp"))

        def compiled(source: str, name: str, flags: list[str]) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, name),
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )

        objects = compiled(dispatch, "dispatch", [f"-DZO_WITH_{isa}" for isa in isas])
        for isa, flags in {"SCALAR": [], **isas}.items():
            objects += compiled(kernels, isa.lower(), [*flags, f"-DZO_BUILD_{isa}"])
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread"],
            target_lang="c++",
        )

    def get_ext_filename(self, fullname: str) -> str:
        """Of a plain library: it serves any Python."""
        return os.path.join(*fullname.split(".")) + ".so"


KERNELS = Extension(
    "zo_offload.ops._kernels",
    sources=[str(CSRC / name) for name in ("dispatch.cpp", "kernels.cpp")],
    depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
    language="c++",
    optional=True,
)


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
    package_data={"zo_offload": ["py.typed"], "zo_offload.report": ["page.html"]},
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildKernels},
    install_requires=RUNTIME,
    # accelerate is what transformers.Trainer needs to drive a DeepSpeed engine.
    extras_require={
        "trainer": ["accelerate>=1.10"],
        "tasks": ["datasets>=3"],
        "peft": ["peft>=0.18"],
        "trl": ["accelerate>=1.10", "trl>=1.16,<2"],
    },
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
