// Loads, stores, copies that do not wait, and the barriers that copies of boxes report to.
#include <algorithm>
#include <sstream>

#include "machine.h"

namespace ptx {
namespace {

enum Space { kGlobal, kShared, kParameters, kGeneric };

std::vector<std::string> parts_of(const std::string& name) {
  std::vector<std::string> parts;
  std::stringstream stream(name);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  return parts;
}

uint64_t address_of(Warp& w, const Instruction& i, Register base, int lane) {
  const uint64_t value = base.bytes == 8 ? w.of<uint64_t>(base)[lane] : w.of<uint32_t>(base)[lane];
  return value + static_cast<uint64_t>(i.offset);
}

char* place_of(Warp& w, const Instruction& i, uint64_t address) {
  const int bytes = i.bytes * i.count;
  if (i.kind == kParameters) return const_cast<char*>(w.block->parameters) + address;
  if (address % bytes != 0) throw Failure("an access of " + std::to_string(bytes) + " bytes is not aligned to them");
  const auto local = reinterpret_cast<uint64_t>(w.local.data());
  if (i.kind == kGeneric && address >= local && address + bytes <= local + w.local.size()) {
    return reinterpret_cast<char*>(address);
  }
  if (i.kind == kGlobal || i.kind == kGeneric) return w.block->global_at(address, bytes);
  return w.block->shared_at(static_cast<uint32_t>(address), bytes, bytes);
}

// Registers, then the base of the address.
void load(Warp& w, const Instruction& i, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t address = address_of(w, i, i.registers[i.count], lane);
    const char* from = place_of(w, i, address);
    if (i.kind == kShared) w.block->read(w, lane, static_cast<uint32_t>(address), i.bytes * i.count);
    for (int k = 0; k < i.count; ++k) {
      const Register r = i.registers[k];
      uint64_t value = 0;
      std::memcpy(&value, from + k * i.bytes, i.bytes);
      if (i.is_signed)
        value = static_cast<uint64_t>(static_cast<int64_t>(value << (64 - 8 * i.bytes)) >> (64 - 8 * i.bytes));
      std::memcpy(w.of<char>(r) + lane * r.bytes, &value, r.bytes);
    }
  }
}

// The base of the address, then registers.
void store(Warp& w, const Instruction& i, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t address = address_of(w, i, i.registers[0], lane);
    char* to = place_of(w, i, address);
    char written[16];
    for (int k = 0; k < i.count; ++k) {
      const Register r = i.registers[k + 1];
      std::memcpy(written + k * i.bytes, w.of<char>(r) + lane * r.bytes, i.bytes);
    }
    if (i.kind == kShared) {
      w.block->write(w, lane, static_cast<uint32_t>(address), written, i.bytes * i.count);
    } else {
      std::memcpy(to, written, i.bytes * i.count);
    }
  }
}

// The generic address of a thread's own memory, or of a parameter.
template <bool kOfParameter>
void find_generic(Warp& w, const Instruction& i, Mask mask) {
  const size_t bytes = w.local.size() / kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const char* base = kOfParameter ? w.block->parameters : w.local.data() + lane * bytes;
    w.of<uint64_t>(i.registers[0])[lane] = reinterpret_cast<uint64_t>(base) + w.of<uint64_t>(i.registers[1])[lane];
  }
}

enum Change { kAdd, kOr, kAnd, kXor, kMin, kMax };

template <class U>
U changed(U a, U b, int32_t how, bool is_signed) {
  using S = std::make_signed_t<U>;
  const bool less = is_signed ? static_cast<S>(a) < static_cast<S>(b) : a < b;
  return how == kAdd             ? a + b
         : how == kOr            ? a | b
         : how == kAnd           ? a & b
         : how == kXor           ? a ^ b
         : (how == kMin) == less ? a
                                 : b;
}

// d, base, b: in shared memory. No race with another of its kind.
template <class U>
void change(Warp& w, const Instruction& i, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto address = static_cast<uint32_t>(address_of(w, i, i.registers[1], lane));
    char* place = w.block->shared_at(address, sizeof(U), sizeof(U));
    U value = 0;
    std::memcpy(&value, place, sizeof value);
    if (i.registers[0].bytes != 0) w.of<U>(i.registers[0])[lane] = value;
    value = changed(value, w.of<U>(i.registers[2])[lane], i.kind, i.is_signed);
    std::memcpy(place, &value, sizeof value);
  }
}

// shared base, global base, bytes, and bytes that are read where it is said.
void copy_later(Warp& w, const Instruction& i, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto number = [&](size_t k) { return static_cast<int>(w.of<uint32_t>(i.registers[k])[lane]); };
    const int bytes = number(2), bytes_read = i.registers.size() > 3 ? number(3) : bytes;
    const auto to = w.of<uint32_t>(i.registers[0])[lane] + static_cast<uint32_t>(i.offset);
    const uint64_t from = w.of<uint64_t>(i.registers[1])[lane] + static_cast<uint64_t>(i.target);
    if (bytes_read > bytes || bytes_read < 0) throw Failure("a copy reads more than it writes");
    if (from % bytes != 0) throw Failure("a copy is not aligned to its size");
    const char* source = bytes_read > 0 ? w.block->global_at(from, bytes_read) : nullptr;
    char missing[16];
    std::fill_n(missing, 16, '\xFF');  // until it arrives
    w.block->write(w, lane, to, missing, bytes);
    auto& groups = w.copies[lane];
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, bytes, bytes_read, source, w.thread(lane)});
  }
}

void close_copies(Warp& w, const Instruction&, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& groups = w.copies[lane];
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
  }
}

void wait_for_copies(Warp& w, const Instruction& i, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& groups = w.copies[lane];
    const size_t newest = w.of<uint32_t>(i.registers[0])[lane];
    while (groups.size() > newest + 1) {
      for (const Copy& copy : groups.front()) {
        char arrived[16] = {};
        if (copy.bytes_read > 0) std::memcpy(arrived, copy.from, copy.bytes_read);
        w.block->write(w, lane, copy.to, arrived, copy.bytes);
      }
      groups.erase(groups.begin());
    }
  }
}

void show(Warp& w, const Instruction&, Mask mask) {
  if (mask == w.alive) w.shown = w.block->phase;
  for (Touch& touch : w.block->touches) {
    if (touch.is_hidden && touch.writer / kLanes == w.index && mask >> touch.writer % kLanes & 1)
      touch.is_hidden = false;
  }
}

void nothing(Warp&, const Instruction&, Mask) {}

Barrier& barrier_at(Warp& w, const Instruction& i, int lane, size_t k) {
  const uint32_t address = w.of<uint32_t>(i.registers[k])[lane] + static_cast<uint32_t>(i.offset);
  w.block->shared_at(address, 8, 8);
  const auto found = w.block->barriers.find(address);
  if (found == w.block->barriers.end()) throw Failure("a barrier is used that was not started");
  return found->second;
}

int only_lane(Mask mask) {
  if (std::popcount(mask) != 1) throw Failure("more than one thread does what one should: barriers and boxes");
  return std::countr_zero(mask);
}

void start_barrier(Warp& w, const Instruction& i, Mask mask) {
  const int lane = only_lane(mask);
  const uint32_t address = w.of<uint32_t>(i.registers[0])[lane] + static_cast<uint32_t>(i.offset);
  w.block->shared_at(address, 8, 8);
  if (w.of<uint32_t>(i.registers[1])[lane] != 1) throw Failure("a barrier is for one thread here");
  if (!w.block->barriers.emplace(address, Barrier()).second) throw Failure("a barrier is started that was not ended");
}

void end_barrier(Warp& w, const Instruction& i, Mask mask) {
  const int lane = only_lane(mask);
  if (barrier_at(w, i, lane, 0).expected >= 0) throw Failure("a barrier ends within a round");
  w.block->barriers.erase(w.of<uint32_t>(i.registers[0])[lane] + static_cast<uint32_t>(i.offset));
}

// state, barrier, bytes
void expect_bytes(Warp& w, const Instruction& i, Mask mask) {
  const int lane = only_lane(mask);
  Barrier& barrier = barrier_at(w, i, lane, 1);
  if (barrier.expected >= 0) throw Failure("a round of a barrier begins within another");
  barrier.expected = w.of<uint32_t>(i.registers[2])[lane];
}

int64_t bytes_of(const TensorMap& map) { return int64_t{2} * map.box_width * map.box_height; }

// shared base, map, column, row, barrier
void copy_box(Warp& w, const Instruction& i, Mask mask) {
  const int lane = only_lane(mask);
  const auto at = w.of<uint32_t>(i.registers[0])[lane];
  Box box = {at,
             {},
             static_cast<int>(w.of<uint32_t>(i.registers[3])[lane]),
             static_cast<int>(w.of<uint32_t>(i.registers[2])[lane])};
  const auto* map = reinterpret_cast<const char*>(w.of<uint64_t>(i.registers[1])[lane]);
  if (map < w.block->parameters || map > w.block->parameters + 4096) throw Failure("a tensor map is no parameter");
  std::memcpy(&box.map, map, sizeof box.map);
  const auto bytes = static_cast<int>(bytes_of(box.map));
  char* place = w.block->shared_at(at, bytes, 1024);
  for (uint32_t b = at - kWindow; b < at - kWindow + bytes; ++b) {
    const Touch& touch = w.block->touches[b];
    if (w.block->is_hidden(w, b)) throw Failure("a box is copied over what was written without a fence");
    const bool recent = touch.read_warp != -1 && touch.read_phase == w.block->phase;
    if (recent && touch.reader != w.thread(lane)) throw Failure("a box is copied over what others may still read");
  }
  std::memset(place, 0xFF, bytes);
  barrier_at(w, i, lane, 4).boxes.push_back(box);
}

// p, barrier, parity
void try_wait(Warp& w, const Instruction& i, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Barrier& barrier = barrier_at(w, i, lane, 1);
    const bool waits = barrier.round % 2 == w.of<uint32_t>(i.registers[2])[lane];
    if (waits && barrier.expected >= 0) arrive(*w.block, barrier);
    w.of<Predicate>(i.registers[0])[lane] = barrier.round % 2 != w.of<uint32_t>(i.registers[2])[lane];
  }
}

}  // namespace

void arrive(Block& block, Barrier& barrier) {
  int64_t bytes = 0;
  for (const Box& box : barrier.boxes) bytes += bytes_of(box.map);
  if (bytes > barrier.expected) throw Failure("a barrier gets more bytes than it expects");
  if (bytes < barrier.expected) return;  // more boxes are to be begun
  for (const Box& box : barrier.boxes) {
    for (uint32_t r = 0; r < box.map.box_height; ++r) {
      for (uint32_t c = 0; c < box.map.box_width; ++c) {
        const uint64_t row = box.row + r, column = box.column + c;
        uint16_t element = 0;
        if (row < box.map.height && column < box.map.width) {
          std::memcpy(&element,
                      block.global_at(reinterpret_cast<uint64_t>(box.map.base) + row * box.map.stride + 2 * column, 2),
                      2);
        }
        uint32_t address = box.to + 128 * r + 2 * c;
        address ^= (address >> 7 & 7) << 4;
        std::memcpy(block.shared_at(address, 2, 2), &element, 2);
        for (uint32_t b = 0; b < 2; ++b) block.touches[address - kWindow + b] = {};
      }
    }
  }
  barrier = {barrier.round + 1};
}

bool find_memory(const std::string& name, Instruction& instruction, std::vector<uint32_t>& widths) {
  const std::map<std::string, std::pair<Run, std::vector<uint32_t>>> named = {
      {"cvta.local.u64", {find_generic<false>, {8, 8}}},
      {"cvta.param.u64", {find_generic<true>, {8, 8}}},
      {"cp.async.cg.shared.global", {copy_later, {4, 8, 4, 4}}},
      {"cp.async.ca.shared.global", {copy_later, {4, 8, 4, 4}}},
      {"cp.async.commit_group", {close_copies, {}}},
      {"cp.async.wait_group", {wait_for_copies, {4}}},
      {"fence.proxy.async.shared::cta", {show, {}}},
      {"fence.mbarrier_init.release.cluster", {nothing, {}}},
      {"mbarrier.init.shared::cta.b64", {start_barrier, {4, 4}}},
      {"mbarrier.inval.shared::cta.b64", {end_barrier, {4}}},
      {"mbarrier.arrive.expect_tx.shared::cta.b64", {expect_bytes, {0, 4, 4}}},
      {"mbarrier.try_wait.parity.shared::cta.b64", {try_wait, {1, 4, 4}}},
      {"cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes", {copy_box, {4, 8, 4, 4, 4}}},
  };
  if (const auto found = named.find(name); found != named.end()) {
    instruction.run = found->second.first;
    widths = found->second.second;
    return true;
  }
  const auto parts = parts_of(name);
  const std::vector<std::string> changes = {"add", "or", "and", "xor", "min", "max"};
  if (parts.size() == 4 && parts[0] == "atom" && parts[1] == "shared") {
    const bool is_wide = parts[3].ends_with("64");
    if (!is_wide && !parts[3].ends_with("32")) return false;
    const auto found = std::find(changes.begin(), changes.end(), parts[2]);
    if (found == changes.end()) return false;
    instruction.run = is_wide ? change<uint64_t> : change<uint32_t>;
    instruction.kind = static_cast<int32_t>(found - changes.begin());
    instruction.is_signed = parts[3][0] == 's';
    widths = {0, 0, is_wide ? 8u : 4u};
    return true;
  }
  if (parts[0] != "ld" && parts[0] != "st") return false;
  instruction.run = parts[0] == "ld" ? load : store;
  instruction.kind = kGeneric;
  for (size_t k = 1; k < parts.size(); ++k) {
    const std::string& part = parts[k];
    if (part == "global") {
      instruction.kind = kGlobal;
    } else if (part == "shared" || part == "shared::cta") {
      instruction.kind = kShared;
    } else if (part == "param") {
      instruction.kind = kParameters;
    } else if (part == "v2" || part == "v4") {
      instruction.count = part[1] - '0';
    } else if (k + 1 == parts.size()) {
      instruction.bytes = std::stoi(part.substr(1)) / 8;
      instruction.is_signed = part[0] == 's';
    } else if (!part.starts_with("L1::") && part != "nc") {
      return false;
    }
  }
  widths.assign(instruction.count + 1, 0);  // of whatever width their registers have
  if (parts[0] == "st") {
    for (int k = 0; k < instruction.count; ++k) widths[k + 1] = std::max(instruction.bytes, 2);
  }
  return true;
}

}  // namespace ptx
