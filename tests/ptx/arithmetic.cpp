// What each lane does alone: numbers, predicates and conversions.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <tuple>
#include <type_traits>

#include "machine.h"

namespace ptx {
namespace {

struct Found {
  Run run;
  std::vector<uint32_t> widths;
};

template <class R, auto f, class... A, size_t... I>
void apply(Warp& w, const Instruction& i, Mask mask, std::index_sequence<I...>) {
  R* d = w.of<R>(i.registers[0]);
  const std::tuple<const A*...> a{w.of<A>(i.registers[I + 1])...};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) d[lane] = static_cast<R>(f(std::get<I>(a)[lane]...));
  }
}

template <class R, auto f, class... A>
void each(Warp& w, const Instruction& i, Mask mask) {
  apply<R, f, A...>(w, i, mask, std::index_sequence_for<A...>());
}

std::map<std::string, Found>& table() {
  static std::map<std::string, Found> all;
  return all;
}

template <class R, auto f, class... A>
void add(const std::string& name) {
  table()[name] = {each<R, f, A...>, {sizeof(R), sizeof(A)...}};
}

template <class T>
constexpr int kBits = 8 * sizeof(T);

template <class U>
void add_bits(const std::string& type) {
  using S = std::make_signed_t<U>;
  add<U, [](U a, U b) { return a & b; }, U, U>("and." + type);
  add<U, [](U a, U b) { return a | b; }, U, U>("or." + type);
  add<U, [](U a, U b) { return a ^ b; }, U, U>("xor." + type);
  add<U, [](U a) { return ~a; }, U>("not." + type);
  add<U, [](U a) { return a; }, U>("mov." + type);
  add<U, [](U a, U b, bool c) { return c ? a : b; }, U, U, Predicate>("selp." + type);
  add<U, [](U a, uint32_t n) { return n >= kBits<U> ? U(0) : U(a << n); }, U, uint32_t>("shl." + type);
  add<U, [](U a, uint32_t n) { return n >= kBits<U> ? U(0) : U(a >> n); }, U, uint32_t>("shr." + type);
  add<uint32_t, [](U a) { return std::popcount(a); }, U>("popc." + type);
  add<uint32_t, [](U a) { return std::countl_zero(a); }, U>("clz." + type);
  add<U,
      [](U a, U b, uint32_t at, uint32_t n) {  // a in b
        const U ones = n >= kBits<U> ? U(-1) : U((U(1) << n) - 1), field = at >= kBits<U> ? U(0) : U(ones << at);
        return U((b & ~field) | ((at >= kBits<U> ? U(0) : U(a << at)) & field));
      },
      U, U, uint32_t, uint32_t>("bfi." + type);
  (void)sizeof(S);
}

template <class T>
void add_whole(const std::string& type) {
  using U = std::make_unsigned_t<T>;
  add<U, [](U a, U b) { return U(a + b); }, U, U>("add." + type);
  add<U, [](U a, U b) { return U(a - b); }, U, U>("sub." + type);
  add<U, [](U a, U b) { return U(uint64_t(a) * b); }, U, U>("mul.lo." + type);
  add<U, [](U a, U b, U c) { return U(uint64_t(a) * b + c); }, U, U, U>("mad.lo." + type);
  add<U, [](U a) { return U(0 - a); }, U>("neg." + type);
  add<T, [](T a, T b) { return std::min(a, b); }, T, T>("min." + type);
  add<T, [](T a, T b) { return std::max(a, b); }, T, T>("max." + type);
  add<T, [](T a, T b) { return b == 0 ? T(-1) : T(a / b); }, T, T>("div." + type);
  add<T, [](T a, T b) { return b == 0 ? a : T(a % b); }, T, T>("rem." + type);
  add<T, [](T a) { return a; }, T>("mov." + type);
  add<T, [](T a, T b, bool c) { return c ? a : b; }, T, T, Predicate>("selp." + type);
  add<T, [](T a, uint32_t n) { return T(a >> std::min<uint32_t>(n, kBits<T> - 1)); }, T, uint32_t>("shr." + type);
  if constexpr (std::is_unsigned_v<T>) {
    add<T, [](T a, uint32_t n) { return n >= kBits<T> ? T(0) : T(a >> n); }, T, uint32_t>("shr." + type);
  } else {
    add<T, [](T a) { return T(a < 0 ? U(0) - U(a) : U(a)); }, T>("abs." + type);
  }
  if constexpr (sizeof(T) == 4) {
    using W = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    add<T, [](T a, T b) { return T(W(a) * b >> 32); }, T, T>("mul.hi." + type);
    add<W, [](T a, T b) { return W(a) * b; }, T, T>("mul.wide." + type);
    add<W, [](T a, T b, W c) { return W(uint64_t(W(a) * b) + uint64_t(c)); }, T, T, W>("mad.wide." + type);
  }
  if constexpr (sizeof(T) == 8) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    add<T, [](T a, T b) { return T(W(a) * b >> 64); }, T, T>("mul.hi." + type);
  }
  if constexpr (sizeof(T) >= 4) {
    add<T,
        [](T a, uint32_t at, uint32_t n) {
          at &= 255, n &= 255;
          T bits = 0;
          const uint32_t top = std::min<uint32_t>(at + n - 1, kBits<T> - 1);
          const bool sign = std::is_signed_v<T> && n != 0 && (U(a) >> top & 1);
          for (uint32_t k = 0; k < kBits<T>; ++k) {
            const bool bit = (k < n && at + k < kBits<T>) ? (U(a) >> (at + k) & 1) : sign;
            bits = T(U(bits) | U(bit) << k);
          }
          return bits;
        },
        T, uint32_t, uint32_t>("bfe." + type);
  }
}

// d = a compares with b; and with a third predicate, where the name has .and, .or or .xor.
template <class T, auto f>
void add_comparison(const std::string& name, const std::string& type) {
  add<Predicate, f, T, T>("setp." + name + "." + type);
  add<Predicate, [](T a, T b, bool c) { return f(a, b) && c; }, T, T, Predicate>("setp." + name + ".and." + type);
  add<Predicate, [](T a, T b, bool c) { return f(a, b) || c; }, T, T, Predicate>("setp." + name + ".or." + type);
  add<Predicate, [](T a, T b, bool c) { return f(a, b) != c; }, T, T, Predicate>("setp." + name + ".xor." + type);
}

// A 16-bit float in a register, read as fp32.
template <bool kIsHalf>
struct Narrow {
  uint16_t bits;
  operator float() const { return half_to_float(bits, kIsHalf); }
};

template <class T>
void add_comparisons(const std::string& type) {
  add_comparison<T, [](T a, T b) { return a == b; }>("eq", type);
  add_comparison<T, [](T a, T b) { return a != b && a == a && b == b; }>("ne", type);
  add_comparison<T, [](T a, T b) { return a < b; }>("lt", type);
  add_comparison<T, [](T a, T b) { return a <= b; }>("le", type);
  add_comparison<T, [](T a, T b) { return (a > b); }>("gt", type);
  add_comparison<T, [](T a, T b) { return (a >= b); }>("ge", type);
  if constexpr (!std::is_integral_v<T>) {  // true where a number is missing
    add_comparison<T, [](T a, T b) { return !(a != b && a == a && b == b); }>("equ", type);
    add_comparison<T, [](T a, T b) { return !(a == b); }>("neu", type);
    add_comparison<T, [](T a, T b) { return !(a >= b); }>("ltu", type);
    add_comparison<T, [](T a, T b) { return !(a > b); }>("leu", type);
    add_comparison<T, [](T a, T b) { return !(a <= b); }>("gtu", type);
    add_comparison<T, [](T a, T b) { return !(a < b); }>("geu", type);
    add_comparison<T, [](T a, T b) { return a == a && b == b; }>("num", type);
    add_comparison<T, [](T a, T b) { return a != a || b != b; }>("nan", type);
  }
}

// Bytes of {b, a} by the nibbles of a selector; one of 8 or more repeats its byte's sign.
uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t nibble = selector >> 4 * k & 15;
    uint32_t byte = both >> (nibble & 7) * 8 & 0xFF;
    if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * k;
  }
  return result;
}

float flush(float a) { return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.0f, a) : a; }

float larger(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
}

template <class T>
T saturated(float a) {  // towards zero
  if (a != a) return 0;
  const double whole = std::trunc(static_cast<double>(a));
  if (whole <= static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (whole >= static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(whole);
}

uint16_t to_bf16(float a) {
  uint32_t bits = std::bit_cast<uint32_t>(a);
  if (a != a) return 0x7FFF;
  bits += 0x7FFF + (bits >> 16 & 1);
  return static_cast<uint16_t>(bits >> 16);
}

uint16_t to_fp16(float a) { return a != a ? 0x7FFF : std::bit_cast<uint16_t>(static_cast<_Float16>(a)); }

void add_floats() {
  using F = float;
  for (const std::string round : {"", ".rn"}) {
    add<F, [](F a, F b) { return a + b; }, F, F>("add" + round + ".f32");
    add<F, [](F a, F b) { return a - b; }, F, F>("sub" + round + ".f32");
    add<F, [](F a, F b) { return a * b; }, F, F>("mul" + round + ".f32");
    add<F, [](F a, F b) { return flush(flush(a) + flush(b)); }, F, F>("add" + round + ".ftz.f32");
    add<F, [](F a, F b) { return flush(flush(a) - flush(b)); }, F, F>("sub" + round + ".ftz.f32");
    add<F, [](F a, F b) { return flush(flush(a) * flush(b)); }, F, F>("mul" + round + ".ftz.f32");
  }
  add<F, [](F a, F b, F c) { return std::fma(a, b, c); }, F, F, F>("fma.rn.f32");
  add<F, [](F a, F b, F c) { return flush(std::fma(flush(a), flush(b), flush(c))); }, F, F, F>("fma.rn.ftz.f32");
  add<F, [](F a, F b) { return larger(a, b); }, F, F>("max.f32");
  add<F, [](F a, F b) { return -larger(-a, -b); }, F, F>("min.f32");
  add<F, [](F a, F b) { return a != a || b != b ? NAN : larger(a, b); }, F, F>("max.NaN.f32");
  add<F, [](F a, F b) { return a != a || b != b ? NAN : -larger(-a, -b); }, F, F>("min.NaN.f32");
  add<F, [](F a) { return -a; }, F>("neg.f32");
  add<F, [](F a) { return std::fabs(a); }, F>("abs.f32");
  add<F, [](F a) { return std::sqrt(a); }, F>("sqrt.rn.f32");
  add<F, [](F a) { return flush(std::sqrt(flush(a))); }, F>("sqrt.approx.ftz.f32");
  add<F, [](F a) { return flush(static_cast<F>(1.0 / std::sqrt(double{flush(a)}))); }, F>("rsqrt.approx.ftz.f32");
  add<F, [](F a) { return static_cast<F>(1.0 / std::sqrt(double{a})); }, F>("rsqrt.approx.f32");
  add<F, [](F a) { return flush(std::exp2(flush(a))); }, F>("ex2.approx.ftz.f32");
  add<F, [](F a) { return std::exp2(a); }, F>("ex2.approx.f32");
  add<F, [](F a) { return std::log2(flush(a)); }, F>("lg2.approx.ftz.f32");
  add<F, [](F a) { return std::log2(a); }, F>("lg2.approx.f32");
  add<F, [](F a, F b) { return a / b; }, F, F>("div.rn.f32");
  add<F, [](F a, F b) { return a / b; }, F, F>("div.full.f32");
  add<F, [](F a) { return 1.0f / a; }, F>("rcp.rn.f32");
  add<F, [](F a) { return a; }, F>("mov.f32");
  add<F, [](F a, F b, bool c) { return c ? a : b; }, F, F, Predicate>("selp.f32");
  add<F, [](F a) { return std::ceil(flush(a)); }, F>("cvt.rpi.ftz.f32.f32");
  add<F, [](F a) { return std::floor(flush(a)); }, F>("cvt.rmi.ftz.f32.f32");
  add<F, [](F a) { return std::ceil(a); }, F>("cvt.rpi.f32.f32");
  add<F, [](F a) { return std::floor(a); }, F>("cvt.rmi.f32.f32");
  add<int32_t, [](F a) { return saturated<int32_t>(a); }, F>("cvt.rzi.s32.f32");
  add<int64_t, [](F a) { return saturated<int64_t>(a); }, F>("cvt.rzi.s64.f32");
  add<uint32_t, [](F a) { return saturated<uint32_t>(a); }, F>("cvt.rzi.u32.f32");
  add<F, [](int32_t a) { return static_cast<F>(a); }, int32_t>("cvt.rn.f32.s32");
  add<F, [](uint32_t a) { return static_cast<F>(a); }, uint32_t>("cvt.rn.f32.u32");
  add<F, [](int64_t a) { return static_cast<F>(a); }, int64_t>("cvt.rn.f32.s64");
  add<F, [](uint64_t a) { return static_cast<F>(a); }, uint64_t>("cvt.rn.f32.u64");
  add<F, [](uint16_t a) { return half_to_float(a, false); }, uint16_t>("cvt.f32.bf16");
  add<F, [](uint16_t a) { return half_to_float(a, true); }, uint16_t>("cvt.f32.f16");
  add<uint16_t, [](F a) { return to_bf16(a); }, F>("cvt.rn.bf16.f32");
  add<uint16_t, [](F a) { return to_fp16(a); }, F>("cvt.rn.f16.f32");
  add<uint32_t, [](F high, F low) { return uint32_t{to_bf16(high)} << 16 | to_bf16(low); }, F, F>("cvt.rn.bf16x2.f32");
  add<uint32_t, [](F high, F low) { return uint32_t{to_fp16(high)} << 16 | to_fp16(low); }, F, F>("cvt.rn.f16x2.f32");
  add<uint16_t, [](uint16_t a) { return static_cast<uint16_t>(a & 0x7FFF); }, uint16_t>("abs.bf16");
  add<uint16_t, [](uint16_t a) { return static_cast<uint16_t>(a & 0x7FFF); }, uint16_t>("abs.f16");
  add_comparisons<F>("f32"), add_comparisons<Narrow<false>>("bf16"), add_comparisons<Narrow<true>>("f16");
}

void fill() {
  add_bits<uint16_t>("b16"), add_bits<uint32_t>("b32"), add_bits<uint64_t>("b64");
  add_whole<int16_t>("s16"), add_whole<int32_t>("s32"), add_whole<int64_t>("s64");
  add_whole<uint16_t>("u16"), add_whole<uint32_t>("u32"), add_whole<uint64_t>("u64");
  add_comparisons<int16_t>("s16"), add_comparisons<int32_t>("s32"), add_comparisons<int64_t>("s64");
  add_comparisons<uint16_t>("u16"), add_comparisons<uint32_t>("u32"), add_comparisons<uint64_t>("u64");
  add_comparisons<uint16_t>("b16"), add_comparisons<uint32_t>("b32"), add_comparisons<uint64_t>("b64");
  add<Predicate, [](bool a, bool b) { return a && b; }, Predicate, Predicate>("and.pred");
  add<Predicate, [](bool a, bool b) { return a || b; }, Predicate, Predicate>("or.pred");
  add<Predicate, [](bool a, bool b) { return a != b; }, Predicate, Predicate>("xor.pred");
  add<Predicate, [](bool a) { return !a; }, Predicate>("not.pred");
  add<Predicate, [](bool a) { return a; }, Predicate>("mov.pred");
  add<uint32_t, permuted, uint32_t, uint32_t, uint32_t>("prmt.b32");
  add<uint64_t, [](uint64_t a) { return a; }, uint64_t>("cvta.to.global.u64");
  add_floats();
}

// Between whole numbers, either in a register that may be wider: count = bytes of the target, bytes = of the source.
void convert(Warp& w, const Instruction& i, Mask mask) {
  const Register to = i.registers[0], from = i.registers[1];
  const auto narrowed = [](uint64_t value, int bytes, bool is_signed) {
    const int spare = 64 - 8 * bytes;
    return is_signed ? static_cast<uint64_t>(static_cast<int64_t>(value << spare) >> spare) : value << spare >> spare;
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    uint64_t value = 0;
    std::memcpy(&value, w.of<char>(from) + lane * from.bytes, from.bytes);
    value = narrowed(narrowed(value, i.bytes, i.is_signed), i.count, i.kind);
    std::memcpy(w.of<char>(to) + lane * to.bytes, &value, to.bytes);
  }
}

// mov between a register and the parts that it is made of, the lowest first; a part without bytes is left out.
void pack(Warp& w, const Instruction& i, Mask mask) {
  const int parts = static_cast<int>(i.registers.size()) - 1;
  const bool splits = i.registers[parts].bytes > i.registers[1].bytes;
  const Register whole = i.registers[splits ? parts : 0];
  const uint32_t bytes = whole.bytes / parts;
  for (int part = 0; part < parts; ++part) {
    const Register r = i.registers[splits ? part : part + 1];
    if (r.bytes != 0 && r.bytes != bytes) throw Failure("a part of a register has another size than its share");
    for (int lane = 0; lane < kLanes && r.bytes != 0; ++lane) {
      if (!(mask >> lane & 1)) continue;
      char* own = w.of<char>(r) + lane * bytes;
      char* within = w.of<char>(whole) + lane * whole.bytes + part * bytes;
      std::memcpy(splits ? own : within, splits ? within : own, bytes);
    }
  }
}

}  // namespace

bool find_arithmetic(const std::string& name, Instruction& instruction, std::vector<uint32_t>& widths) {
  if (table().empty()) fill();
  if (name.starts_with("mov.") && instruction.registers.size() > 2) {
    instruction.run = pack;
    return true;
  }
  char to, from;
  if (int to_bits, from_bits, read = 0;
      std::sscanf(name.c_str(), "cvt.%c%d.%c%d%n", &to, &to_bits, &from, &from_bits, &read) == 4 &&
      read == static_cast<int>(name.size()) && (to == 's' || to == 'u') && (from == 's' || from == 'u')) {
    instruction.run = convert;
    instruction.count = to_bits / 8, instruction.kind = to == 's';
    instruction.bytes = from_bits / 8, instruction.is_signed = from == 's';
    return true;
  }
  const auto found = table().find(name);
  if (found == table().end()) return false;
  instruction.run = found->second.run;
  widths = found->second.widths;
  return true;
}

}  // namespace ptx
