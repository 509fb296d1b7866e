// What a pickle is made of, as far as rows are found in it: the twin of corpus/plain_values.py.
//
// A value is a small word: where its bytes lie in the file, or a number in a table of containers.
// Nothing that a file describes is built, and a table grows by what was read, never by what the
// file says that it will hold. All that Python's twin refuses throws NotPlain here, and so does
// what is rare.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/window.h"

namespace realign_fast::io {

enum class Kind : uint8_t {
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
  frozen_set,
  name,
  type,
  array,
  scalar
};

// Texts that mean something: names of globals, orders, types of numbers.
enum class Word : uint8_t {
  other,
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
  number_type
};

struct NumberType {
  char kind = 0;  // of numpy: f i u b, S U
  bool big_endian = false;
  uint32_t bytes = 0;
};

struct Value {
  Kind kind = Kind::absent;
  Word word = Word::other;  // of a text or name
  uint8_t column = 0;       // of a text: which of the asked-for keys it is, from 1; 0: none
  bool fetched = false;     // in the memo: it was taken out again
  uint32_t count = 0;  // bytes, items of a tuple; reals before this one; bytes of a number type
  int64_t at = 0;      // place in the file or in a table; an integer or boolean itself
};

constexpr int kNames = 2;  // keys that may hold the rows
constexpr uint32_t kNowhere = UINT32_MAX;

struct List {
  enum class Holds : uint8_t { nothing, reals, dicts, other } holds = Holds::nothing;
  bool shared = false;
  uint32_t count = 0;
  uint32_t first = kNowhere, last = kNowhere;  // dicts, in a chain
  Value real;                                  // the first one
};

struct Dict {
  Value rows[kNames];
  uint32_t next = kNowhere;  // of the list that it is in
  bool listed = false, shared = false, has_others = false;
};

struct Array {
  NumberType type;
  bool built = false, shared = false;
  uint32_t columns = 0;  // of shape [D] or [1, D], else 0
  int64_t at = 0;
};

// Whether an opcode may stand between the numbers of a list (and pushes nothing): Python writes a
// thousand at a time, and begins a new frame wherever the last one is full.
constexpr bool is_between_reals(uint8_t code) {
  return code == '(' || code == 'e' || code == 'a' || code == 0x95;
}

class Values {
 public:
  Values(Window& window, std::span<const std::string> names) : window_(window), names_(names) {}

  Value text(int64_t at, uint64_t bytes);  // UTF-8 without surrogates, as Python is strict
  Value tuple(std::span<const Value> values);
  Value list(std::span<const Value> values);
  Value dict();
  Value global(Word module, Word name) const;
  Value call(Value name, Value arguments);
  void build(Value target, Value state);
  void append(Value list, Value value);
  void set(Value dict, Value key, Value value);
  void share(Value value);  // it stands in more than one place

  static void check_key(Value key);
  static Word word_of(std::string_view text);

  std::vector<List> lists;
  std::vector<Dict> dicts;
  std::vector<Array> arrays;
  std::vector<int64_t> shared_bytes;  // where they lie
  int64_t clean_from = 0;  // since here there were reals and what may be between them, nothing else

 private:
  std::span<const Value> items(Value tuple) const;
  Array described(Value data, Value type, Value shape) const;
  Value scalar(Value type, Value data);

  Window& window_;
  std::span<const std::string> names_;
  std::vector<Value> items_;  // of tuples
  std::vector<NumberType> types_;
};

}  // namespace realign_fast::io
