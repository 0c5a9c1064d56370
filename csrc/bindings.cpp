// The only file that knows Python: checks nothing but dtype and layout (kernels/<op>/cpu.py checks shapes), releases the GIL,
// calls the table of the chosen instruction set.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace py = pybind11;

namespace {

// Contiguous and of exactly this type, or a TypeError: a silent conversion would write into a copy.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::vector<const fastrank::Kernels*> supported() {  // the fastest first
  std::vector<const fastrank::Kernels*> tables;
#ifdef FASTRANK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    tables.push_back(&fastrank::avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&fastrank::avx2::kernels);
#endif
  tables.push_back(&fastrank::plain::kernels);
  return tables;
}

const fastrank::Kernels& kernels() {
  static const fastrank::Kernels* const chosen = [] {
    const auto tables = supported();
    const char* wanted = std::getenv("FASTRANK_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return tables.front();
    std::string names;
    for (const auto* table : tables) {
      if (std::string(wanted) == table->isa) return table;
      names += (names.empty() ? "" : ", ") + std::string(table->isa);
    }
    throw std::runtime_error("FASTRANK_CPU_ISA=" + std::string(wanted) + " cannot run on this processor, which offers " + names +
                             ".");
  }();
  return *chosen;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of fastrank; use them through fastrank.ops.";
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use: plain, avx2 or avx512.");
  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (const auto* table : supported()) names.emplace_back(table->isa);
        return names;
      },
      "Every instruction set that this build and this processor offer, the fastest first.");
}
