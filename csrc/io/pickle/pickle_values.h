// The values of a pickle, as far as they are needed to check it and to find rows in it.
//
// A value is small: the offset of its bytes in the file, or an index in a table of containers.
// No object that a file describes is built, and a table grows with the bytes that were read, never
// with a size that the file claims. Everything that is not plain data throws NotPlain.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/window.h"

namespace realign_fast::io {

enum class ValueType : uint8_t {
  absent,
  none,
  boolean,
  integer,
  big_integer,
  real,
  text,
  bytes,
  tuple,
  list,
  dict,
  set,
  name,
  dtype,
  array,
  scalar,
  storage,
  tensor
};

// Texts with a meaning: names of globals, byte and memory orders, types of numbers.
enum class Keyword : uint8_t {
  other,
  beyond_latin1,  // a text that Python's protocol 2 cannot mean as bytes
  numpy,
  ndarray,
  dtype,
  multiarray,
  numeric,
  reconstruct,
  scalar,
  frombuffer,
  c_order,
  f_order,
  little,
  native,
  no_order,
  big,
  number_type,
  codecs,
  encode,
  latin1,
  builtins,
  bytes,
  set,
  frozen_set,
  torch_utils,
  rebuild_tensor,
  rebuild_parameter,
  torch_storage,
  load_from_bytes,
  collections,
  ordered_dict
};

struct NumberType {
  char kind = 0;  // NumPy's dtype.kind: f i u b, S U
  bool big_endian = false;
  uint32_t bytes = 0;
  bool built = false;
};

struct Value {
  ValueType type = ValueType::absent;
  Keyword keyword = Keyword::other;  // of a text or name
  uint8_t column = 0;                // of a text: its number among the requested keys from 1, or 0
  bool fetched = false;              // of a memo entry: whether it was read again
  // The number of bytes, of characters of a text, of items of a tuple, of reals before this one, or
  // of bytes of a number type (with its kind above them).
  uint32_t count = 0;
  // Offset in the file (-1 for bytes that are not there as they are) or index in a table; an
  // integer or boolean itself.
  int64_t at = 0;
};

constexpr int kNames = 2;  // the most keys that may be requested
constexpr uint32_t kNowhere = UINT32_MAX;

struct List {
  enum class Holds : uint8_t { nothing, reals, dicts, other } holds = Holds::nothing;
  bool shared = false;
  bool has_keys = true;  // all its items may be keys of a set
  uint32_t count = 0;
  uint32_t first = kNowhere, last = kNowhere;  // of a linked list of dicts
  Value real;                                  // the first real
};

struct Dict {
  Value rows[kNames];
  uint32_t next = kNowhere;  // the next dict of its list
  bool listed = false, shared = false, has_others = false, empty = true;
};

struct Array {
  NumberType type;
  bool built = false, shared = false;
  uint32_t columns = 0;  // of shape [D] or [1, D], else 0
  int64_t at = 0;
};

// Whether an opcode may occur between the numbers of a list, without pushing a value: Python writes
// a thousand numbers at a time, and starts a new frame whenever the last one is full.
constexpr bool is_between_reals(uint8_t code) {
  return code == '(' || code == 'e' || code == 'a' || code == 0x95;
}

// The memory that a vector holds.
template <class T>
int64_t bytes_of(const std::vector<T>& values) {
  return static_cast<int64_t>(values.capacity() * sizeof(T));
}

class Values {
 public:
  Values(Window& window, std::span<const std::string> names) : window_(window), names_(names) {}

  Value text(int64_t at, uint64_t bytes);  // checks strict UTF-8, as Python does
  Value tuple(std::span<const Value> values);
  Value list(std::span<const Value> values);
  Value dict();
  Value set_of(size_t keys);
  Value global(Value module, Value name);
  Value call(Value name, Value arguments);
  void build(Value target, Value state);
  void append(Value list, Value value);
  void set(Value dict, Value key, Value value);
  void share(Value value);  // marks a value that occurs more than once
  int64_t memory() const {  // bytes of the tables
    return bytes_of(lists) + bytes_of(dicts) + bytes_of(arrays) + bytes_of(shared_bytes) +
           bytes_of(items_) + bytes_of(types_);
  }

  static bool is_key(Value value);  // a text or a number: hashing others may take for ever
  static void check_key(Value key);
  [[noreturn]] static void throw_unknown(std::string name);
  static Keyword keyword_of(std::string_view text);

  std::vector<List> lists;
  std::vector<Dict> dicts;
  std::vector<Array> arrays;
  std::vector<int64_t> shared_bytes;  // their offsets
  // Bytes of the objects that Python would make, without those that take up to 20 times the bytes
  // of their opcodes: numbers, texts.
  int64_t built = 0;
  int64_t reals_from = 0;  // since this offset there were only reals and opcodes between them

 private:
  std::span<const Value> items(Value tuple) const;
  std::string text_of(Value text);
  bool is_number_type(Value value) const;
  Value tensor(std::span<const Value> given);
  Array described(Value data, Value dtype, Value shape) const;
  Value scalar(Value dtype, Value data);

  Window& window_;
  std::span<const std::string> names_;
  std::vector<Value> items_;  // of all tuples
  std::vector<NumberType> types_;
};

}  // namespace realign_fast::io
