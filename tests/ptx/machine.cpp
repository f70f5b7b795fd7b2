// Blocks of warps, their memory, and the loop that runs them; behind C functions, for ctypes.
#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <tuple>

namespace ptx {

char* Block::shared_at(uint32_t address, int bytes, int alignment) {
  if (address % alignment != 0)
    throw Failure("an access of shared memory is not aligned to " + std::to_string(alignment));
  if (address < kWindow || address + static_cast<uint64_t>(bytes) > kWindow + shared.size()) {
    throw Failure("an access of " + std::to_string(bytes) + " bytes at " + std::to_string(int64_t{address} - kWindow) +
                  " is outside of the " + std::to_string(shared.size()) + " bytes of shared memory");
  }
  return shared.data() + (address - kWindow);
}

void Block::read(const Warp& warp, int lane, uint32_t address, int bytes) {
  const int thread = warp.thread(lane);
  for (Touch* touch = &touches[address - kWindow]; bytes > 0; --bytes, ++touch) {
    if (touch->writer != -1 && touch->writer != thread && touch->write_phase == phase) {
      const bool ordered = touch->writer / kLanes == warp.index && touch->write_warp_phase < warp.phase;
      if (!ordered) throw Failure("a race: a thread reads what another wrote, with no barrier between");
    }
    const bool is_first = touch->read_warp == -1 || touch->read_phase != phase;
    touch->reader = is_first || touch->reader == thread ? thread : kMany;
    touch->read_warp = is_first || touch->read_warp == warp.index ? warp.index : kMany;
    touch->read_phase = phase;
    touch->read_warp_phase = warp.phase;
  }
}

void Block::write(const Warp& warp, int lane, uint32_t address, const char* from, int bytes) {
  char* place = shared_at(address, bytes, bytes);
  const int thread = warp.thread(lane);
  Touch* touch = &touches[address - kWindow];
  for (int b = 0; b < bytes; ++b, ++touch) {
    const bool again = touch->writer != -1 && touch->writer != thread && touch->write_phase == phase;
    if (again && place[b] != from[b]) {  // the same from several threads does no harm
      const bool ordered = touch->writer / kLanes == warp.index && touch->write_warp_phase < warp.phase;
      if (!ordered) throw Failure("a race: two threads write to one place, with no barrier between");
    }
    if (touch->read_warp != -1 && touch->reader != thread && touch->read_phase == phase) {
      const bool ordered = touch->read_warp == warp.index && touch->read_warp_phase < warp.phase;
      if (!ordered) throw Failure("a race: a thread writes to what another read, with no barrier between");
    }
    touch->writer = thread;
    touch->write_phase = phase;
    touch->write_warp_phase = warp.phase;
    touch->is_hidden = true;
    place[b] = from[b];
  }
}

char* Block::global_at(uint64_t address, int bytes) {
  const auto* place = reinterpret_cast<const char*>(address);
  for (const Range& range : ranges) {
    if (place >= range.begin && place + bytes <= range.end) return const_cast<char*>(place);
  }
  throw Failure("an access of global memory is outside of every argument");
}

// A fence may be the writer's, or, after a barrier, that of who begins the product.
bool Block::is_hidden(const Warp& warp, uint32_t byte) const {
  return touches[byte].is_hidden && touches[byte].write_phase >= warp.shown;
}

namespace {

constexpr int64_t kMost = int64_t{1} << 28;  // instructions of a block

struct Failed {
  std::string what;
  int32_t at;
};

struct Machine {
  Program program;
  std::vector<std::pair<int, Register>> specials;
  std::string failure;
};

enum Special { kTid, kCtaidX, kCtaidY, kCtaidZ, kNtid, kNctaidX, kNctaidY, kNctaidZ, kLane, kWarp };

// The lowest place of these lanes, and who else is there: so that those who went ahead are caught up with.
std::pair<int32_t, Mask> lowest(const Warp& w, Mask lanes) {
  int32_t at = INT32_MAX;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1) at = std::min(at, w.places[lane]);
  }
  Mask there = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (w.alive >> lane & 1 && w.places[lane] == at) there |= 1u << lane;
  }
  return {at, there};
}

void step(Warp& w, const Program& program) {
  int32_t at = w.at;
  Mask mask = w.alive;
  if (w.is_apart) {
    const bool all_wait = (w.alive & ~w.parked) == 0;  // not for each other: the first goes on as it is, if it may
    std::tie(at, mask) = lowest(w, all_wait ? w.alive : w.alive & ~w.parked);
    if (mask == w.alive) {
      w.is_apart = false;
    } else if (program.instructions.at(at).meets && !all_wait) {
      w.parked |= mask;
      return;
    }
    w.parked &= ~mask;
  }
  if (at >= static_cast<int32_t>(program.instructions.size())) throw Failed{"the program ends without ret", at};
  const Instruction& i = program.instructions[at];
  w.at = at + 1;
  if (w.is_apart) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) w.places[lane] = at + 1;
    }
  }
  if (i.guard >= 0) {
    const auto* guard = reinterpret_cast<const Predicate*>(w.registers.data() + i.guard);
    Mask passed = 0;
    for (int lane = 0; lane < kLanes; ++lane) passed |= static_cast<Mask>(bool{guard[lane]} != i.guard_is_not) << lane;
    mask &= passed;
  }
  if (mask == 0) return;
  try {
    i.run(w, i, mask);
  } catch (const Failure& failure) {
    throw Failed{failure.what(), at};
  }
}

void run_block(const Machine& machine, Block& block, int threads, const uint32_t (&of_grid)[6], std::mt19937* random) {
  const Program& program = machine.program;
  block.phase = 0;
  block.barriers.clear();
  std::fill(block.shared.begin(), block.shared.end(), '\xFF');
  std::fill(block.touches.begin(), block.touches.end(), Touch());
  block.warps.resize(threads / kLanes);
  for (int index = 0; index < threads / kLanes; ++index) {
    Warp& w = block.warps[index];
    std::vector<char> registers = std::move(w.registers);
    registers.assign(program.register_bytes, '\xFF');
    w = Warp();
    w.registers = std::move(registers);
    w.local.assign(kLanes * program.local_bytes, '\xFF');
    w.block = &block, w.index = index, w.alive = ~Mask{0};
    for (const auto& [r, value] : program.constants) {
      for (int lane = 0; lane < kLanes; ++lane) std::memcpy(w.of<char>(r) + lane * r.bytes, &value, r.bytes);
    }
    for (const auto& [kind, r] : machine.specials) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t own[] = {static_cast<uint32_t>(w.thread(lane)),
                                of_grid[0],
                                of_grid[1],
                                of_grid[2],
                                static_cast<uint32_t>(threads),
                                of_grid[3],
                                of_grid[4],
                                of_grid[5],
                                static_cast<uint32_t>(lane),
                                static_cast<uint32_t>(index)};
        w.of<uint32_t>(r)[lane] = own[kind];
      }
    }
  }
  int64_t left = kMost;
  while (true) {
    std::vector<Warp*> ready;
    bool any_waits = false;
    for (Warp& w : block.warps) {
      if (w.alive && !w.waits) ready.push_back(&w);
      any_waits |= w.waits != nullptr;
    }
    if (ready.empty() && !any_waits) break;
    if (ready.empty()) {
      release(block);
      continue;
    }
    if (random) std::shuffle(ready.begin(), ready.end(), *random);
    for (Warp* w : ready) {
      int64_t slice = random ? (*random)() % 2000 + 1 : 100'000;
      for (; slice > 0 && w->alive && !w->waits; --slice, --left) step(*w, program);
    }
    if (left < 0) throw Failed{"a block does not end", block.warps[0].at};
  }
  if (!block.barriers.empty()) throw Failed{"a block ends before its barriers", 0};
}

}  // namespace
}  // namespace ptx

using namespace ptx;

// code: for each instruction its name, guard (-1 = none), whether that is not, target, offset, and its operands, each
// (0, place, bytes) for a register or (1, value, 0) for a constant. Null where a name is unknown: see ptx_failure.
extern "C" void* ptx_load(const char* const* names, const int64_t* code, int64_t instructions, int64_t register_bytes,
                          int64_t local_bytes, const int64_t* specials, int64_t special_count) {
  auto* machine = new Machine;
  Program& program = machine->program;
  program.register_bytes = static_cast<uint32_t>(register_bytes);
  program.local_bytes = static_cast<uint32_t>(local_bytes);
  std::map<std::pair<uint32_t, uint64_t>, Register> constants;
  for (int64_t k = 0; k < special_count; ++k) {
    machine->specials.push_back({static_cast<int>(specials[2 * k]), {static_cast<uint32_t>(specials[2 * k + 1]), 4}});
  }
  for (int64_t k = 0; k < instructions && machine->failure.empty(); ++k) {
    const std::string name = names[code[0]];
    Instruction i;
    i.guard = static_cast<int32_t>(code[1]), i.guard_is_not = code[2] != 0;
    i.target = static_cast<int32_t>(code[3]), i.offset = code[4];
    const int64_t count = code[5];
    code += 6;
    for (int64_t o = 0; o < count; ++o) {
      i.registers.push_back({static_cast<uint32_t>(code[3 * o + 1]), static_cast<uint32_t>(code[3 * o + 2])});
    }
    std::vector<uint32_t> widths;
    const bool found = find_arithmetic(name, i, widths) || find_control(name, i, widths) ||
                       find_memory(name, i, widths) || find_tensor(name, i, widths);
    if (!found) {
      machine->failure = "there is no instruction " + name;
      break;
    }
    for (int64_t o = 0; o < count; ++o, code += 3) {
      const uint32_t width = o < static_cast<int64_t>(widths.size()) ? widths[o] : 0;
      Register& r = i.registers[o];
      if (code[0] == 1) {
        r.bytes = width == 0 ? 8 : width;
        const auto [place, is_new] =
            constants.try_emplace({r.bytes, static_cast<uint64_t>(code[1])}, Register{program.register_bytes, r.bytes});
        if (is_new) {
          program.constants.push_back({place->second, static_cast<uint64_t>(code[1])});
          program.register_bytes += kLanes * std::max(r.bytes, 2u);
        }
        r = place->second;
      } else if (width != 0 && width != r.bytes && i.run != nullptr && !name.starts_with("st.")) {
        machine->failure = name + ": operand " + std::to_string(o) + " has " + std::to_string(r.bytes) + " bytes";
      }
    }
    program.instructions.push_back(std::move(i));
  }
  return machine;
}

extern "C" const char* ptx_failure(void* machine) { return static_cast<Machine*>(machine)->failure.c_str(); }

extern "C" void ptx_free(void* machine) { delete static_cast<Machine*>(machine); }

// The number of the instruction that failed, -1 where none did. seed 0: warps in order; else in an order drawn from it.
extern "C" int64_t ptx_run(void* handle, const int64_t* grid, int64_t threads, int64_t shared, const char* parameters,
                           const int64_t* ranges, int64_t range_count, int64_t seed, bool backwards) {
  auto& machine = *static_cast<Machine*>(handle);
  Block block;
  block.shared.resize(shared);
  block.touches.resize(shared);
  block.parameters = parameters;
  for (int64_t k = 0; k < range_count; ++k) {
    block.ranges.push_back(
        {reinterpret_cast<const char*>(ranges[2 * k]), reinterpret_cast<const char*>(ranges[2 * k + 1])});
  }
  std::mt19937 random(static_cast<uint32_t>(seed));
  uint32_t at[6] = {
      0, 0, 0, static_cast<uint32_t>(grid[0]), static_cast<uint32_t>(grid[1]), static_cast<uint32_t>(grid[2])};
  try {
    const int64_t blocks = grid[0] * grid[1] * grid[2];
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t own = backwards ? blocks - 1 - i : i;
      at[0] = own % grid[0], at[1] = own / grid[0] % grid[1], at[2] = own / grid[0] / grid[1];
      run_block(machine, block, static_cast<int>(threads), at, seed ? &random : nullptr);
    }
  } catch (const Failed& failed) {
    machine.failure = failed.what;
    return failed.at;
  }
  return -1;
}
