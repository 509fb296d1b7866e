#include "instructions.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <unordered_map>

#include "interpreter.h"

namespace ptx {
namespace {

using Half = _Float16;
struct BFloat16 {
  uint16_t bits;
};

// ---- Values in slots -------------------------------------------------------------------------

template <class T>
T get(const Slot& slot, int lane) {
  T value;
  std::memcpy(&value, &slot[static_cast<size_t>(lane)], sizeof(T));
  return value;
}

// Integers with a sign are extended to 64 bits, all else to zeros.
template <class T>
void put(Slot& slot, int lane, T value) {
  uint64_t bits = 0;
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    bits = static_cast<uint64_t>(static_cast<int64_t>(value));
  } else {
    std::memcpy(&bits, &value, sizeof(T));
  }
  slot[static_cast<size_t>(lane)] = bits;
}

template <class Body>
void for_each_lane(uint32_t mask, const Body& body) {
  if (mask == kWholeWarp) {
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  } else {
    for (; mask; mask &= mask - 1) body(std::countr_zero(mask));
  }
}

Slot& operand(Warp& warp, const Instruction& instruction, int number) {
  return warp.slot(instruction.operands[static_cast<size_t>(number)]);
}

// ---- Arithmetic ------------------------------------------------------------------------------

template <class T, class R, auto compute>
void unary(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &a = operand(warp, n, 1);
  for_each_lane(mask, [&](int lane) { put<R>(to, lane, compute(get<T>(a, lane))); });
}

template <class T, class R, auto compute>
void binary(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &a = operand(warp, n, 1), &b = operand(warp, n, 2);
  for_each_lane(mask,
                [&](int lane) { put<R>(to, lane, compute(get<T>(a, lane), get<T>(b, lane))); });
}

template <class T, class R, auto compute>
void ternary(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &a = operand(warp, n, 1), &b = operand(warp, n, 2),
       &c = operand(warp, n, 3);
  for_each_lane(mask, [&](int lane) {
    put<R>(to, lane, compute(get<T>(a, lane), get<T>(b, lane), get<R>(c, lane)));
  });
}

template <class T>
void shift_left(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &a = operand(warp, n, 1), &b = operand(warp, n, 2);
  for_each_lane(mask, [&](int lane) {
    const auto by = get<uint32_t>(b, lane);
    const auto value = static_cast<uint64_t>(get<T>(a, lane));
    put<T>(to, lane, static_cast<T>(by >= 8 * sizeof(T) ? 0 : value << by));
  });
}

template <class T>
void shift_right(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &a = operand(warp, n, 1), &b = operand(warp, n, 2);
  constexpr uint32_t bits = 8 * sizeof(T);
  for_each_lane(mask, [&](int lane) {
    const auto by = get<uint32_t>(b, lane);
    const T value = get<T>(a, lane);
    T result = 0;
    if (by < bits) {
      result = static_cast<T>(value >> by);
    } else if (std::is_signed_v<T> && value < 0) {
      result = static_cast<T>(-1);
    }
    put<T>(to, lane, result);
  });
}

template <class T>
void divide(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &a = operand(warp, n, 1), &b = operand(warp, n, 2);
  for_each_lane(mask, [&](int lane) {
    const T divisor = get<T>(b, lane);
    if (divisor == 0) throw Fault("integer division by zero");
    put<T>(to, lane, static_cast<T>(get<T>(a, lane) / divisor));
  });
}

template <class T>
void select(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &a = operand(warp, n, 1), &b = operand(warp, n, 2),
       &which = operand(warp, n, 3);
  for_each_lane(mask, [&](int lane) {
    put<T>(to, lane, get<T>(which[static_cast<size_t>(lane)] & 1 ? a : b, lane));
  });
}

template <class T>
void insert_bits(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &field = operand(warp, n, 1), &base = operand(warp, n, 2),
       &place = operand(warp, n, 3), &length = operand(warp, n, 4);
  for_each_lane(mask, [&](int lane) {
    const auto shift = get<uint32_t>(place, lane) & 255, bits = get<uint32_t>(length, lane) & 255;
    const uint64_t ones = bits >= 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
    const uint64_t where = shift >= 64 ? 0 : ones << shift;
    const uint64_t value = shift >= 64 ? 0 : uint64_t(get<T>(field, lane)) << shift;
    put<T>(to, lane, static_cast<T>((uint64_t(get<T>(base, lane)) & ~where) | (value & where)));
  });
}

// ---- Moves -----------------------------------------------------------------------------------

template <class T>
void pack(Warp& warp, const Instruction& n, uint32_t mask) {
  const int bits = 8 * static_cast<int>(sizeof(T)) / n.width;
  const uint64_t ones = (uint64_t(1) << bits) - 1;
  for_each_lane(mask, [&](int lane) {
    uint64_t word = 0;
    for (int i = 0; i < n.width; ++i)
      word |= (operand(warp, n, 1 + i)[static_cast<size_t>(lane)] & ones) << (bits * i);
    put<T>(operand(warp, n, 0), lane, static_cast<T>(word));
  });
}

template <class T>
void unpack(Warp& warp, const Instruction& n, uint32_t mask) {
  const int bits = 8 * static_cast<int>(sizeof(T)) / n.width;
  const uint64_t ones = (uint64_t(1) << bits) - 1;
  for_each_lane(mask, [&](int lane) {
    const uint64_t word = operand(warp, n, n.width)[static_cast<size_t>(lane)];
    for (int i = 0; i < n.width; ++i)
      operand(warp, n, i)[static_cast<size_t>(lane)] = word >> (bits * i) & ones;
  });
}

float widened(BFloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }

// Rounds to the nearest, ties to even.
BFloat16 to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Operands: the word, the value of its high half, that of its low half.
template <class T, auto convert>
void convert_pair(Warp& warp, const Instruction& n, uint32_t mask) {
  Slot &to = operand(warp, n, 0), &high = operand(warp, n, 1), &low = operand(warp, n, 2);
  for_each_lane(mask, [&](int lane) {
    const T halves[2] = {convert(get<float>(low, lane)), convert(get<float>(high, lane))};
    put<uint32_t>(to, lane, std::bit_cast<uint32_t>(halves));
  });
}

// ---- Memory ----------------------------------------------------------------------------------

enum class Space { parameter, global, shared };

template <Space space>
void* memory_at(Warp& warp, const Instruction& n, int lane, uint64_t address, size_t bytes,
                Kind kind) {
  if constexpr (space == Space::global) {
    return warp.block.global.at(address, bytes, warp.access(lane), kind, n.recent_allocation);
  } else if constexpr (space == Space::shared) {
    return warp.block.shared.at(static_cast<uint32_t>(address), bytes, warp.access(lane), kind);
  } else {
    const uint64_t offset = address - kParameterBase;
    if (offset + bytes > warp.block.parameters.size()) throw Fault("no such parameter");
    return warp.block.parameters.data() + offset;
  }
}

// Operands: the address, then one register for each element.
template <Space space, class T>
void load(Warp& warp, const Instruction& n, uint32_t mask) {
  const Slot& address = operand(warp, n, 0);
  const auto width = static_cast<size_t>(n.width);
  for_each_lane(mask, [&](int lane) {
    const uint64_t place = address[static_cast<size_t>(lane)] + static_cast<uint64_t>(n.offset);
    const auto* source = static_cast<const unsigned char*>(
        memory_at<space>(warp, n, lane, place, width * sizeof(T), Kind::read));
    for (size_t i = 0; i < width; ++i) {
      T value;
      std::memcpy(&value, source + i * sizeof(T), sizeof(T));
      put<T>(operand(warp, n, 1 + static_cast<int>(i)), lane, value);
    }
  });
}

template <Space space, class T>
void store(Warp& warp, const Instruction& n, uint32_t mask) {
  const Slot& address = operand(warp, n, 0);
  const auto width = static_cast<size_t>(n.width);
  for_each_lane(mask, [&](int lane) {
    const uint64_t place = address[static_cast<size_t>(lane)] + static_cast<uint64_t>(n.offset);
    auto* target = static_cast<unsigned char*>(
        memory_at<space>(warp, n, lane, place, width * sizeof(T), Kind::write));
    for (size_t i = 0; i < width; ++i) {
      const T value = get<T>(operand(warp, n, 1 + static_cast<int>(i)), lane);
      std::memcpy(target + i * sizeof(T), &value, sizeof(T));
    }
  });
}

// Operands: the old value, the address, the value.
template <class T, auto combine>
void atomic(Warp& warp, const Instruction& n, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const uint64_t place =
        operand(warp, n, 1)[static_cast<size_t>(lane)] + static_cast<uint64_t>(n.offset);
    void* target = memory_at<Space::global>(warp, n, lane, place, sizeof(T), Kind::atomic);
    T old;
    std::memcpy(&old, target, sizeof(T));
    const T changed = combine(old, get<T>(operand(warp, n, 2), lane));
    std::memcpy(target, &changed, sizeof(T));
    put<T>(operand(warp, n, 0), lane, old);
  });
}

// Operands: the target, the source, 16, and how many bytes are read, if not all; zeros follow them.
void begin_copy(Warp& warp, const Instruction& n, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const auto at = static_cast<size_t>(lane);
    const uint64_t shared =
        static_cast<uint32_t>(operand(warp, n, 0)[at] + static_cast<uint64_t>(n.offset));
    const uint64_t global = operand(warp, n, 1)[at] + static_cast<uint64_t>(n.second_offset);
    if (get<uint32_t>(operand(warp, n, 2), lane) != 16)
      throw Fault("a copy of other than 16 bytes");
    const uint32_t bytes = n.width == 4 ? get<uint32_t>(operand(warp, n, 3), lane) : 16;
    if (bytes > 16 || global % 16)
      throw Fault("a copy of more than 16 bytes, or not aligned to them");
    if (bytes == 16) {
      memory_at<Space::global>(warp, n, lane, global, 16, Kind::read);
    } else {
      for (uint32_t byte = 0; byte < bytes; ++byte)
        memory_at<Space::global>(warp, n, lane, global + byte, 1, Kind::read);
    }
    warp.block.shared.begin_copy(shared, warp.access(lane));
    warp.open_copies(lane).push_back({shared, global, bytes});
  });
}

void commit_copies(Warp& warp, const Instruction&, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { warp.commit_copies(lane); });
}

void finish_copies(Warp& warp, const Instruction& n, uint32_t mask) {
  for_each_lane(
      mask, [&](int lane) { warp.finish_copies(lane, get<uint32_t>(operand(warp, n, 0), lane)); });
}

// ---- Operations of a whole warp --------------------------------------------------------------

void pass_warp_barrier(Warp& warp, const Instruction& n, uint32_t) {
  if (get<uint32_t>(operand(warp, n, 0), 0) != kWholeWarp) throw Fault("a barrier of other lanes");
  warp.pass_warp_barrier();
}

void shuffle_butterfly(Warp& warp, const Instruction& n, uint32_t mask) {
  const Slot given = operand(warp, n, 1);
  for_each_lane(mask, [&](int lane) {
    if (get<uint32_t>(operand(warp, n, 4), lane) != kWholeWarp) throw Fault("a part of a warp");
    if (get<uint32_t>(operand(warp, n, 3), lane) != 31) throw Fault("a shuffle of segments");
    const auto from = static_cast<uint32_t>(lane) ^ get<uint32_t>(operand(warp, n, 2), lane);
    if (from >= kLanes) throw Fault("a shuffle from beyond the warp");
    put<uint32_t>(operand(warp, n, 0), lane, get<uint32_t>(given, static_cast<int>(from)));
  });
}

// Operands: four results, the address of one row of 16 bytes for each lane. Lanes 8 m to 8 m + 7
// address matrix m; lane l receives row l / 4, columns 2 (l % 4) and the next, or the transpose.
template <bool transposed>
void load_matrices(Warp& warp, const Instruction& n, uint32_t mask) {
  std::array<const unsigned char*, kLanes> rows;
  const Slot& address = operand(warp, n, 4);
  for_each_lane(mask, [&](int lane) {
    const auto at = static_cast<size_t>(lane);
    rows[at] = static_cast<const unsigned char*>(memory_at<Space::shared>(
        warp, n, lane, address[at] + static_cast<uint64_t>(n.offset), 16, Kind::read));
  });
  for (int matrix = 0; matrix < 4; ++matrix)
    for_each_lane(mask, [&](int lane) {
      uint16_t entries[2];
      for (int e = 0; e < 2; ++e) {
        const int along = 2 * (lane % 4) + e, row = transposed ? along : lane / 4,
                  column = transposed ? lane / 4 : along;
        std::memcpy(&entries[e], rows[static_cast<size_t>(8 * matrix + row)] + 2 * column, 2);
      }
      put<uint32_t>(operand(warp, n, matrix), lane, entries[0] | uint32_t(entries[1]) << 16);
    });
}

// Tensor cores cut a sum off where they should round it.
float cut_off(double sum) {
  const auto rounded = static_cast<float>(sum);
  return std::abs(static_cast<double>(rounded)) > std::abs(sum) ? std::nextafterf(rounded, 0.0f)
                                                                : rounded;
}

// The place of a fragment's entry in its matrix, counted down the columns: CUTLASS describes each
// fragment by strides for lane % 4, lane / 4 and the bits of the entry's number
// (mma_traits_sm80.hpp), which is a source of its own beside the tables of the PTX ISA.
struct Fragment {
  int lane_low, lane_high, bits[3];
  int place(int lane, int entry) const {
    return lane % 4 * lane_low + lane / 4 * lane_high + (entry & 1) * bits[0] +
           (entry >> 1 & 1) * bits[1] + (entry >> 2 & 1) * bits[2];
  }
};
constexpr Fragment kHalfA{32, 1, {16, 8, 128}}, kHalfB{16, 1, {8, 64, 0}},
    kFloatC{32, 1, {16, 8, 0}};
constexpr Fragment kDoubleA{8, 1, {0, 0, 0}}, kDoubleC{16, 1, {8, 0, 0}};

// Operands: D [4], A [4], B [2], C [4]; A is 16 x 16, B 16 x 8, C and D 16 x 8.
void multiply_halves(Warp& warp, const Instruction& n, uint32_t) {
  double a[16][16], b[16][8];
  float c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int entry = 0; entry < 8; ++entry) {
      const int place = kHalfA.place(lane, entry);
      const auto word = get<uint32_t>(operand(warp, n, 4 + entry / 2), lane);
      a[place % 16][place / 16] =
          std::bit_cast<Half>(static_cast<uint16_t>(word >> 16 * (entry % 2)));
    }
    for (int entry = 0; entry < 4; ++entry) {
      const int place = kHalfB.place(lane, entry);
      const auto word = get<uint32_t>(operand(warp, n, 8 + entry / 2), lane);
      b[place / 8][place % 8] =
          std::bit_cast<Half>(static_cast<uint16_t>(word >> 16 * (entry % 2)));
      const int there = kFloatC.place(lane, entry);
      c[there % 16][there / 16] = get<float>(operand(warp, n, 10 + entry), lane);
    }
  }
  double sums[16][8];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) sums[i][j] = c[i][j];
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int entry = 0; entry < 4; ++entry) {
      const int place = kFloatC.place(lane, entry);
      put<float>(operand(warp, n, entry), lane, cut_off(sums[place % 16][place / 16]));
    }
}

// Operands: D [2], A, B, C [2]; A is 8 x 4, B 4 x 8, C and D 8 x 8.
void multiply_doubles(Warp& warp, const Instruction& n, uint32_t) {
  double a[8][4], b[8][4], c[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int place = kDoubleA.place(lane, 0);
    a[place % 8][place / 8] = get<double>(operand(warp, n, 2), lane);
    b[place % 8][place / 8] = get<double>(operand(warp, n, 3), lane);
    for (int entry = 0; entry < 2; ++entry) {
      const int there = kDoubleC.place(lane, entry);
      c[there % 8][there / 8] = get<double>(operand(warp, n, 4 + entry), lane);
    }
  }
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < 4; ++k) c[i][j] = std::fma(a[i][k], b[j][k], c[i][j]);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int entry = 0; entry < 2; ++entry) {
      const int place = kDoubleC.place(lane, entry);
      put<double>(operand(warp, n, entry), lane, c[place % 8][place / 8]);
    }
}

// ---- The table of opcodes --------------------------------------------------------------------

using Table = std::unordered_map<std::string, Decoded>;

template <class T>
void add_memory(Table& table, const std::string& type) {
  table["ld.param." + type] = {load<Space::parameter, T>};
  table["ld.global." + type] = {load<Space::global, T>};
  table["ld.shared." + type] = {load<Space::shared, T>};
  table["st.global." + type] = {store<Space::global, T>};
  table["st.shared." + type] = {store<Space::shared, T>};
}

template <class T>
void add_moves(Table& table, const std::string& type) {
  table["mov." + type] = {unary<T, T, [](T a) { return a; }>};
  table["selp." + type] = {select<T>};
}

template <class T>
void add_comparisons(Table& table, const std::string& type) {
  const auto add = [&](const char* name, Execute execute) {
    table["setp." + std::string(name) + "." + type] = {execute};
  };
  add("eq", binary<T, uint64_t, [](T a, T b) { return uint64_t(a == b); }>);
  add("ne", binary<T, uint64_t, [](T a, T b) { return uint64_t((a < b) | (a > b)); }>);
  add("lt", binary<T, uint64_t, [](T a, T b) { return uint64_t(a < b); }>);
  add("le", binary<T, uint64_t, [](T a, T b) { return uint64_t(a <= b); }>);
  add("gt", binary<T, uint64_t, [](T a, T b) { return uint64_t(a > b); }>);
  add("ge", binary<T, uint64_t, [](T a, T b) { return uint64_t(a >= b); }>);
  if constexpr (std::is_floating_point_v<T>) {  // true as well if one of the numbers is NaN
    add("equ", binary<T, uint64_t, [](T a, T b) { return uint64_t(!((a < b) | (a > b))); }>);
    add("neu", binary<T, uint64_t, [](T a, T b) { return uint64_t(a != b); }>);
    add("ltu", binary<T, uint64_t, [](T a, T b) { return uint64_t(!(a >= b)); }>);
    add("leu", binary<T, uint64_t, [](T a, T b) { return uint64_t(!(a > b)); }>);
    add("gtu", binary<T, uint64_t, [](T a, T b) { return uint64_t(!(a <= b)); }>);
    add("geu", binary<T, uint64_t, [](T a, T b) { return uint64_t(!(a < b)); }>);
  }
}

template <class T>
void add_floating(Table& table, const std::string& type) {
  add_memory<T>(table, type);
  add_moves<T>(table, type);
  add_comparisons<T>(table, type);
  for (const std::string rounding : {"", "rn."}) {
    table["add." + rounding + type] = {binary<T, T, [](T a, T b) { return a + b; }>};
    table["sub." + rounding + type] = {binary<T, T, [](T a, T b) { return a - b; }>};
    table["mul." + rounding + type] = {binary<T, T, [](T a, T b) { return a * b; }>};
  }
  table["div.rn." + type] = {binary<T, T, [](T a, T b) { return a / b; }>};
  table["fma.rn." + type] = {ternary<T, T, [](T a, T b, T c) { return std::fma(a, b, c); }>};
  table["min." + type] = {binary<T, T, [](T a, T b) { return std::fmin(a, b); }>};
  table["max." + type] = {binary<T, T, [](T a, T b) { return std::fmax(a, b); }>};
  table["abs." + type] = {unary<T, T, [](T a) { return std::fabs(a); }>};
  table["neg." + type] = {unary<T, T, [](T a) { return -a; }>};
  table["sqrt.rn." + type] = {unary<T, T, [](T a) { return std::sqrt(a); }>};
  table["rcp.rn." + type] = {unary<T, T, [](T a) { return 1 / a; }>};
  table["rsqrt.approx." + type] = {unary<T, T, [](T a) { return 1 / std::sqrt(a); }>};
}

template <class T>
void add_bits(Table& table, const std::string& type) {
  table["and." + type] = {binary<T, T, [](T a, T b) { return static_cast<T>(a & b); }>};
  table["or." + type] = {binary<T, T, [](T a, T b) { return static_cast<T>(a | b); }>};
  table["xor." + type] = {binary<T, T, [](T a, T b) { return static_cast<T>(a ^ b); }>};
  table["not." + type] = {unary<T, T, [](T a) { return static_cast<T>(~a); }>};
  table["shl." + type] = {shift_left<T>};
  table["shr." + type] = {shift_right<T>};
  table["clz." + type] = {unary<T, uint32_t, [](T a) { return uint32_t(std::countl_zero(a)); }>};
  table["bfi." + type] = {insert_bits<T>};
  table["pack." + type] = {pack<T>};
  table["unpack." + type] = {unpack<T>};
  add_memory<T>(table, type);
  add_moves<T>(table, type);
  table["setp.eq." + type] = {binary<T, uint64_t, [](T a, T b) { return uint64_t(a == b); }>};
  table["setp.ne." + type] = {binary<T, uint64_t, [](T a, T b) { return uint64_t(a != b); }>};
}

// T is the type, U the same without a sign: sums and products wrap around.
template <class T>
void add_integer(Table& table, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  add_memory<T>(table, type);
  add_moves<T>(table, type);
  add_comparisons<T>(table, type);
  table["add." + type] = {binary<U, T, [](U a, U b) { return static_cast<T>(a + b); }>};
  table["sub." + type] = {binary<U, T, [](U a, U b) { return static_cast<T>(a - b); }>};
  table["mul.lo." + type] = {
      binary<U, T, [](U a, U b) { return static_cast<T>(static_cast<uint64_t>(a) * b); }>};
  table["mad.lo." + type] = {ternary<U, U, [](U a, U b, U c) {
    return static_cast<U>(static_cast<uint64_t>(a) * b + c);
  }>};
  table["div." + type] = {divide<T>};
  table["min." + type] = {binary<T, T, [](T a, T b) { return a < b ? a : b; }>};
  table["max." + type] = {binary<T, T, [](T a, T b) { return a < b ? b : a; }>};
  table["shr." + type] = {shift_right<T>};
  if constexpr (std::is_signed_v<T>) {
    table["abs." + type] = {unary<T, T, [](T a) { return static_cast<T>(a < 0 ? -a : a); }>};
    table["neg." + type] = {unary<T, T, [](T a) { return static_cast<T>(-a); }>};
  }
  if constexpr (sizeof(T) == 4) {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    table["mul.wide." + type] = {binary<T, Wide, [](T a, T b) { return Wide(a) * Wide(b); }>};
  }
}

template <class From, class To>
void add_conversion(Table& table, const std::string& opcode) {
  table["cvt." + opcode] = {unary<From, To, [](From a) { return static_cast<To>(a); }>};
}

template <class From>
void add_conversions_from(Table& table, const std::string& type) {
  add_conversion<From, uint16_t>(table, "u16." + type);
  add_conversion<From, int16_t>(table, "s16." + type);
  add_conversion<From, uint32_t>(table, "u32." + type);
  add_conversion<From, int32_t>(table, "s32." + type);
  add_conversion<From, uint64_t>(table, "u64." + type);
  add_conversion<From, int64_t>(table, "s64." + type);
  add_conversion<From, float>(table, "rn.f32." + type);
  add_conversion<From, double>(table, "rn.f64." + type);
}

Table make_table() {
  Table table;
  add_bits<uint8_t>(table, "b8");
  add_bits<uint16_t>(table, "b16");
  add_bits<uint32_t>(table, "b32");
  add_bits<uint64_t>(table, "b64");
  add_integer<uint16_t>(table, "u16");
  add_integer<int16_t>(table, "s16");
  add_integer<uint32_t>(table, "u32");
  add_integer<int32_t>(table, "s32");
  add_integer<uint64_t>(table, "u64");
  add_integer<int64_t>(table, "s64");
  add_memory<uint8_t>(table, "u8");
  add_memory<int8_t>(table, "s8");
  add_floating<float>(table, "f32");
  add_floating<double>(table, "f64");
  using P = uint64_t;
  table["mov.pred"] = {unary<P, P, [](P a) { return a & 1; }>};
  table["and.pred"] = {binary<P, P, [](P a, P b) { return a & b & 1; }>};
  table["or.pred"] = {binary<P, P, [](P a, P b) { return (a | b) & 1; }>};
  table["xor.pred"] = {binary<P, P, [](P a, P b) { return (a ^ b) & 1; }>};
  table["not.pred"] = {unary<P, P, [](P a) { return ~a & 1; }>};
  add_conversions_from<uint8_t>(table, "u8");
  add_conversions_from<int8_t>(table, "s8");
  add_conversions_from<uint16_t>(table, "u16");
  add_conversions_from<int16_t>(table, "s16");
  add_conversions_from<uint32_t>(table, "u32");
  add_conversions_from<int32_t>(table, "s32");
  add_conversions_from<uint64_t>(table, "u64");
  add_conversions_from<int64_t>(table, "s64");
  add_conversion<float, double>(table, "f64.f32");
  add_conversion<double, float>(table, "rn.f32.f64");
  add_conversion<float, int32_t>(table, "rzi.s32.f32");
  add_conversion<double, int32_t>(table, "rzi.s32.f64");
  add_conversion<double, int64_t>(table, "rzi.s64.f64");
  add_conversion<Half, float>(table, "f32.f16");
  add_conversion<float, Half>(table, "rn.f16.f32");
  table["cvt.f32.bf16"] = {unary<BFloat16, float, widened>};
  table["cvt.rn.bf16.f32"] = {unary<float, BFloat16, to_bfloat16>};
  table["cvt.rn.f16x2.f32"] = {convert_pair<Half, [](float a) { return static_cast<Half>(a); }>};
  table["cvt.rn.bf16x2.f32"] = {convert_pair<BFloat16, to_bfloat16>};
  table["cvta.to.global.u64"] = {unary<P, P, [](P a) { return a; }>};
  table["cvta.shared.u64"] = {unary<P, P, [](P a) { return a + kGenericSharedBase; }>};
  table["cvta.to.shared.u64"] = {unary<P, P, [](P a) { return a - kGenericSharedBase; }>};
  table["atom.global.add.u64"] = {atomic<P, [](P a, P b) { return a + b; }>};
  table["atom.global.max.u64"] = {atomic<P, [](P a, P b) { return a < b ? b : a; }>};
  table["cp.async.cg.shared.global"] = {begin_copy};
  table["cp.async.commit_group"] = {commit_copies};
  table["cp.async.wait_group"] = {finish_copies};
  table["bar.warp.sync"] = {pass_warp_barrier, Control::none, true};
  table["shfl.sync.bfly.b32"] = {shuffle_butterfly, Control::none, true};
  table["ldmatrix.sync.aligned.m8n8.x4.shared.b16"] = {load_matrices<false>, Control::none, true};
  table["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = {load_matrices<true>, Control::none,
                                                             true};
  table["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = {multiply_halves, Control::none,
                                                                true};
  table["mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64"] = {multiply_doubles, Control::none,
                                                              true};
  table["bra"] = table["bra.uni"] = {nullptr, Control::branch};
  table["ret"] = {nullptr, Control::exit};
  table["bar.sync"] = {nullptr, Control::barrier};
  return table;
}

}  // namespace

std::vector<std::string> parts_of(const std::string& opcode) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= opcode.size();) {
    const size_t end = std::min(opcode.find('.', begin), opcode.size());
    parts.push_back(opcode.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

Decoded decode(const std::string& opcode) {
  static const Table table = make_table();
  std::string name = opcode;
  if (const auto parts = parts_of(opcode); parts[0] == "ld" || parts[0] == "st")
    name = parts[0] + "." + parts[1] + "." + parts.back();  // without .nc, .cs and the vector
  const auto found = table.find(name);
  if (found == table.end()) throw Fault("the machine has no instruction " + opcode);
  return found->second;
}

}  // namespace ptx
