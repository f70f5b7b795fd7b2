// The table of instruction sets, best first, and the choice among them: see dispatch.h.
#include "kernels/cpu/dispatch.h"

#include <atomic>
#include <cstring>

namespace negmine::cpu {
namespace {

struct Entry {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

const Entry kTable[] = {
#if defined(__x86_64__)
    {&avx512bf16::kKernels, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    {&avx512::kKernels, has_avx512},
    {&avx2::kKernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&portable::kKernels, [] { return true; }},
};

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load();
  if (current != nullptr) return *current;
  for (const Entry& entry : kTable) {
    if (!entry.supported()) continue;
    chosen.store(entry.kernels);
    return *entry.kernels;
  }
  return portable::kKernels;
}

const char* isa() { return kernels().isa; }

bool set_isa(const char* name) {
  for (const Entry& entry : kTable) {
    if (std::strcmp(entry.kernels->isa, name) != 0 || !entry.supported()) continue;
    chosen.store(entry.kernels);
    return true;
  }
  return false;
}

}  // namespace negmine::cpu
