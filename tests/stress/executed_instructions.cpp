// Counts the instructions that a call of a CPU op executes, address by address: what can be known of the speed of AMX
// kernels on a processor without AMX. The call is stepped through by the trap flag. A tile instruction that the
// processor does not have raises SIGILL, and is carried out here in plain code: so these are the kernels as they ship.
//
//     executed_instructions OP QUERY KEYS B K D
//
// The first line is the largest difference of the op's log-sum-exps, or scores, from those of the portable kernels;
// each line after it an address, which objdump names, and how often the instruction there was executed.
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/logsumexp.h"
#include "kernels/cpu/logsumexp_window.h"
#include "kernels/cpu/mine_hardest.h"
#include "kernels/cpu/rank_thresholds.h"

using namespace negmine::cpu;

extern "C" const char __executable_start, etext;

namespace {

std::vector<uint64_t> counts;  // of the instruction at each address
bool stepping = false;

void count(uint64_t address) {
  const uint64_t first = reinterpret_cast<uint64_t>(&__executable_start);
  if (stepping && address - first < counts.size()) ++counts[address - first];
}

float tiles[8][16][16];  // 16 rows of 64 bytes each

float of_bf16(uint32_t bits) {
  float x;
  bits <<= 16;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void multiply(int sum, int left, int right) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      float firsts = 0.0f, seconds = 0.0f;
      for (int t = 0; t < 16; ++t) {
        uint32_t a, b;
        std::memcpy(&a, &tiles[left][r][t], sizeof a);
        std::memcpy(&b, &tiles[right][t][c], sizeof b);
        firsts += of_bf16(a & 0xFFFF) * of_bf16(b & 0xFFFF);
        seconds += of_bf16(a >> 16) * of_bf16(b >> 16);
      }
      tiles[sum][r][c] += firsts + seconds;
    }
  }
}

// The tile instruction at `at`, carried out; its length in bytes, 0 for any other instruction. Intel's manual, volume
// 2: a VEX prefix of three bytes, an opcode, ModRM, and for memory SIB and a displacement.
int tile_instruction(const uint8_t* at, const greg_t* registers) {
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  if (at[0] != 0xC4 || (at[1] & 31) != 2) return 0;
  const bool high_index = (at[1] & 0x40) == 0, high_base = (at[1] & 0x20) == 0;
  const int prefix = at[2] & 3, third = ~(at[2] >> 3) & 15;  // prefix: none, 66, F3, F2
  const int opcode = at[3], mod = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7;
  if (opcode == 0x5C && prefix == 2 && mod == 3) return multiply(reg, rm, third), 5;
  if (opcode == 0x49 && prefix == 3 && mod == 3) return std::memset(tiles[reg], 0, sizeof tiles[reg]), 5;
  if (opcode == 0x49 && prefix == 0 && at[4] == 0xC0) return 5;  // tilerelease
  if ((opcode != 0x49 && opcode != 0x4B) || mod == 3) return 0;
  const int displaced = mod == 0 ? 0 : mod == 1 ? 1 : 4;
  if (opcode == 0x49) return 5 + (rm == 4) + (mod == 0 && rm == 5 ? 4 : displaced);  // ldtilecfg: always full tiles
  const int scale = at[5] >> 6, index = (at[5] >> 3 & 7) + 8 * high_index, base = (at[5] & 7) + 8 * high_base;
  int32_t displacement = 0;
  if (displaced == 1) displacement = static_cast<int8_t>(at[6]);
  if (displaced == 4 || (mod == 0 && base % 8 == 5)) std::memcpy(&displacement, at + 6, sizeof displacement);
  const bool no_base = mod == 0 && base % 8 == 5;
  char* first = reinterpret_cast<char*>((no_base ? 0 : registers[kOrder[base]]) + displacement);
  const int64_t stride = index == 4 ? 0 : static_cast<int64_t>(registers[kOrder[index]]) << scale;
  for (int r = 0; r < 16; ++r) {
    if (prefix == 2) {
      std::memcpy(first + r * stride, tiles[reg][r], 64);
    } else {
      std::memcpy(tiles[reg][r], first + r * stride, 64);
    }
  }
  return 6 + (no_base ? 4 : displaced);
}

void on_step(int, siginfo_t*, void* context) { count(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]); }

void on_unknown(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = tile_instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  if (length == 0) _exit(3);
  registers[REG_RIP] += length;
  count(registers[REG_RIP]);  // the next step ends behind it
}

void handle(int signal, void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action{};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(signal, &action, nullptr);
}

template <class Call>
void step_through(const Call& call) {
  stepping = true;
  asm volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\tlea 128(%%rsp), %%rsp" ::
                   : "cc", "memory");
  call();
  asm volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\tandq $~0x100, (%%rsp)\n\tpopfq\n\tlea 128(%%rsp), %%rsp" ::
                   : "cc", "memory");
  stepping = false;
}

// Rows of length 1, as a trained encoder gives them.
struct Rows {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  Matrix matrix;

  Rows(int64_t rows, int64_t D, const std::string& type, std::mt19937& random) : wide(rows * D), narrow(rows * D) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i) {
      float* row = &wide[i * D];
      double squares = 0;
      for (int64_t d = 0; d < D; ++d) row[d] = normal(random), squares += double{row[d]} * row[d];
      for (int64_t d = 0; d < D; ++d) row[d] = static_cast<float>(row[d] / std::sqrt(squares));
    }
    for (size_t i = 0; i < wide.size(); ++i) {
      if (type == "fp16") {
        const _Float16 half = static_cast<_Float16>(wide[i]);
        std::memcpy(&narrow[i], &half, sizeof half);
      } else {
        uint32_t bits;
        std::memcpy(&bits, &wide[i], sizeof bits);
        narrow[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
    const Dtype dtype = type == "fp32" ? Dtype::kFloat32 : type == "bf16" ? Dtype::kBFloat16 : Dtype::kFloat16;
    matrix = {type == "fp32" ? static_cast<const void*>(wide.data()) : narrow.data(), D, dtype};
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  const std::string op = argv[1];
  const int64_t B = std::atoll(argv[4]), K = std::atoll(argv[5]), D = std::atoll(argv[6]);
  std::mt19937 random(5);
  const Rows query(B, D, argv[2], random), keys(K, D, argv[3], random);
  std::vector<float> found(B * K), mean(B * D);
  std::vector<int64_t> whole(B * K), kept(B), above(B), ranks(2 * B);
  for (int64_t b = 0; b < B; ++b) ranks[2 * b] = K / 1000, ranks[2 * b + 1] = K / 20;
  const float scale = 1 / 0.07f;
  const auto run = [&] {
    const Parallel one = serial();
    const LogsumexpParams sum{.query = query.matrix,
                              .negative_keys = keys.matrix,
                              .B = B,
                              .K = K,
                              .D = D,
                              .scale = &scale,
                              .lse = found.data(),
                              .mean = op == "logsumexp" ? nullptr : mean.data(),
                              .num_kept = kept.data(),
                              .num_above = above.data()};
    if (op == "logsumexp" || op == "gradient") logsumexp(sum, one);
    if (op == "window") logsumexp_between(sum, ranks.data(), whole.data(), one);
    if (op == "mine_hardest") {
      const int64_t N = K / 64;
      mine_hardest({.query = query.matrix,
                    .negative_keys = keys.matrix,
                    .B = B,
                    .K = K,
                    .D = D,
                    .N = N,
                    .scores = found.data(),
                    .index = whole.data(),
                    .num_kept = nullptr},
                   one);
    }
    if (op == "rank_thresholds") {
      rank_thresholds({.query = query.matrix,
                       .negative_keys = keys.matrix,
                       .B = B,
                       .K = K,
                       .D = D,
                       .R = 2,
                       .ranks = ranks.data(),
                       .sort_keys = whole.data()},
                      one);
    }
  };
  set_isa("portable");
  run();
  const std::vector<float> want = found;
  counts.resize(&etext - &__executable_start);
  handle(SIGTRAP, on_step);
  handle(SIGILL, on_unknown);
  if (!set_isa("amxbf16")) return 4;
  run();  // not counted: what is set up once
  step_through(run);
  double off = 0;
  for (size_t i = 0; i < want.size(); ++i) off = std::fmax(off, std::fabs(double{found[i]} - want[i]));
  std::printf("%g\n", off);
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] != 0) std::printf("%zx %zu\n", reinterpret_cast<size_t>(&__executable_start) + i, size_t{counts[i]});
  }
}
