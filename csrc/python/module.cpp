// negmine._C, the module that does not need torch: how it was built, what the processor supports, and mine_hardest for
// NumPy arrays. No torch header may be included here, because torch brings its own copy of pybind11.
#include <pybind11/pybind11.h>

#include "csrc/python/mine_hardest.h"
#include "kernels/cpu/dispatch.h"

namespace py = pybind11;

namespace {

// The macros come from build_tools/extensions.py.
py::dict build_info() {
  py::dict info;
  const std::string cuda_version = NEGMINE_CUDA_VERSION;
  info["cuda_version"] = cuda_version.empty() ? py::object(py::none()) : py::object(py::str(cuda_version));
  info["cuda_arches"] = py::tuple(py::str(NEGMINE_CUDA_ARCHES).attr("split")(";"));
  if (cuda_version.empty()) info["cuda_arches"] = py::tuple();
  info["compiler"] = __VERSION__;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  return info;
}

// What both the processor and the operating system support. All are false on a processor that is not x86-64.
py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
#define NEGMINE_FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
#else
#define NEGMINE_FEATURE(name) features[name] = false
#endif
  NEGMINE_FEATURE("avx2");
  NEGMINE_FEATURE("fma");
  NEGMINE_FEATURE("f16c");
  NEGMINE_FEATURE("avx512f");
  NEGMINE_FEATURE("avx512bw");
  NEGMINE_FEATURE("avx512dq");
  NEGMINE_FEATURE("avx512vl");
  NEGMINE_FEATURE("avx512vnni");
  NEGMINE_FEATURE("avx512bf16");
  NEGMINE_FEATURE("amx-tile");
  NEGMINE_FEATURE("amx-bf16");
#undef NEGMINE_FEATURE
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The part of negmine that does not use torch: build information, processor features, kernels for NumPy arrays";
  m.def("build_info", &build_info, "How this module was compiled: cuda_version, cuda_arches, compiler, cxx_standard.");
  m.def("cpu_features", &cpu_features,
        "A dict from the name of an instruction set to whether this machine supports it.");
  m.def("isa_for", &negmine::cpu::isa_for, py::arg("query"), py::arg("keys"),
        "The instruction set of the CPU kernels for queries and keys of these types: float32, bfloat16 or float16.");
  negmine::python::define_mine_hardest(m);
}
