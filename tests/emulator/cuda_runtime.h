// A CUDA runtime for kernels that run on the CPU, in tests: one fiber per thread, one block at a time.
//
// Compiling a .cu file with g++ -x c++ and this folder before CUDA's finds wrong indices, lost elements and broken warp
// exchanges without a GPU. It knows nothing of races, alignment and memory order: compute-sanitizer on a GPU does.
// It covers what the kernels use, launches through cudaLaunchKernelEx included, and no more; a warp whose lanes do not
// all meet at an exchange aborts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done = false;
  bool waits = false;    // for the other lanes of its warp
  uint64_t offered = 0;  // what it gives to the exchange under way
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline std::function<void()> kernel;

inline void enter() {
  kernel();
  fibers[current].done = true;
}

inline void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  swapcontext(&scheduler, &fibers[thread].context);
}

// Returns once every lane of the warp has come here.
inline void meet() {
  const unsigned self = current;
  fibers[self].waits = true;
  swapcontext(&fibers[self].context, &scheduler);
}

inline void run_warp(unsigned begin, unsigned end) {
  for (unsigned finished = 0; finished < end - begin;) {
    unsigned waiting = 0;
    finished = 0;
    for (unsigned thread = begin; thread < end; ++thread) {
      if (!fibers[thread].done) resume(thread);
      finished += fibers[thread].done;
      waiting += fibers[thread].waits;
      fibers[thread].waits = false;
    }
    if (waiting != 0 && finished != 0) {
      std::fprintf(stderr, "emulator: %u lanes of a warp wait for %u that have returned\n", waiting, finished);
      std::abort();
    }
  }
}

inline void run_block() {
  for (unsigned thread = 0; thread < fibers.size(); ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.done = fiber.waits = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned begin = 0; begin < fibers.size(); begin += kWarp) {
    run_warp(begin, std::min<unsigned>(begin + kWarp, fibers.size()));
  }
}

// What every lane of this thread's warp offers: T (32,).
template <class T>
std::vector<T> exchange(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&fibers[current].offered, &value, sizeof value);
  meet();
  std::vector<T> all(kWarp);
  const unsigned begin = current / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) std::memcpy(&all[lane], &fibers[begin + lane].offered, sizeof(T));
  meet();
  return all;
}

}  // namespace emulator

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Wanted...), Given... arguments) {
  const unsigned threads = launch->blockDim.x;
  if (launch->gridDim.x == 0 || threads == 0 || threads % emulator::kWarp != 0 || launch->blockDim.y != 1) {
    return cudaErrorInvalidConfiguration;
  }
  emulator::kernel = [=] { kernel(arguments...); };
  gridDim = launch->gridDim;
  blockDim = launch->blockDim;
  emulator::fibers.resize(threads);
  for (unsigned x = 0; x < launch->gridDim.x; ++x) {
    blockIdx = {x, 0, 0};
    emulator::run_block();
  }
  return cudaSuccess;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int apart) {
  const unsigned lane = emulator::current % emulator::kWarp;
  return emulator::exchange(value)[lane ^ apart];
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const std::vector<int> votes = emulator::exchange<int>(vote);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulator::kWarp; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// The files that use these are compiled with -ffp-contract=off, so that each rounds on its own.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
