"""Builds fastrank._cpu: each kernel file once per instruction set, the rest once. Needs C++17, not torch."""

import platform
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
# FASTRANK_ISA, floats in a vector, compiler flags. `plain` is whatever the target's baseline offers; its vectors are
# sixteen wide, four registers each, so that loops made for AVX-512 are tested on every machine. The order is that of
# linking and must stay baseline first: where objects carry the same inline function of the standard library, the
# linker keeps the first one, which every processor can run.
INSTRUCTION_SETS = [("plain", 16, [])]
if X86:
    INSTRUCTION_SETS += [
        ("avx2", 8, ["-mavx2", "-mfma"]),
        (
            "avx512",
            16,
            [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")] + ["-mfma", "-mprefer-vector-width=512"],
        ),
    ]
# What is no arithmetic is compiled once, for every processor.
COMPILED_ONCE = ["csrc/bindings.cpp", "csrc/wordpiece.cpp"]
KERNELS = sorted(path for path in map(str, Path("csrc").glob("*.cpp")) if path not in COMPILED_ONCE)
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.hpp"))
# -fno-math-errno lets sqrt vectorise; -Wno-psabi: vector arguments never cross a compiled boundary. NaN and infinity
# keep their meaning, hence no -ffast-math.
FLAGS = "-O3 -std=c++17 -fopenmp -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wno-psabi".split()


ParallelCompile(default=0).install()  # as many files at once as there are processors


class BuildKernels(build_ext):
    def build_extension(self, extension):
        platform_macros = [("FASTRANK_X86", "1")] if X86 else []
        for name, lanes, flags in INSTRUCTION_SETS:
            extension.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=f"{self.build_temp}/{name}",
                macros=[("FASTRANK_ISA", name), ("FASTRANK_LANES", str(lanes)), *platform_macros],
                extra_postargs=[*FLAGS, "-fPIC", *flags],
                depends=HEADERS,
            )
        extension.define_macros += platform_macros
        super().build_extension(extension)


setup(
    ext_modules=[
        Pybind11Extension(
            "fastrank._cpu",
            COMPILED_ONCE,
            depends=HEADERS + KERNELS,
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
