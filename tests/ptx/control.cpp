// Branches, barriers, and what the lanes of a warp say to each other.
#include <algorithm>
#include <limits>

#include "machine.h"

namespace ptx {
namespace {

enum Way { kBfly, kUp, kDown, kIdx };

// d (or d and a predicate), a, b, clamp and segment, members
void shuffle(Warp& w, const Instruction& i, Mask mask) {
  const size_t first = i.registers.size() - 5;  // 1 where there is a predicate
  const Register a = i.registers[first + 1];
  uint32_t offered[kLanes], taken[kLanes];
  bool inside[kLanes];
  std::memcpy(offered, w.of<uint32_t>(a), sizeof offered);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const int b = static_cast<int>(w.of<uint32_t>(i.registers[first + 2])[lane] & 31);
    const uint32_t c = w.of<uint32_t>(i.registers[first + 3])[lane];
    const Mask members = w.of<uint32_t>(i.registers[first + 4])[lane];
    if ((members & w.alive & ~mask) != 0) throw Failure("a lane that takes part in a shuffle is elsewhere");
    const int clamp = c & 31, segment = c >> 8 & 31;
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    int source = lane;
    if (i.kind == kUp) source = lane - b, inside[lane] = source >= most;
    if (i.kind == kDown) source = lane + b, inside[lane] = source <= most;
    if (i.kind == kBfly) source = lane ^ b, inside[lane] = source <= most;
    if (i.kind == kIdx) source = least | (b & ~segment), inside[lane] = source <= most;
    if (!inside[lane]) source = lane;
    if (!(mask >> source & 1)) throw Failure("a shuffle reads from a lane that is not there");
    taken[lane] = offered[source];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    w.of<uint32_t>(i.registers[0])[lane] = taken[lane];
    if (first == 1) w.of<Predicate>(i.registers[1])[lane] = inside[lane];
  }
}

// d, a, members
template <class T, auto f>
void reduce(Warp& w, const Instruction& i, Mask mask) {
  T result{};
  bool is_first = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (w.of<uint32_t>(i.registers[2])[lane] != mask)
      throw Failure("lanes that take part in a reduction are elsewhere");
    const T a = w.of<T>(i.registers[1])[lane];
    result = is_first ? a : f(result, a);
    is_first = false;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) w.of<T>(i.registers[0])[lane] = result;
  }
}

enum Vote { kBallot, kAny, kAll };

// d, p, members
void vote(Warp& w, const Instruction& i, Mask mask) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Mask members = w.of<uint32_t>(i.registers[2])[lane];
    if ((members & w.alive & ~mask) != 0) throw Failure("a lane that takes part in a vote is elsewhere");
    ballot |= static_cast<uint32_t>(bool{w.of<Predicate>(i.registers[1])[lane]}) << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (i.kind == kBallot) w.of<uint32_t>(i.registers[0])[lane] = ballot;
    if (i.kind == kAny) w.of<Predicate>(i.registers[0])[lane] = ballot != 0;
    if (i.kind == kAll) w.of<Predicate>(i.registers[0])[lane] = ballot == mask;
  }
}

void warp_barrier(Warp& w, const Instruction& i, Mask mask) {
  if ((w.of<uint32_t>(i.registers[0])[std::countr_zero(mask)] & w.alive & ~mask) != 0) {
    throw Failure("a lane is not at the barrier of its warp");
  }
  ++w.phase;
}

void block_barrier(Warp& w, const Instruction& i, Mask mask) {
  w.require_all(mask);
  w.waits = &i;
}

void branch(Warp& w, const Instruction& i, Mask mask) {
  if (!w.is_apart && mask == w.alive) {
    w.at = i.target;
    return;
  }
  if (!w.is_apart) {
    w.is_apart = true;
    for (int32_t& place : w.places) place = w.at;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) w.places[lane] = i.target;
  }
}

void leave(Warp& w, const Instruction&, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (const auto& group : w.copies[lane]) {
      if (!group.empty()) throw Failure("a thread ends before its copies were waited for");
    }
  }
  if (!w.products.empty()) throw Failure("a warp ends before its products were waited for");
  w.alive &= ~mask;
}

}  // namespace

void release(Block& block) {
  bool any = false;
  for (Warp& w : block.warps) {
    if (!w.waits || w.waits->registers.size() < 3) continue;  // d, barrier, p
    for (int lane = 0; lane < kLanes; ++lane)
      any |= (w.alive >> lane & 1) && w.of<Predicate>(w.waits->registers[2])[lane];
  }
  for (Warp& w : block.warps) {
    if (!w.waits) continue;
    for (int lane = 0; lane < kLanes && w.waits->registers.size() >= 3; ++lane) {
      w.of<Predicate>(w.waits->registers[0])[lane] = any;
    }
    w.waits = nullptr;
  }
  ++block.phase;
}

bool find_control(const std::string& name, Instruction& instruction, std::vector<uint32_t>& widths) {
  const auto is = [&](Run run, std::vector<uint32_t> of, int kind = 0) {
    instruction.run = run, widths = std::move(of), instruction.kind = kind;
    instruction.meets = run != branch && run != leave;
    return true;
  };
  const bool tells = instruction.registers.size() == 6;  // a shuffle that says whether its source was inside
  const std::vector<uint32_t> shuffled =
      tells ? std::vector<uint32_t>{4, 1, 4, 4, 4, 4} : std::vector<uint32_t>{4, 4, 4, 4, 4};
  if (name == "bra" || name == "bra.uni") return is(branch, {});
  if (name == "ret" || name == "exit") return is(leave, {});
  if (name == "bar.sync") return is(block_barrier, {4});
  if (name == "bar.red.or.pred") return is(block_barrier, {1, 4, 1});
  if (name == "bar.warp.sync") return is(warp_barrier, {4});
  if (name == "shfl.sync.bfly.b32") return is(shuffle, shuffled, kBfly);
  if (name == "shfl.sync.up.b32") return is(shuffle, shuffled, kUp);
  if (name == "shfl.sync.down.b32") return is(shuffle, shuffled, kDown);
  if (name == "shfl.sync.idx.b32") return is(shuffle, shuffled, kIdx);
  if (name == "vote.sync.ballot.b32") return is(vote, {4, 1, 4}, kBallot);
  if (name == "vote.sync.any.pred") return is(vote, {1, 1, 4}, kAny);
  if (name == "vote.sync.all.pred") return is(vote, {1, 1, 4}, kAll);
  using S = int32_t;
  using U = uint32_t;
  if (name == "redux.sync.add.s32") return is(reduce<U, [](U a, U b) { return a + b; }>, {4, 4, 4});
  if (name == "redux.sync.max.s32") return is(reduce<S, [](S a, S b) { return std::max(a, b); }>, {4, 4, 4});
  if (name == "redux.sync.min.s32") return is(reduce<S, [](S a, S b) { return std::min(a, b); }>, {4, 4, 4});
  if (name == "redux.sync.max.u32") return is(reduce<U, [](U a, U b) { return std::max(a, b); }>, {4, 4, 4});
  if (name == "redux.sync.min.u32") return is(reduce<U, [](U a, U b) { return std::min(a, b); }>, {4, 4, 4});
  if (name == "redux.sync.or.b32") return is(reduce<U, [](U a, U b) { return a | b; }>, {4, 4, 4});
  if (name == "redux.sync.and.b32") return is(reduce<U, [](U a, U b) { return a & b; }>, {4, 4, 4});
  return false;
}

}  // namespace ptx
