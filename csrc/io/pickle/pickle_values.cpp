#include "io/pickle/pickle_values.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

namespace realign_fast::io {
namespace {

constexpr uint64_t kShort = 256;  // bytes of a text that may be a word or a key that is asked for
constexpr size_t kDimensions = 8;
constexpr int64_t kMostBytes = int64_t{1} << 32;  // of an array; no pickle that is read is larger

constexpr std::pair<std::string_view, Word> kWords[] = {
    {"numpy", Word::numpy},
    {"ndarray", Word::ndarray},
    {"dtype", Word::dtype},
    {"numpy.core.multiarray", Word::multiarray},
    {"numpy._core.multiarray", Word::multiarray},
    {"numpy.core.numeric", Word::numeric},
    {"numpy._core.numeric", Word::numeric},
    {"_reconstruct", Word::reconstruct},
    {"scalar", Word::scalar},
    {"_frombuffer", Word::frombuffer},
    {"C", Word::c_order},
    {"F", Word::f_order},
    {"<", Word::little},
    {"=", Word::native},
    {"|", Word::no_order},
    {">", Word::big},
};

// `f4`, `U12`: a type of numpy, or one without bytes.
NumberType type_of(std::string_view text) {
  constexpr std::string_view numbers[] = {"f2", "f4", "f8", "i1", "i2", "i4",
                                          "i8", "u1", "u2", "u4", "u8", "b1"};
  if (std::ranges::find(numbers, text) != std::end(numbers)) {
    return {text[0], false, static_cast<uint32_t>(text[1] - '0')};
  }
  const bool is_text = text.size() > 1 && (text[0] == 'S' || text[0] == 'U');
  uint32_t count = 0;
  if (!is_text || text.size() > 7) return {};
  const auto* end = text.data() + text.size();
  if (std::from_chars(text.data() + 1, end, count).ptr != end) return {};
  return {text[0], false, text[0] == 'U' ? 4 * count : count};
}

// Strict UTF-8 in pieces: what may come next.
struct Utf8 {
  int missing = 0;
  uint8_t low = 0x80, high = 0xBF;

  void read(uint8_t byte) {
    if (missing) {
      if (byte < low || byte > high) throw NotPlain("a text is not UTF-8");
      missing--, low = 0x80, high = 0xBF;
    } else if (byte >= 0x80) {
      missing = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
      if (byte < 0xC2 || byte > 0xF4) throw NotPlain("a text is not UTF-8");
      if (byte == 0xE0) low = 0xA0;
      if (byte == 0xED) high = 0x9F;  // (surrogates)
      if (byte == 0xF0) low = 0x90;
      if (byte == 0xF4) high = 0x8F;
    }
  }
};

bool is(Value value, int64_t number) { return value.kind == Kind::integer && value.at == number; }

}  // namespace

Word Values::word_of(std::string_view text) {
  const auto* found = std::ranges::find(kWords, text, [](const auto& one) { return one.first; });
  return found == std::end(kWords) ? Word::other : found->second;
}

Value Values::text(int64_t at, uint64_t bytes) {
  Utf8 utf8;
  Value value{.kind = Kind::text};
  if (bytes <= kShort) {
    std::array<char, kShort> copied;
    window_.copy(at, static_cast<int64_t>(bytes), reinterpret_cast<std::byte*>(copied.data()));
    const std::string_view text(copied.data(), bytes);
    for (const auto byte : text) utf8.read(static_cast<uint8_t>(byte));
    value.word = word_of(text);
    if (const auto type = type_of(text); type.bytes) {
      value.word = Word::number_type, value.at = type.kind, value.count = type.bytes;
    }
    const auto name = std::ranges::find(names_, text) - names_.begin();
    value.column = name < std::ssize(names_) ? static_cast<uint8_t>(name + 1) : 0;
  } else {
    for (const auto end = at + static_cast<int64_t>(bytes); at < end;) {
      const auto piece = window_.view(at);
      const auto here = std::min<int64_t>(std::ssize(piece), end - at);
      for (const auto byte : piece.first(here)) utf8.read(byte);
      at += here;
    }
  }
  if (utf8.missing) throw NotPlain("a text is not UTF-8");
  return value;
}

Value Values::tuple(std::span<const Value> values) {
  const auto at = std::ssize(items_);
  items_.insert(items_.end(), values.begin(), values.end());
  return {.kind = Kind::tuple, .count = static_cast<uint32_t>(values.size()), .at = at};
}

Value Values::list(std::span<const Value> values) {
  const Value made{.kind = Kind::list, .at = std::ssize(lists)};
  lists.emplace_back();
  for (const auto& value : values) append(made, value);
  return made;
}

Value Values::dict() {
  dicts.emplace_back();
  return {.kind = Kind::dict, .at = std::ssize(dicts) - 1};
}

void Values::append(Value target, Value value) {
  auto& list = lists[target.at];
  auto holds = List::Holds::other;
  if (value.kind == Kind::real) {
    if (list.count == 0) list.real = value;
    const bool is_next = value.count == list.real.count + list.count;
    if (is_next && clean_from <= list.real.at) holds = List::Holds::reals;
  } else if (value.kind == Kind::dict && !dicts[value.at].listed) {
    const auto place = static_cast<uint32_t>(value.at);
    dicts[place].listed = true;
    holds = List::Holds::dicts;
    if (list.holds == List::Holds::dicts) dicts[list.last].next = place;
    if (list.count == 0) list.first = place;
    list.last = place;
  }
  if (list.count++ == 0) {
    list.holds = holds;
  } else if (list.holds != holds) {
    list.holds = List::Holds::other;
  }
}

void Values::set(Value target, Value key, Value value) {
  check_key(key);
  auto& dict = dicts[target.at];
  if (key.kind == Kind::text && key.column) {
    dict.rows[key.column - 1] = value;
  } else {
    dict.has_others = true;
  }
}

void Values::check_key(Value key) {
  switch (key.kind) {
    case Kind::text:
    case Kind::integer:
    case Kind::big_integer:
    case Kind::real:
    case Kind::boolean:
    case Kind::none: return;
    default: throw NotPlain("a key is neither text nor a number");
  }
}

void Values::share(Value value) {
  switch (value.kind) {
    case Kind::list: lists[value.at].shared = true; return;
    case Kind::dict: dicts[value.at].shared = true; return;
    case Kind::array: arrays[value.at].shared = true; return;
    case Kind::bytes: return shared_bytes.push_back(value.at);
    case Kind::tuple:  // its bytes may be the data of two arrays; all else has a place of its own
      for (const auto& item : items(value)) {
        if (item.kind == Kind::bytes) shared_bytes.push_back(item.at);
      }
      return;
    default: return;
  }
}

Value Values::global(Word module, Word name) const {
  const bool known =
      (module == Word::numpy && (name == Word::ndarray || name == Word::dtype)) ||
      (module == Word::multiarray && (name == Word::reconstruct || name == Word::scalar)) ||
      (module == Word::numeric && name == Word::frombuffer);
  if (!known) throw NotPlain("it names something else than numpy's arrays");
  return {.kind = Kind::name, .word = name};
}

Value Values::call(Value name, Value arguments) {
  if (name.kind != Kind::name || arguments.kind != Kind::tuple) throw NotPlain("it calls a value");
  const auto given = items(arguments);
  const auto first = given.empty() ? Value{} : given[0];
  if (name.word == Word::reconstruct && first.kind == Kind::name && first.word == Word::ndarray) {
    arrays.emplace_back();
    return {.kind = Kind::array, .at = std::ssize(arrays) - 1};
  }
  if (name.word == Word::dtype && first.kind == Kind::text && first.word == Word::number_type) {
    types_.push_back({static_cast<char>(first.at), false, first.count});
    return {.kind = Kind::type, .at = std::ssize(types_) - 1};
  }
  if (name.word == Word::scalar && given.size() >= 2) return scalar(first, given[1]);
  if (name.word == Word::frombuffer && given.size() == 4 && given[3].kind == Kind::text &&
      (given[3].word == Word::c_order || given[3].word == Word::f_order)) {
    arrays.push_back(described(first, given[1], given[2]));
    return {.kind = Kind::array, .at = std::ssize(arrays) - 1};
  }
  throw NotPlain("it calls one of numpy's constructors with arguments that numpy does not give");
}

void Values::build(Value target, Value state) {
  const bool known = target.kind == Kind::array || target.kind == Kind::type;
  if (!known || state.kind != Kind::tuple) throw NotPlain("it sets the state of another value");
  const auto given = items(state);
  if (target.kind == Kind::array) {
    auto& array = arrays[target.at];
    if (array.built || given.size() != 5) throw NotPlain("an array has another state");
    array = described(given[4], given[2], given[1]);
    return;
  }
  auto& type = types_[target.at];
  const bool is_text = type.kind == 'S' || type.kind == 'U';
  const auto none = [&](int place) { return given[place].kind == Kind::none; };
  if (given.size() < 7 || given[1].kind != Kind::text || !none(2) || !none(3) || !none(4) ||
      !is(given[5], is_text ? int64_t{type.bytes} : -1) ||
      !is(given[6], !is_text           ? -1
                    : type.kind == 'U' ? 4
                                       : 1)) {
    throw NotPlain("a dtype has another state");
  }
  switch (given[1].word) {
    case Word::big: type.big_endian = true; return;
    case Word::little:
    case Word::native:
    case Word::no_order: type.big_endian = false; return;
    default: throw NotPlain("a dtype has another order");
  }
}

std::span<const Value> Values::items(Value tuple) const {
  return std::span(items_).subspan(tuple.at, tuple.count);
}

Array Values::described(Value data, Value type, Value shape) const {
  if (data.kind != Kind::bytes || type.kind != Kind::type || shape.kind != Kind::tuple) {
    throw NotPlain("an array is not described by bytes, dtype and shape");
  }
  const auto counts = items(shape);
  const auto number = types_[type.at];
  if (counts.size() > kDimensions) throw NotPlain("an array has too many dimensions");
  int64_t bytes = number.bytes;
  bool empty = false;
  for (const auto& count : counts) {
    if (count.kind != Kind::integer || count.at < 0 || count.at > kMostBytes / bytes) {
      throw NotPlain("an array has an unlikely shape");
    }
    empty |= count.at == 0;
    bytes *= count.at ? count.at : 1;
  }
  if ((empty ? 0 : bytes) != data.count) throw NotPlain("an array has other bytes than its shape");
  const bool is_row = counts.size() == 1 || (counts.size() == 2 && counts[0].at == 1);
  const auto columns = is_row && !empty ? counts.back().at : 0;
  return {.type = number, .built = true, .columns = static_cast<uint32_t>(columns), .at = data.at};
}

Value Values::scalar(Value type, Value data) {
  if (type.kind != Kind::type || data.kind != Kind::bytes) throw NotPlain("a scalar is of no type");
  const auto number = types_[type.at];
  if (number.bytes != data.count || (number.kind == 'U' && number.big_endian)) {
    throw NotPlain("a scalar has other bytes than its type");
  }
  for (int64_t place = 0; number.kind == 'U' && place < data.count; place += 4) {
    std::array<std::byte, 4> code;  // (text of Python's has 17 planes)
    window_.copy(data.at + place, 4, code.data());
    if (code[3] != std::byte{0} || code[2] > std::byte{0x10}) {
      throw NotPlain("a text has characters beyond Unicode");
    }
  }
  return {.kind = Kind::scalar};
}

}  // namespace realign_fast::io
