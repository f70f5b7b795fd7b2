// A GPU for tests, as far as the PTX ISA describes one: warps of 32 lanes that run parsed PTX on the CPU, one block
// after another.
//
// What it refuses, in words: reads and writes of global memory outside of the arguments, of shared memory outside of
// the block's, and misaligned ones; two threads at one byte of shared memory, one of them writing, with no barrier
// between; lanes that are not together where an instruction wants all of them; products that read what no fence showed
// them. Registers begin as NaN, shared memory too, and copies that do not wait arrive as late as they may.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kWindow = 1024;  // where the shared memory of a block begins
using Mask = uint32_t;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A register is an array with an element a lane: bytes wide, 1 for a predicate.
struct Register {
  uint32_t at;  // in the registers of a warp
  uint32_t bytes;
};

// Not bool: before it is written a register holds what is no truth value.
struct Predicate {
  uint8_t bits;
  Predicate(bool value = false) : bits(value) {}
  operator bool() const { return bits & 1; }
};

struct Block;
struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&, Mask);

struct Instruction {
  Run run = nullptr;
  int32_t guard = -1;  // a predicate's place, -1 = none
  bool guard_is_not = false;
  std::vector<Register> registers{};
  int32_t target = 0;      // of a branch
  int64_t offset = 0;      // of an address
  int32_t count = 1;       // elements of a vector
  int32_t bytes = 0;       // of an element in memory
  bool is_signed = false;  // of an element that is widened
  int32_t kind = 0;        // what distinguishes instructions with one function
  bool meets = false;      // waits for the lanes of the warp that are elsewhere
};

struct Program {
  std::vector<Instruction> instructions;
  uint32_t register_bytes = 0, local_bytes = 0;
  std::vector<std::pair<Register, uint64_t>> constants;
};

// A matrix product that has begun: see wgmma in tensor.cpp.
struct Product {
  const Instruction* instruction = nullptr;
  bool adds = false, is_half = false, left_is_transposed = false, right_is_transposed = false;
  bool follows = false;                              // another that has begun and has the same results
  int group = -1;                                    // once it is closed
  uint64_t described_left = 0, described_right = 0;  // 0: in registers
  std::vector<float> before{};                       // its results had; by result, then lane
  std::vector<uint32_t> left{};                      // the 16 rows of this warp, 8 words each
  std::vector<uint32_t> right{};                     // columns, 8 words each
};

struct Copy {
  uint32_t to;
  int bytes, bytes_read;
  const char* from;
  int thread;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  std::vector<char> registers, local;  // local memory, a lane after another
  Mask alive = 0;
  bool is_apart = false;  // lanes are at different places
  Mask parked = 0;        // of these, at instructions that meet
  int32_t at = 0;         // of all lanes, unless apart
  int32_t places[kLanes] = {};
  const Instruction* waits = nullptr;  // at a barrier of the block
  uint32_t phase = 0;                  // how many barriers of the warp it has passed
  std::vector<std::vector<Copy>> copies[kLanes];
  std::vector<Product> products;
  int groups = 0;  // of products, closed so far
  bool may_begin_products = false;
  uint32_t shown = 0;  // what was written in phases of the block before this one, to products of this warp

  template <class T>
  T* of(Register r) {
    return reinterpret_cast<T*>(registers.data() + r.at);
  }
  int thread(int lane) const { return kLanes * index + lane; }
  void require_all(Mask mask) const {
    if (mask != alive) throw Failure("the lanes of a warp are not together");
  }
};

// Who touched a byte of shared memory last.
struct Touch {
  int32_t writer = -1, reader = -1;  // a thread; kMany = several of the warp
  uint32_t write_phase = 0, read_phase = 0, write_warp_phase = 0, read_warp_phase = 0;
  int32_t read_warp = -1;  // kMany = several
  bool is_hidden = false;  // no fence of the writer has followed
};
constexpr int32_t kMany = -2;

struct Range {
  const char *begin, *end;
};

struct Box;
struct Barrier {
  uint32_t round = 0;
  int64_t expected = -1;
  std::vector<Box> boxes{};
};

struct TensorMap {  // as tests/emulator/cuda.h makes it
  const char* base;
  uint64_t width, height, stride;
  uint32_t box_width, box_height;
};

struct Box {
  uint32_t to;
  TensorMap map;
  int row, column;
};

struct Block {
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::vector<Touch> touches;
  std::vector<Range> ranges;  // of global memory
  const char* parameters = nullptr;
  uint32_t phase = 0;  // how many barriers it has passed
  std::map<uint32_t, Barrier> barriers{};

  char* shared_at(uint32_t address, int bytes, int alignment);
  void read(const Warp& warp, int lane, uint32_t address, int bytes);
  void write(const Warp& warp, int lane, uint32_t address, const char* from, int bytes);  // aligned to its size
  char* global_at(uint64_t address, int bytes);
  bool is_hidden(const Warp& warp, uint32_t byte) const;  // from products and copies of boxes that the warp begins
};

inline float half_to_float(uint16_t bits, bool is_half) {
  if (is_half) return static_cast<float>(std::bit_cast<_Float16>(bits));
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Fills in what a name says: its function and what it does with which types. False where the machine has no such
// instruction. `widths` are the sizes of the operands, for constants; the last goes on.
bool find_arithmetic(const std::string& name, Instruction& instruction, std::vector<uint32_t>& widths);
bool find_memory(const std::string& name, Instruction& instruction, std::vector<uint32_t>& widths);
bool find_tensor(const std::string& name, Instruction& instruction, std::vector<uint32_t>& widths);
bool find_control(const std::string& name, Instruction& instruction, std::vector<uint32_t>& widths);

void arrive(Block& block, Barrier& barrier);
void release(Block& block);  // all its warps wait at a barrier

}  // namespace ptx
