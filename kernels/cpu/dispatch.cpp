// The table of instruction sets and the choice among them: see dispatch.h.
#include "kernels/cpu/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
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
// All features that ISA_FLAGS (build_tools/extensions.py) allows the compiler to use, because a virtual machine may
// hide any of them. Not every compiler knows the name f16c.
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Of the same sets of instructions as AVX-512's kernels, of which one function uses more (simd/score.cpp).
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// A process must ask the operating system once for permission to use tiles, because they add 8 KiB to the state that is
// saved at every context switch. Systems that do not support tiles refuse. Virtual machines may hide the CPUID leaves
// that describe the tiles, but these are the same on all processors.
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
#elif defined(__aarch64__)
bool has_neonbf16() {
#if defined(__linux__)
  constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kBFloat16) != 0;
#else
  return false;
#endif
}
#endif

const Entry kTable[] = {
#if defined(__x86_64__)
    {&amxbf16::kKernels, has_amxbf16},
    {&avx512bf16::kKernels, has_avx512bf16},
    {&avx512::kKernels, has_avx512},
    {&avx2::kKernels, has_avx2},
#elif defined(__aarch64__)
    {&neonbf16::kKernels, has_neonbf16},
    {&neon::kKernels, [] { return true; }},
#endif
    {&portable::kKernels, [] { return true; }},
};
constexpr int kEntries = sizeof kTable / sizeof kTable[0], kDtypes = 3;

// The vendor of the processor as returned by CPUID, twelve letters; empty if it is not available.
struct Maker {
  char name[13] = {};
};

Maker maker_of_this() {
  Maker maker;
#if defined(__x86_64__)
  unsigned eax = 0, words[3] = {};  // ebx, edx, ecx hold the letters
  if (__get_cpuid(0, &eax, &words[0], &words[2], &words[1]) != 0) std::memcpy(maker.name, words, sizeof words);
#endif
  return maker;
}

// Exceptions: the vendors and storage types for which an instruction set is slower than the next one in kTable. A line
// applies to every op that scores a queue, because ops compare scores bit for bit. `make bench-isa` measures all of
// them and fails if a line is missing or wrong. The milliseconds are for the loss and its gradient at B = 256, K =
// 65,536, D = 128 with ids, on one core of a Xeon with AMX.
struct Slower {
  const char* maker;
  const char* isa;
  bool (*storage)(Dtype query, Dtype keys);
};

bool any_storage(Dtype, Dtype) { return true; }
bool both_float32(Dtype query, Dtype keys) { return query == Dtype::kFloat32 && keys == Dtype::kFloat32; }
bool float32_and_float16(Dtype query, Dtype keys) {
  return query != keys && query != Dtype::kBFloat16 && keys != Dtype::kBFloat16;
}

const Slower kSlower[] = {
    // Intel's processors multiply pairs of bf16 at half the rate of AMD's: bf16 takes 119 ms, but 80 ms with AVX-512,
    // which widens it to fp32.
    {"GenuineIntel", "avx512bf16", any_storage},
    // fp32 needs six products of bf16 parts. Compared with AVX-512, this is faster in the loss (41 ms instead of 50 ms
    // on two cores), slower in windows and rank_thresholds (10 %) and in sums of sigmoids (20 %), and equal over all
    // ops.
    {"GenuineIntel", "amxbf16", both_float32},
    // fp32 and fp16 need five products. Over all ops, AMX takes 1.09 times as long as AVX-512: it is faster in the loss
    // (35 ms instead of 36 ms on two cores), and slower in windows (43 ms instead of 37 ms).
    {"GenuineIntel", "amxbf16", float32_and_float16},
    // Other types need fewer products, and AMX is faster over all ops. The loss takes 9 ms from bf16 (AVX-512: 31 ms),
    // 17 ms from fp32 and bf16 (31 ms), and 28 ms from fp16 (34 ms).
};

bool is_slower(const Maker& maker, const Kernels& kernels, Dtype query, Dtype keys) {
  for (const Slower& line : kSlower) {
    if (std::strcmp(line.maker, maker.name) != 0 || std::strcmp(line.isa, kernels.isa) != 0) continue;
    if (line.storage(query, keys)) return true;
  }
  return false;
}

// The choice for each pair of storage types, computed once.
struct Choice {
  Choice() {
    bool supported[kEntries];
    for (int i = 0; i < kEntries; ++i) supported[i] = kTable[i].supported();
    const Maker maker = maker_of_this();
    for (int query = 0; query < kDtypes; ++query) {
      for (int keys = 0; keys < kDtypes; ++keys) {
        int i = 0;
        const auto slower = [&] { return is_slower(maker, *kTable[i].kernels, Dtype(query), Dtype(keys)); };
        while (!supported[i] || slower()) ++i;
        of[query][keys] = kTable[i].kernels;
      }
    }
  }

  const Kernels* of[kDtypes][kDtypes];
};

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const Kernels* code_kernels() {
#if defined(__x86_64__)
  static const Kernels* const found = has_avx512vnni() ? &avx512::kKernels : nullptr;
  const Kernels* set = forced.load();
  return set == nullptr || set == found ? found : nullptr;
#else
  return nullptr;
#endif
}

const Kernels& kernels(Dtype query, Dtype keys) {
  if (keys == Dtype::kCodes) return *code_kernels();
  const Kernels* set = forced.load();
  if (set != nullptr) return *set;
  static const Choice choice;
  return *choice.of[static_cast<int>(query)][static_cast<int>(keys)];
}

const char* isa() {
  const Kernels* set = forced.load();
  return set == nullptr ? "" : set->isa;
}

const char* isa_for(const char* query, const char* keys) {
  if (!std::strcmp(query, "uint8") && !std::strcmp(keys, "uint8")) return code_kernels() ? "avx512vnni" : "";
  const auto type = [](const char* name) {
    constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};  // in the order of Dtype
    return static_cast<int>(
        std::find_if(kNames, kNames + kDtypes, [&](const char* n) { return !std::strcmp(n, name); }) - kNames);
  };
  const int q = type(query), k = type(keys);
  return q == kDtypes || k == kDtypes ? nullptr : kernels(Dtype(q), Dtype(k)).isa;
}

bool set_isa(const char* name) {
  if (name[0] == '\0') {
    forced.store(nullptr);
    return true;
  }
  for (const Entry& entry : kTable) {
    if (std::strcmp(entry.kernels->isa, name) != 0 || !entry.supported()) continue;
    forced.store(entry.kernels);
    return true;
  }
  return false;
}

}  // namespace negmine::cpu
