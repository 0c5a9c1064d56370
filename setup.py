"""Builds fastrank._cpu: each kernel file once per instruction set, the rest once. Needs C++17, not torch."""

import platform
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

X86 = platform.machine().lower() in ("x86_64", "amd64")
# What is no arithmetic is compiled once, for every processor.
COMPILED_ONCE = ["csrc/bindings.cpp", "csrc/pairs.cpp", "csrc/wordpiece.cpp"]
IN_TILES = ["csrc/amx_encoder.cpp", "csrc/amx_linear.cpp"]
KERNELS = sorted(path for path in map(str, Path("csrc").glob("*.cpp")) if path not in COMPILED_ONCE + IN_TILES)
# FASTRANK_ISA, floats in a vector, compiler flags, files. `plain` is whatever the target's baseline offers; its vectors
# are sixteen wide, four registers each, so that loops made for AVX-512 are tested on every machine. The order is that
# of linking and must stay baseline first: where objects carry the same inline function of the standard library, the
# linker keeps the first one, which every processor can run.
INSTRUCTION_SETS = [("plain", 16, [], KERNELS)]
AVX512 = [
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")),
    "-mfma",
    "-mprefer-vector-width=512",
]
if X86:
    INSTRUCTION_SETS += [("avx2", 8, ["-mavx2", "-mfma"], KERNELS), ("avx512", 16, AVX512, KERNELS)]
# Takes linear.cpp's place in avx512 where the processor has this, too: not every one with AVX-512 has.
AVX512_BF16 = ("avx512_bf16", 16, [*AVX512, "-mavx512bf16"], ["csrc/linear.cpp"])
# Products and whole layers in matrix units, beside avx512's kernels for everything else.
AMX = ("amx", 16, [*AVX512_BF16[2], "-mamx-tile", "-mamx-bf16"], IN_TILES)
# What the compiler, and the assembler behind it, must know for either.
PROBES = {
    "avx512_bf16": """#include <immintrin.h>
__m512 probe(__m512 x, __m512bh y) { return __builtin_cpu_supports("avx512bf16") ? _mm512_dpbf16_ps(x, y, y) : x; }
""",
    "amx": """#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
long permission = SYS_arch_prctl;
void probe(float* sums) { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); _tile_stored(0, sums, 64); }
""",
}
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.hpp"))
# -fno-math-errno lets sqrt vectorise; -Wno-psabi: vector arguments never cross a compiled boundary. NaN and infinity
# keep their meaning, hence no -ffast-math.
FLAGS = "-O3 -std=c++17 -fopenmp -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wno-psabi".split()


ParallelCompile(default=0).install()  # as many files at once as there are processors


class BuildKernels(build_ext):
    def build_extension(self, extension):
        platform_macros = [("FASTRANK_X86", "1")] if X86 else []
        instruction_sets = list(INSTRUCTION_SETS)
        for more in (AVX512_BF16, AMX) if X86 else ():
            if not self.compiles(PROBES[more[0]], more[2]):
                break
            instruction_sets.append(more)
            extension.define_macros += [(f"FASTRANK_{more[0].upper()}", "1")]
        for name, lanes, flags, files in instruction_sets:
            extension.extra_objects += self.compiler.compile(
                files,
                output_dir=f"{self.build_temp}/{name}",
                macros=[("FASTRANK_ISA", name), ("FASTRANK_LANES", str(lanes)), *platform_macros],
                extra_postargs=[*FLAGS, "-fPIC", *flags],
                depends=HEADERS,
            )
        extension.define_macros += platform_macros
        super().build_extension(extension)

    def compiles(self, source, flags):
        path = Path(self.build_temp, "probe.cpp")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        try:
            self.compiler.compile([str(path)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError:
            return False
        return True


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
