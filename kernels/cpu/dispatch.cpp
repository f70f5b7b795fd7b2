// The table of instruction sets, best first, and the choice among them: see dispatch.h.
#include "kernels/cpu/dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace negmine::cpu {
namespace {

struct Entry {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
// All that ISA_FLAGS (build_tools/extensions.py) lets the compiler use: a virtual machine may hide any one of them. Not
// every compiler knows f16c by name.
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tiles are 8 KiB more for the system to save at every switch, so it wants to be asked, once a process. It refuses
// where it does not know them. Virtual machines may hide the leaves that describe the tiles, which are the same
// everywhere.
bool may_use_tiles() {
#if defined(NEGMINE_EMULATED_TILES)
  return true;
#elif defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22;
  constexpr int kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (~edx & (kTiles | kBFloat16)) != 0) return false;
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amxbf16() { return has_avx512bf16() && may_use_tiles() && amxbf16::tiles_are_right(); }
#endif

const Entry kTable[] = {
#if defined(__x86_64__)
    {&amxbf16::kKernels, has_amxbf16},
    {&avx512bf16::kKernels, has_avx512bf16},
    {&avx512::kKernels, has_avx512},
    {&avx2::kKernels, has_avx2},
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
