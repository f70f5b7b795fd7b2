// Products of matrices by a warp and by a warpgroup, and the loads and stores of their fragments. Layouts: PTX ISA,
// "Matrix fragments for mma.m16n8k16", "Register fragments for wgmma.mma_async.m64nNk16", "Matrix descriptor"; for
// transposed operands the canonical layouts that CUTLASS writes down in include/cute/arch/mma_sm90_desc.hpp.
#include <array>
#include <cmath>

#include "machine.h"

namespace ptx {
namespace {

float half_of(uint32_t word, int half, bool is_half) {
  return half_to_float(static_cast<uint16_t>(word >> 16 * half), is_half);
}

// d[i] at D[g + 8 (i / 2)][2t + i % 2] = c + A B; operands d 4, a 4, b 2, c 4. kind: fp16.
void multiply(Warp& w, const Instruction& i, Mask mask) {
  w.require_all(mask);
  const auto word = [&](int operand, int lane) { return w.of<uint32_t>(i.registers[operand])[lane]; };
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r)
        a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + half] = half_of(word(4 + r, lane), half, i.kind);
      for (int r = 0; r < 2; ++r) b[2 * t + 8 * r + half][g] = half_of(word(8 + r, lane), half, i.kind);
    }
  }
  for (int m = 0; m < 16; ++m) {
    double sums[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) sums[n] += double{a[m][k]} * b[k][n];
    }
    for (int n = 0; n < 8; ++n) {
      const float c = w.of<float>(i.registers[10 + m / 8 * 2 + n % 2])[m % 8 * 4 + n / 2];
      d[m][n] = static_cast<float>(sums[n] + c);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < 4; ++r) {
      w.of<float>(i.registers[r])[lane] = d[lane / 4 + 8 * (r / 2)][lane % 4 * 2 + r % 2];
    }
  }
}

enum Move { kLoad = 0, kStore = 1, kTransposed = 2 };

// count matrices of 8 rows of 16 bytes; lane l names row l % 8 of matrix l / 8. A load has its address last.
void move_matrices(Warp& w, const Instruction& i, Mask mask) {
  w.require_all(mask);
  const bool stores = i.kind & kStore;
  const Register base = i.registers[stores ? 0 : i.count];
  for (int matrix = 0; matrix < i.count; ++matrix) {
    uint32_t* const fragment = w.of<uint32_t>(i.registers[stores ? matrix + 1 : matrix]);
    for (int row = 0; row < 8; ++row) {
      const int namer = 8 * matrix + row;
      const uint32_t address = w.of<uint32_t>(base)[namer] + static_cast<uint32_t>(i.offset);
      char* place = w.block->shared_at(address, 16, 16);
      if (!stores) w.block->read(w, namer, address, 16);
      char stored[16];
      for (int column = 0; column < 8; ++column) {
        const int m = i.kind & kTransposed ? column : row, n = i.kind & kTransposed ? row : column;
        char* own = reinterpret_cast<char*>(&fragment[m * 4 + n / 2]) + n % 2 * 2;
        std::memcpy(stores ? stored + 2 * column : own, stores ? own : place + 2 * column, 2);
      }
      if (stores) w.block->write(w, namer, address, stored, 16);
    }
  }
}

// The address of two neighbours along k, or of one element where the operand is transposed.
uint32_t described(uint64_t descriptor, bool is_transposed, uint32_t mn, uint32_t k) {
  constexpr uint64_t kKnown = 0x3FFF | uint64_t{0x3FFF} << 16 | uint64_t{0x3FFF} << 32 | uint64_t{3} << 62;
  if (descriptor & ~kKnown) throw Failure("a matrix descriptor says what this machine does not know");
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
                 stride = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t mode = descriptor >> 62;
  const uint32_t row_bytes = mode == 0 ? 16 : 256 >> mode;  // 128, 64 or 32
  uint32_t address;
  if (!is_transposed) {
    address = start + mn / 8 * stride + mn % 8 * row_bytes + (mode == 0 ? k / 8 * leading + k % 8 * 2 : 2 * k);
  } else if (mode == 0) {
    address = start + mn / 8 * stride + k / 8 * leading + k % 8 * 16 + mn % 8 * 2;
  } else {
    const uint32_t across = row_bytes / 2;
    address = start + mn / across * leading + k / 8 * stride + k % 8 * row_bytes + mn % across * 2;
  }
  const uint32_t moved = mode == 0 ? 0 : 7 >> (mode - 1);
  return address ^ (address >> 7 & moved) << 4;
}

// `begins`: a product does, and what it reads must have been shown to it.
uint32_t find(Warp& w, uint32_t address, uint32_t bytes, bool begins) {
  uint32_t word = 0;
  std::memcpy(&word, w.block->shared_at(address, bytes, bytes), bytes);
  for (uint32_t b = 0; b < bytes && begins; ++b) {
    const Touch& touch = w.block->touches[address - kWindow + b];
    if (w.block->is_hidden(w, address - kWindow + b))
      throw Failure("a product reads what was written without a fence.proxy.async");
    const bool is_own = touch.writer >= 0 && touch.writer / kLanes == w.index;
    if (touch.writer != -1 && touch.write_phase == w.block->phase && !is_own) {
      throw Failure("a product reads what another warp wrote, with no barrier between");
    }
  }
  return word;
}

// Of rows from `first` on, 8 words each.
std::vector<uint32_t> find_rows(Warp& w, uint64_t descriptor, bool is_transposed, uint32_t first, uint32_t rows,
                                bool begins) {
  std::vector<uint32_t> words;
  for (uint32_t row = first; row < first + rows; ++row) {
    for (uint32_t k = 0; k < 16; k += 2) {
      if (is_transposed) {
        words.push_back(find(w, described(descriptor, true, row, k), 2, begins) |
                        find(w, described(descriptor, true, row, k + 1), 2, begins) << 16);
      } else {
        words.push_back(find(w, described(descriptor, false, row, k), 4, begins));
      }
    }
  }
  return words;
}

// count = N / 2 results, then a 4 or a descriptor, a descriptor, whether it adds, two signs, transposes. kind: fp16.
std::vector<uint32_t> find_right(Warp& w, const Product& product, bool begins) {
  return find_rows(w, product.described_right, product.right_is_transposed, 0, 2 * product.instruction->count, begins);
}

std::vector<uint32_t> find_left(Warp& w, const Product& product, bool begins) {
  return find_rows(w, product.described_left, product.left_is_transposed, w.index % 4 * 16, 16, begins);
}

void begin_product(Warp& w, const Instruction& i, Mask mask) {
  w.require_all(mask);
  if (!w.may_begin_products) throw Failure("a product begins without wgmma.fence");
  const bool in_registers = i.registers[i.count].bytes == 4;
  const size_t b = i.count + (in_registers ? 4 : 1);
  const auto number = [&](size_t k) { return w.of<uint32_t>(i.registers[k])[0]; };
  const auto descriptor = [&](size_t k) { return w.of<uint64_t>(i.registers[k])[0]; };
  if (number(b + 2) != 1 || number(b + 3) != 1) throw Failure("a product has a sign");
  Product product;
  product.instruction = &i;
  product.adds = w.of<Predicate>(i.registers[b + 1])[0];
  product.is_half = i.kind != 0;
  product.described_right = descriptor(b);
  product.right_is_transposed = number(b + (in_registers ? 4 : 5)) != 0;
  product.right = find_right(w, product, true);
  if (in_registers) {
    for (int row = 0; row < 16; ++row) {
      for (int word = 0; word < 8; ++word) {
        const Register r = i.registers[i.count + row / 8 + word / 4 * 2];
        product.left.push_back(w.of<uint32_t>(r)[row % 8 * 4 + word % 4]);
      }
    }
  } else {
    product.described_left = descriptor(i.count);
    product.left_is_transposed = number(b + 4) != 0;
    product.left = find_left(w, product, true);
  }
  for (const Product& earlier : w.products) {
    product.follows |= earlier.instruction->registers[0].at == i.registers[0].at;
  }
  for (int r = 0; r < i.count; ++r) {
    float* d = w.of<float>(i.registers[r]);
    product.before.insert(product.before.end(), d, d + kLanes);
    std::fill_n(d, kLanes, NAN);
  }
  w.products.push_back(product);
}

void close_products(Warp& w, const Instruction&, Mask mask) {
  w.require_all(mask);
  ++w.groups;
  for (Product& product : w.products) {
    if (product.group < 0) product.group = w.groups;
  }
}

void finish(Warp& w, const Product& product) {
  const Instruction& i = *product.instruction;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < i.count; ++r) {
      const int row = lane / 4 + r / 2 % 2 * 8, column = r / 4 * 8 + lane % 4 * 2 + r % 2;
      float* d = &w.of<float>(i.registers[r])[lane];
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        sum += double{half_of(product.left[8 * row + k / 2], k % 2, product.is_half)} *
               half_of(product.right[8 * column + k / 2], k % 2, product.is_half);
      }
      const float before = product.follows ? *d : product.before[kLanes * r + lane];
      *d = static_cast<float>(sum + (product.adds ? before : 0.0f));
    }
  }
}

void wait_for_products(Warp& w, const Instruction& i, Mask mask) {
  w.require_all(mask);
  const int newest = static_cast<int>(w.of<uint32_t>(i.registers[0])[0]);
  while (!w.products.empty()) {
    const Product& product = w.products.front();
    if (product.group < 0 || product.group > w.groups - newest) break;
    if (find_right(w, product, false) != product.right ||
        (product.described_left && find_left(w, product, false) != product.left)) {
      throw Failure("shared memory changed under a product");
    }
    finish(w, product);
    w.products.erase(w.products.begin());
  }
}

void fence(Warp& w, const Instruction&, Mask mask) {
  w.require_all(mask);
  w.may_begin_products = true;
}

}  // namespace

bool find_tensor(const std::string& name, Instruction& instruction, std::vector<uint32_t>& widths) {
  instruction.meets = true;  // all of them
  const bool is_half = name.ends_with(".f16.f16") || name.ends_with(".f16.f16.f32");
  if (name.starts_with("mma.sync.aligned.m16n8k16.row.col.f32.") && (is_half || name.ends_with(".bf16.bf16.f32"))) {
    instruction.run = multiply;
    instruction.kind = is_half;
    widths.assign(14, 4);
    return true;
  }
  if (name.starts_with("ldmatrix.sync.aligned.m8n8.x") || name.starts_with("stmatrix.sync.aligned.m8n8.x")) {
    instruction.run = move_matrices;
    instruction.kind = (name[0] == 's' ? kStore : kLoad) | (name.find(".trans") != name.npos ? kTransposed : 0);
    instruction.count = name[name.find(".x") + 2] - '0';
    widths.assign(instruction.count + 1, 4);
    return true;
  }
  if (name.starts_with("wgmma.mma_async.sync.aligned.m64n")) {
    instruction.run = begin_product;
    instruction.kind = is_half;
    instruction.count = std::stoi(name.substr(name.find("m64n") + 4)) / 2;
    widths.assign(instruction.count, 4);
    const bool described_left = instruction.registers[instruction.count].bytes == 8;
    widths.insert(widths.end(), described_left ? 1 : 4, described_left ? 8 : 4);
    for (const uint32_t width : {8, 1, 4, 4}) widths.push_back(width);
    widths.insert(widths.end(), described_left ? 2 : 1, 4);
    return true;
  }
  const auto is = [&](Run run, std::vector<uint32_t> of) {
    instruction.run = run, widths = std::move(of);
    return true;
  };
  if (name == "wgmma.fence.sync.aligned") return is(fence, {});
  if (name == "wgmma.commit_group.sync.aligned") return is(close_products, {});
  if (name == "wgmma.wait_group.sync.aligned") return is(wait_for_products, {4});
  return instruction.meets = false;
}

}  // namespace ptx
