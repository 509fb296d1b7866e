#include "io/pickle/pickle_values.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

namespace realign_fast::io {
namespace {

constexpr uint64_t kMaxKeyBytes = 256;  // of a text that may be a keyword or a requested key
constexpr size_t kMaxDimensions = 8;
constexpr int64_t kMaxArrayBytes = int64_t{1} << 32;  // no pickle that is read is larger

constexpr std::pair<std::string_view, Keyword> kKeywords[] = {
    {"numpy", Keyword::numpy},
    {"ndarray", Keyword::ndarray},
    {"dtype", Keyword::dtype},
    {"numpy.core.multiarray", Keyword::multiarray},
    {"numpy._core.multiarray", Keyword::multiarray},
    {"numpy.core.numeric", Keyword::numeric},
    {"numpy._core.numeric", Keyword::numeric},
    {"_reconstruct", Keyword::reconstruct},
    {"scalar", Keyword::scalar},
    {"_frombuffer", Keyword::frombuffer},
    {"C", Keyword::c_order},
    {"F", Keyword::f_order},
    {"<", Keyword::little},
    {"=", Keyword::native},
    {"|", Keyword::no_order},
    {">", Keyword::big},
    {"_codecs", Keyword::codecs},
    {"encode", Keyword::encode},
    {"latin1", Keyword::latin1},
    {"builtins", Keyword::builtins},
    {"__builtin__", Keyword::builtins},
    {"bytes", Keyword::bytes},
    {"set", Keyword::set},
    {"frozenset", Keyword::frozen_set},
    {"torch._utils", Keyword::torch_utils},
    {"_rebuild_tensor_v2", Keyword::rebuild_tensor},
    {"_rebuild_parameter", Keyword::rebuild_parameter},
    {"torch.storage", Keyword::torch_storage},
    {"_load_from_bytes", Keyword::load_from_bytes},
    {"collections", Keyword::collections},
    {"OrderedDict", Keyword::ordered_dict},
};

// The globals of plain data, and how many bytes the object takes at most that a call makes, beside
// the bytes of its arguments.
struct Global {
  Keyword module, name;
  int64_t bytes;
};
constexpr Global kGlobals[] = {
    {Keyword::numpy, Keyword::ndarray, 0},
    {Keyword::numpy, Keyword::dtype, 160},
    {Keyword::multiarray, Keyword::reconstruct, 160},
    {Keyword::multiarray, Keyword::scalar, 80},
    {Keyword::numeric, Keyword::frombuffer, 400},
    {Keyword::codecs, Keyword::encode, 40},
    {Keyword::builtins, Keyword::bytes, 40},
    {Keyword::builtins, Keyword::set, 0},
    {Keyword::builtins, Keyword::frozen_set, 0},
    {Keyword::torch_utils, Keyword::rebuild_tensor, 1000},
    {Keyword::torch_utils, Keyword::rebuild_parameter, 1000},
    {Keyword::torch_storage, Keyword::load_from_bytes, 1000},
    {Keyword::collections, Keyword::ordered_dict, 400},
};

// Parses a NumPy type such as `f4` or `U12`; the result has no bytes if it is another text.
NumberType number_type_of(std::string_view text) {
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

// Checks strict UTF-8 byte by byte: how many bytes are missing, and which the next one may be.
struct Utf8 {
  int missing = 0;
  uint8_t low = 0x80, high = 0xBF;
  uint32_t characters = 0;
  bool latin1 = true;  // no character is above 0xFF

  void read(uint8_t byte) {
    characters += (byte & 0xC0) != 0x80;
    latin1 &= byte <= 0xC3;
    if (missing) {
      if (byte < low || byte > high) throw NotPlain("a text is not UTF-8");
      missing--, low = 0x80, high = 0xBF;
    } else if (byte >= 0x80) {
      missing = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
      if (byte < 0xC2 || byte > 0xF4) throw NotPlain("a text is not UTF-8");
      if (byte == 0xE0) low = 0xA0;
      if (byte == 0xED) high = 0x9F;  // excludes surrogates
      if (byte == 0xF0) low = 0x90;
      if (byte == 0xF4) high = 0x8F;
    }
  }
};

bool is_integer(Value value, int64_t number) {
  return value.type == ValueType::integer && value.at == number;
}

// Whether a value is that truth; old versions of NumPy write numbers.
bool is_truth(Value value, bool truth) {
  return (value.type == ValueType::boolean && value.at == truth) || is_integer(value, truth);
}

}  // namespace

Keyword Values::keyword_of(std::string_view text) {
  const auto* entry =
      std::ranges::find(kKeywords, text, [](const auto& pair) { return pair.first; });
  return entry == std::end(kKeywords) ? Keyword::other : entry->second;
}

Value Values::text(int64_t at, uint64_t bytes) {
  Utf8 utf8;
  Value value{.type = ValueType::text, .at = at};
  if (bytes <= kMaxKeyBytes) {
    std::array<char, kMaxKeyBytes> copied;
    window_.copy(at, static_cast<int64_t>(bytes), reinterpret_cast<std::byte*>(copied.data()));
    const std::string_view text(copied.data(), bytes);
    for (const auto byte : text) utf8.read(static_cast<uint8_t>(byte));
    value.keyword = keyword_of(text);
    value.count = utf8.characters;
    if (const auto type = number_type_of(text); type.bytes) {
      value.keyword = Keyword::number_type;
      value.count = static_cast<uint32_t>(type.kind) << 24 | type.bytes;
    }
    const auto name = std::ranges::find(names_, text) - names_.begin();
    value.column = name < std::ssize(names_) ? static_cast<uint8_t>(name + 1) : 0;
  } else {
    for (const auto end = at + static_cast<int64_t>(bytes); at < end;) {
      const auto piece = window_.view(at);
      const auto step = std::min<int64_t>(std::ssize(piece), end - at);
      for (const auto byte : piece.first(step)) utf8.read(byte);
      at += step;
    }
    value.count = utf8.characters;
  }
  if (utf8.missing) throw NotPlain("a text is not UTF-8");
  if (!utf8.latin1) value.keyword = Keyword::beyond_latin1;
  return value;
}

Value Values::tuple(std::span<const Value> values) {
  const auto at = std::ssize(items_);
  items_.insert(items_.end(), values.begin(), values.end());
  if (!values.empty()) built += 56 + 8 * std::ssize(values);
  return {.type = ValueType::tuple, .count = static_cast<uint32_t>(values.size()), .at = at};
}

Value Values::list(std::span<const Value> values) {
  const Value list_value{.type = ValueType::list, .at = std::ssize(lists)};
  lists.emplace_back();
  built += 72;
  for (const auto& value : values) append(list_value, value);
  return list_value;
}

Value Values::dict() {
  dicts.emplace_back();
  built += 80;
  return {.type = ValueType::dict, .at = std::ssize(dicts) - 1};
}

Value Values::set_of(size_t keys) {
  built += 232 + 64 * static_cast<int64_t>(keys);
  return {.type = ValueType::set};
}

void Values::append(Value target, Value value) {
  auto& list = lists[target.at];
  list.has_keys &= is_key(value);
  built += 8;
  auto holds = List::Holds::other;
  if (value.type == ValueType::real) {
    if (list.count == 0) list.real = value;
    const bool is_next = value.count == list.real.count + list.count;
    if (is_next && reals_from <= list.real.at) holds = List::Holds::reals;
  } else if (value.type == ValueType::dict && !dicts[value.at].listed) {
    const auto index = static_cast<uint32_t>(value.at);
    dicts[index].listed = true;
    holds = List::Holds::dicts;
    if (list.holds == List::Holds::dicts) dicts[list.last].next = index;
    if (list.count == 0) list.first = index;
    list.last = index;
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
  built += dict.empty ? 184 : 64;
  dict.empty = false;
  if (key.type == ValueType::text && key.column) {
    dict.rows[key.column - 1] = value;
  } else {
    dict.has_others = true;
  }
}

bool Values::is_key(Value value) {
  switch (value.type) {
    case ValueType::text:
    case ValueType::integer:
    case ValueType::big_integer:
    case ValueType::real:
    case ValueType::boolean:
    case ValueType::none: return true;
    default: return false;
  }
}

void Values::check_key(Value key) {
  if (!is_key(key)) throw NotPlain("a key of a dict or set is neither a text nor a number");
}

void Values::throw_unknown(std::string name) {
  for (auto& letter : name) {
    if (letter < ' ' || letter > '~') letter = '?';
  }
  throw NotPlain("it names " + name +
                 ", which is no constructor of NumPy's arrays or torch's tensors");
}

// Returns the first characters of a text for a message.
std::string Values::text_of(Value text) {
  if (text.at < 0 || text.keyword == Keyword::number_type) return "a value";
  std::string name(std::min<uint32_t>(text.count, 60), ' ');
  window_.copy(text.at, std::ssize(name), reinterpret_cast<std::byte*>(name.data()));
  return name;
}

void Values::share(Value value) {
  switch (value.type) {
    case ValueType::list: lists[value.at].shared = true; return;
    case ValueType::dict: dicts[value.at].shared = true; return;
    case ValueType::array: arrays[value.at].shared = true; return;
    case ValueType::bytes: return shared_bytes.push_back(value.at);
    case ValueType::tuple:  // its bytes may be the data of two arrays; other items are marked
                            // themselves
      for (const auto& item : items(value)) {
        if (item.type == ValueType::bytes) shared_bytes.push_back(item.at);
      }
      return;
    default: return;
  }
}

Value Values::global(Value module, Value name) {
  for (const auto& global : kGlobals) {
    if (global.module == module.keyword && global.name == name.keyword) {
      return {.type = ValueType::name, .keyword = name.keyword};
    }
  }
  throw_unknown(name.at < 0 ? "a global" : text_of(module) + "." + text_of(name));
}

bool Values::is_number_type(Value value) const {
  return value.type == ValueType::text && value.keyword == Keyword::number_type;
}

Value Values::call(Value name, Value arguments) {
  if (name.type != ValueType::name || arguments.type != ValueType::tuple)
    throw NotPlain("it calls a value that is not a global");
  const auto given = items(arguments);
  const auto first = given.empty() ? Value{} : given[0];
  const auto is = [&](size_t index, ValueType type, Keyword keyword) {
    return given[index].type == type && given[index].keyword == keyword;
  };
  const auto global = std::ranges::find(kGlobals, name.keyword, &Global::name);
  built += global->bytes;
  switch (name.keyword) {
    case Keyword::reconstruct: {
      // An empty array, of whatever type, whose state is set next.
      if (given.size() != 3 || !is(0, ValueType::name, Keyword::ndarray)) break;
      if (given[1].type != ValueType::tuple || given[1].count != 1) break;
      if (!is_integer(items(given[1])[0], 0)) break;
      if (given[2].type != ValueType::bytes || given[2].count != 1) break;
      arrays.emplace_back();
      return {.type = ValueType::array, .at = std::ssize(arrays) - 1};
    }
    case Keyword::dtype: {
      // The last argument makes a new object, so that no other value of NumPy changes with it.
      if (first.type == ValueType::text && !is_number_type(first)) {
        throw NotPlain("a dtype is not one of numbers or text (object arrays are never built)");
      }
      if (given.size() != 3 || !is_number_type(first)) break;
      if (!is_truth(given[1], false) || !is_truth(given[2], true)) break;
      types_.push_back({static_cast<char>(first.count >> 24), false, first.count & 0xFFFFFF});
      return {.type = ValueType::dtype, .at = std::ssize(types_) - 1};
    }
    case Keyword::scalar:
      if (given.size() == 2) return scalar(first, given[1]);
      break;
    case Keyword::frombuffer:
      if (given.size() != 4 || given[3].type != ValueType::text) break;
      if (given[3].keyword != Keyword::c_order && given[3].keyword != Keyword::f_order) break;
      arrays.push_back(described(first, given[1], given[2]));
      return {.type = ValueType::array, .at = std::ssize(arrays) - 1};
    case Keyword::encode:
      // Bytes of protocol 2, as a text of which each character is a byte.
      if (given.size() != 2 || first.type != ValueType::text) break;
      if (!is(1, ValueType::text, Keyword::latin1)) break;
      if (first.keyword == Keyword::beyond_latin1 || is_number_type(first)) break;
      built += first.count;
      return {.type = ValueType::bytes, .count = first.count, .at = -1};
    case Keyword::bytes:
      if (given.empty()) return {.type = ValueType::bytes, .at = -1};
      break;
    case Keyword::set:
    case Keyword::frozen_set:
      if (given.size() != 1 || first.type != ValueType::list) break;
      if (!lists[first.at].has_keys) break;
      return set_of(lists[first.at].count);
    case Keyword::load_from_bytes:
      if (given.size() != 1 || first.type != ValueType::bytes) break;
      built += first.count;
      return {.type = ValueType::storage, .count = first.count};
    case Keyword::rebuild_tensor: return tensor(given);
    case Keyword::rebuild_parameter:
      if (given.size() != 3 || first.type != ValueType::tensor) break;
      if (given[1].type != ValueType::boolean || given[2].type != ValueType::none) break;
      return first;
    case Keyword::ordered_dict:  // the hooks of a tensor, of which it has none
      if (given.empty()) return {.type = ValueType::none};
      break;
    default: break;
  }
  throw NotPlain("it calls a constructor of NumPy or torch with unexpected arguments");
}

// The arguments are a storage, an offset, sizes, strides, whether it has gradients, and hooks.
// There are no more numbers in the tensor than bytes in its storage; torch checks that they lie in
// it.
Value Values::tensor(std::span<const Value> given) {
  const auto fail = [] { throw NotPlain("a tensor is not described by a storage and sizes"); };
  if (given.size() != 6 || given[0].type != ValueType::storage) fail();
  if (given[2].type != ValueType::tuple || given[3].type != ValueType::tuple) fail();
  if (given[2].count > kMaxDimensions || given[2].count != given[3].count) fail();
  if (given[4].type != ValueType::boolean || given[5].type != ValueType::none) fail();
  const auto is_size = [](Value value) {
    return value.type == ValueType::integer && value.at >= 0 && value.at <= kMaxArrayBytes;
  };
  int64_t numbers = 1;
  if (!is_size(given[1])) fail();
  for (const auto& stride : items(given[3])) {
    if (!is_size(stride)) fail();
  }
  for (const auto& size : items(given[2])) {
    if (!is_size(size)) fail();
    numbers *= size.at;
    if (numbers > given[0].count) fail();
  }
  return {.type = ValueType::tensor};
}

void Values::build(Value target, Value state) {
  const bool known = target.type == ValueType::array || target.type == ValueType::dtype;
  if (!known || state.type != ValueType::tuple)
    throw NotPlain("it sets the state of a value other than an array or a dtype");
  const auto given = items(state);
  if (target.type == ValueType::array) {
    auto& array = arrays[target.at];
    // NumPy reads an int of C: whether it is in Fortran's order, which is the same for rows.
    const auto is_flag = [](Value value) {
      return value.type == ValueType::boolean ||
             (value.type == ValueType::integer && value.at == static_cast<int32_t>(value.at));
    };
    if (array.built || given.size() != 5 || !is_integer(given[0], 1) || !is_flag(given[3])) {
      throw NotPlain("an array has an unexpected state");
    }
    array = described(given[4], given[2], given[1]);
    built += given[4].count;
    return;
  }
  auto& type = types_[target.at];
  const bool is_text = type.kind == 'S' || type.kind == 'U';
  const auto is_none = [&](int index) { return given[index].type == ValueType::none; };
  if (type.built || given.size() != 8 || !is_integer(given[0], 3) ||
      given[1].type != ValueType::text || !is_none(2) || !is_none(3) || !is_none(4) ||
      !is_integer(given[5], is_text ? int64_t{type.bytes} : -1) ||
      !is_integer(given[6], !is_text           ? -1
                            : type.kind == 'U' ? 4
                                               : 1) ||
      !is_integer(given[7], type.kind == 'U' ? 8 : 0)) {
    throw NotPlain("a dtype has an unexpected state");
  }
  type.built = true;
  switch (given[1].keyword) {
    case Keyword::big: type.big_endian = true; return;
    case Keyword::little:
    case Keyword::native:
    case Keyword::no_order: type.big_endian = false; return;
    default: throw NotPlain("a dtype has an unexpected byte order");
  }
}

std::span<const Value> Values::items(Value tuple) const {
  return std::span(items_).subspan(tuple.at, tuple.count);
}

Array Values::described(Value data, Value dtype, Value shape) const {
  if (data.type != ValueType::bytes || dtype.type != ValueType::dtype ||
      shape.type != ValueType::tuple) {
    throw NotPlain("an array is not given by bytes, dtype and shape");
  }
  const auto counts = items(shape);
  const auto number = types_[dtype.at];
  if (counts.size() > kMaxDimensions) throw NotPlain("an array has too many dimensions");
  int64_t bytes = number.bytes;
  bool empty = false;
  for (const auto& count : counts) {
    if (count.type != ValueType::integer || count.at < 0 || count.at > kMaxArrayBytes / bytes) {
      throw NotPlain("an array has a negative or too large shape");
    }
    empty |= count.at == 0;
    bytes *= count.at ? count.at : 1;
  }
  if ((empty ? 0 : bytes) != data.count)
    throw NotPlain("the bytes of an array do not match its shape");
  const bool is_row = counts.size() == 1 || (counts.size() == 2 && counts[0].at == 1);
  const auto columns = is_row && !empty ? counts.back().at : 0;
  return {.type = number, .built = true, .columns = static_cast<uint32_t>(columns), .at = data.at};
}

Value Values::scalar(Value dtype, Value data) {
  if (dtype.type != ValueType::dtype || data.type != ValueType::bytes)
    throw NotPlain("a scalar has no dtype");
  const auto number = types_[dtype.at];
  if (number.bytes != data.count || (number.kind == 'U' && number.big_endian)) {
    throw NotPlain("the bytes of a scalar do not match its dtype");
  }
  built += data.count;
  const bool in_file = number.kind == 'U' && data.at >= 0;
  for (int64_t place = 0; in_file && place < data.count; place += 4) {
    std::array<std::byte, 4> code;  // Unicode has 17 planes
    window_.copy(data.at + place, 4, code.data());
    if (code[3] != std::byte{0} || code[2] > std::byte{0x10}) {
      throw NotPlain("a text has a character beyond Unicode");
    }
  }
  return {.type = ValueType::scalar};
}

}  // namespace realign_fast::io
