// A CUDA runtime with which tests run kernels on the CPU: one fiber for each thread, one block at a time.
//
// A .cu file is compiled with g++ -x c++ and this folder before CUDA's in the include path. This finds wrong indices,
// lost elements and broken warp exchanges without a GPU. It does not find races and wrong memory order, as
// compute-sanitizer does on a GPU. Only what the kernels use is implemented, including launches by cudaLaunchKernelEx.
// The program aborts if not all lanes of a warp arrive at an exchange. kernels/cuda/ptx.cuh and ptx_sm90.cuh are
// replaced by files of the same names in this folder. With NEGMINE_LAUNCHES_ELSEWHERE, only the host code runs here,
// and launches are passed to a function that the test sets: see tests/ptx/cuda_kernels.py.
#pragma once

#include <cuda.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 99 << 10;  // that a block can use on every GPU from sm_80 on
constexpr size_t kWords = 3;               // of 64 bits that a lane can exchange at once

struct Copy {
  char* shared;
  const char* global;  // null: zeros
};

enum class Waits { kNo, kForWarp, kForBlock };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  Waits waits = Waits::kNo;
  unsigned exchanges = 0;                   // so far; two buffers alternate, so that one meeting for each is enough
  uint64_t offered[2][kWords] = {};         // its values in the current exchange and in the previous one
  unsigned ballots = 0;                     // calls of __syncthreads_or so far
  std::vector<std::vector<Copy>> groups{};  // copies in progress; the last group is still open
  bool hides = false;                       // it wrote to shared memory without a proxy fence afterwards
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline std::function<void()> kernel;
inline std::vector<char> room;  // the workspace of a kernel, unless Python allocates it
inline std::unique_ptr<char[], decltype(&std::free)> shared{nullptr,
                                                            &std::free};  // of the size that the launch requests
inline size_t shared_bytes = 0;
inline unsigned hidden = 0;                   // number of threads with Fiber::hides
inline bool backwards = false;                // whether blocks run in reverse order
inline std::set<void (*)()> at_end_of_block;  // checks that run at the end of each block
inline int votes[3];                          // of the previous, current and next call of __syncthreads_or
inline int64_t launches = 0;

inline void enter() {
  kernel();
  fibers[current].done = true;
}

inline void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  swapcontext(&scheduler, &fibers[thread].context);
}

// Returns once every lane of the warp, or every thread of the block, has called it.
inline void meet(Waits whom) {
  const unsigned self = current;
  fibers[self].waits = whom;
  swapcontext(&fibers[self].context, &scheduler);
}

[[noreturn]] inline void fail(const char* sentence) {
  std::fprintf(stderr, "emulator: %s\n", sentence);
  std::abort();
}

inline void hide(bool hides) {
  hidden += hides - fibers[current].hides;
  fibers[current].hides = hides;
}

// Runs a warp until every lane has returned or waits for the block.
inline void run_warp(unsigned begin, unsigned end) {
  while (true) {
    unsigned stopped = 0, waiting = 0;
    for (unsigned thread = begin; thread < end; ++thread) {
      Fiber& fiber = fibers[thread];
      if (fiber.waits == Waits::kForWarp) fiber.waits = Waits::kNo;
      if (!fiber.done && fiber.waits == Waits::kNo) resume(thread);
      stopped += fiber.done || fiber.waits == Waits::kForBlock;
      waiting += fiber.waits == Waits::kForWarp;
    }
    if (stopped == end - begin) return;
    if (waiting != end - begin) fail("lanes of a warp wait for others that have returned or wait for the block");
  }
}

inline void run_block(size_t bytes) {
  shared.reset(static_cast<char*>(std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024)));
  shared_bytes = bytes, hidden = 0;
  std::memset(shared.get(), 0xFF, shared_bytes);  // NaN in every storage
  std::fill(std::begin(votes), std::end(votes), 0);
  for (unsigned thread = 0; thread < fibers.size(); ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.done = fiber.hides = false;
    fiber.waits = Waits::kNo;
    fiber.groups = {{}};
    fiber.exchanges = fiber.ballots = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  const auto running = [](const Fiber& fiber) { return !fiber.done; };
  while (std::any_of(fibers.begin(), fibers.end(), running)) {
    for (unsigned begin = 0; begin < fibers.size(); begin += kWarp) run_warp(begin, begin + kWarp);
    for (Fiber& fiber : fibers) fiber.waits = Waits::kNo;  // all threads that have not returned are at the barrier
  }
  for (const auto check : at_end_of_block) check();
}

template <class T>
struct Offers {
  T of[kWarp];
  const T& operator[](unsigned lane) const { return of[lane]; }
};

// The values that all lanes of this thread's warp pass.
template <class T>
Offers<T> exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) * kWords);
  const unsigned turn = fibers[current].exchanges++ % 2;
  std::memcpy(fibers[current].offered[turn], &value, sizeof value);
  meet(Waits::kForWarp);
  Offers<T> all;
  const unsigned begin = current / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    std::memcpy(&all.of[lane], fibers[begin + lane].offered[turn], sizeof(T));
  }
  return all;
}

inline unsigned lane() { return current % kWarp; }

}  // namespace emulator

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

#ifdef NEGMINE_LAUNCHES_ELSEWHERE
namespace emulator {

// Arguments: the kernel; grid x, grid y, threads, bytes of shared memory, room, its bytes, backwards; the block of
// parameters of the kernel, and its bytes.
using Launcher = int (*)(const void*, const int64_t*, const char*, int64_t);
inline Launcher launcher = nullptr;

template <class T>
void append(std::vector<char>& bytes, const T& value) {
  bytes.resize((bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T));
  bytes.insert(bytes.end(), reinterpret_cast<const char*>(&value),
               reinterpret_cast<const char*>(&value) + sizeof value);
}

}  // namespace emulator

extern "C" __attribute__((used)) inline void emulated_launch_by(emulator::Launcher launcher) {
  emulator::launcher = launcher;
}
#endif

// Kernels launched so far.
extern "C" __attribute__((used)) inline int64_t emulated_launches() { return emulator::launches; }

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return static_cast<size_t>(value) <= emulator::kSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Wanted...), Given... arguments) {
  const unsigned threads = launch->blockDim.x;
  const dim3 grid = launch->gridDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads == 0 || threads > 1024 ||
      threads % emulator::kWarp != 0 || launch->blockDim.y != 1 || launch->dynamicSmemBytes > emulator::kSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  ++emulator::launches;
#ifdef NEGMINE_LAUNCHES_ELSEWHERE
  std::vector<char> bytes;
  (emulator::append(bytes, static_cast<Wanted>(arguments)), ...);
  const int64_t numbers[] = {grid.x,
                             grid.y,
                             threads,
                             static_cast<int64_t>(launch->dynamicSmemBytes),
                             reinterpret_cast<int64_t>(emulator::room.data()),
                             static_cast<int64_t>(emulator::room.size()),
                             emulator::backwards};
  return static_cast<cudaError_t>(
      emulator::launcher(reinterpret_cast<const void*>(kernel), numbers, bytes.data(), bytes.size()));
#endif
  emulator::kernel = [=] { kernel(arguments...); };
  gridDim = grid;
  blockDim = launch->blockDim;
  emulator::fibers.resize(threads);
  const unsigned blocks = grid.x * grid.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = emulator::backwards ? blocks - 1 - i : i;
    blockIdx = {block % grid.x, block / grid.x, 0};
    emulator::run_block(launch->dynamicSmemBytes);
  }
  return cudaSuccess;
}

#define CUDART_VERSION 13000
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kMajor = 9;
#else
  constexpr int kMajor = 8;
#endif
  return *value = attribute == cudaDevAttrComputeCapabilityMajor ? kMajor : 0, cudaSuccess;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

inline void __syncthreads() { emulator::meet(emulator::Waits::kForBlock); }

inline void __syncwarp() { emulator::meet(emulator::Waits::kForWarp); }

inline int __syncthreads_or(int vote) {
  const unsigned turn = emulator::fibers[emulator::current].ballots++;
  emulator::votes[turn % 3] |= vote != 0;
  __syncthreads();
  emulator::votes[(turn + 2) % 3] = 0;  // of the previous call, whose result all threads have read
  return emulator::votes[turn % 3];
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int apart) {
  return emulator::exchange(value)[emulator::lane() ^ apart];
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned apart) {
  const unsigned lane = emulator::lane();
  return emulator::exchange(value)[lane < apart ? lane : lane - apart];
}

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = emulator::kWarp) {
  return emulator::exchange(value)[emulator::lane() / width * width + source % width];
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto votes = emulator::exchange<int>(vote);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulator::kWarp; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}

inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  const auto all = emulator::exchange(value);
  return *std::min_element(all.of, all.of + emulator::kWarp);
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const auto all = emulator::exchange(value);
  return *std::max_element(all.of, all.of + emulator::kWarp);
}

// These need no synchronisation, because one fiber runs at a time.
template <class T>
T atomicMin(T* place, T value) {
  return std::exchange(*place, std::min(*place, value));
}
template <class T>
T atomicMax(T* place, T value) {
  return std::exchange(*place, std::max(*place, value));
}
inline int atomicAdd(int* place, int value) { return std::exchange(*place, *place + value); }
inline unsigned atomicOr(unsigned* place, unsigned value) { return std::exchange(*place, *place | value); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clzll(int64_t bits) { return bits == 0 ? 64 : __builtin_clzll(static_cast<uint64_t>(bits)); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
using std::max;
using std::min;

// Compiled with -ffp-contract=off, so that each of these operations is rounded.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
