#include "io/pickle/pickle_interpreter.h"

#include <array>
#include <string>
#include <string_view>

#include "io/pickle/pickle_values.h"

namespace realign_fast::io {
namespace {

constexpr int64_t kMemoryPerByte = 16;         // of the tables, for each byte of the file
constexpr int64_t kMemoryBase = 64 << 20;      // of the tables of any file
constexpr int64_t kBuiltPerByte = 32;          // of the objects that Python makes of the file
constexpr int64_t kStepsBetweenChecks = 4096;  // of the memory

class Interpreter {
 public:
  Interpreter(Window& window, std::span<const std::string> names)
      : window_(window), values_(window, names), at_(window.begin()), end_(window.end()) {}

  PickledList run(int64_t max_steps);
  std::string place() const;  // of the opcode that was run last

 private:
  bool step();  // returns false at the end
  void begin_frame();
  void step_with_mark(uint8_t code);
  bool push(uint8_t code);

  uint8_t byte() {
    if (at_ >= end_) throw_cut_off();
    return window_.byte(at_++);
  }
  uint64_t number(int bytes) {  // little-endian
    uint64_t value = 0;
    for (int shift = 0; shift < 8 * bytes; shift += 8) value |= uint64_t{byte()} << shift;
    return value;
  }
  int64_t take(uint64_t bytes) {
    if (bytes > static_cast<uint64_t>(end_ - at_)) throw_cut_off();
    at_ += static_cast<int64_t>(bytes);
    return at_ - static_cast<int64_t>(bytes);
  }
  [[noreturn]] static void throw_cut_off() {
    throw NotPlain("the file ends in the middle of the pickle");
  }

  void check_memory() const {
    const auto bytes =
        values_.memory() + bytes_of(stack_) + bytes_of(memo_) + bytes_of(taken_) + bytes_of(marks_);
    if (bytes > kMemoryBase + kMemoryPerByte * end_) {
      throw NotPlain("it has more values than plain data of its size");
    }
    if (values_.built > kMemoryBase + kBuiltPerByte * end_) {
      throw NotPlain("its values take more memory than plain data of its size");
    }
  }
  size_t frame_start() const { return marks_.empty() ? 0 : marks_.back(); }
  Value pop() {
    const auto value = top();
    stack_.pop_back();
    return value;
  }
  Value top() const {
    if (stack_.size() <= frame_start())
      throw NotPlain("an opcode needs a value that the stack does not hold");
    return stack_.back();
  }
  Value top(ValueType kind) const {
    if (top().type != kind) throw NotPlain("an opcode needs a value of another type");
    return stack_.back();
  }
  void drop_mark() {
    if (marks_.empty()) throw NotPlain("an opcode needs a mark that the stack does not hold");
    stack_.resize(marks_.back());
    marks_.pop_back();
  }

  void push_text(int bytes);
  void push_bytes(int bytes);
  void push_long();
  void push_tuple(size_t count);
  void put(uint64_t index);
  void get(uint64_t index);
  Keyword line();

  Window& window_;
  Values values_;
  int64_t at_, end_, frame_end_ = 0;
  std::vector<Value> stack_, memo_, taken_;
  std::vector<size_t> marks_;
  uint32_t reals_ = 0;  // the number of reals so far
};

PickledList Interpreter::run(int64_t max_steps) {
  for (int64_t steps = 0; steps < max_steps; steps++) {
    if (steps % kStepsBetweenChecks == 0) check_memory();
    const bool framed = at_ < frame_end_;
    const bool ended = !step();
    // Python's unpickler would go on elsewhere.
    if (framed && at_ > frame_end_) throw NotPlain("a frame ends in the middle of an opcode");
    if (!ended) continue;
    check_memory();
    if (stack_.size() != 1 || !marks_.empty() || at_ != end_) {
      throw NotPlain("it ends with more or fewer than one value, or before the file does");
    }
    for (const auto& value : memo_) {
      if (value.fetched) values_.share(value);
    }
    return list_of(values_, stack_[0]).value_or(PickledList{});
  }
  throw NotPlain("it has too many opcodes");
}

std::string Interpreter::place() const {
  if (!stack_.empty() && stack_[0].type == ValueType::list) {
    size_t dicts = 0;
    while (dicts + 1 < stack_.size() && stack_[dicts + 1].type == ValueType::dict) dicts++;
    if (dicts > 0) return "row " + std::to_string(values_.lists[stack_[0].at].count + dicts - 1);
  }
  return "byte " + std::to_string(at_);
}

void Interpreter::begin_frame() {
  const bool framed = at_ - 1 < frame_end_;
  const auto bytes = number(8);
  if (framed || bytes > static_cast<uint64_t>(end_ - at_)) {
    throw NotPlain("a frame begins in another or is cut off");
  }
  frame_end_ = at_ + static_cast<int64_t>(bytes);
}

void Interpreter::push_text(int bytes) {
  const auto length = number(bytes);
  const auto begin = take(length);
  stack_.push_back(values_.text(begin, length));
}

void Interpreter::push_bytes(int bytes) {
  const auto length = number(bytes);
  const auto begin = take(length);
  stack_.push_back({.type = ValueType::bytes, .count = static_cast<uint32_t>(length), .at = begin});
}

void Interpreter::push_long() {
  const auto bytes = static_cast<int>(number(1));
  if (bytes > 8) {
    take(bytes);
    return stack_.push_back({.type = ValueType::big_integer});
  }
  auto value = number(bytes);
  if (bytes > 0 && bytes < 8 && value >> (8 * bytes - 1)) value |= ~uint64_t{0} << (8 * bytes);
  stack_.push_back({.type = ValueType::integer, .at = static_cast<int64_t>(value)});
}

void Interpreter::push_tuple(size_t count) {
  if (stack_.size() - frame_start() < count)
    throw NotPlain("a tuple needs values that the stack does not hold");
  const auto tuple = values_.tuple(std::span(stack_).last(count));
  stack_.resize(stack_.size() - count);
  stack_.push_back(tuple);
}

// Python numbers memo entries consecutively. Other orders are rare, and a large number would be an
// attack on memory.
void Interpreter::put(uint64_t index) {
  if (index != memo_.size()) throw NotPlain("its memo entries are not numbered consecutively");
  memo_.push_back(top());
  memo_.back().fetched = false;
}

void Interpreter::get(uint64_t index) {
  if (index >= memo_.size()) throw NotPlain("it reads a memo entry that was not written");
  memo_[index].fetched = true;
  stack_.push_back(memo_[index]);
}

// Reads a line of text and returns its keyword.
Keyword Interpreter::line() {
  std::array<char, 64> text;
  for (size_t length = 0; length < text.size(); length++) {
    text[length] = static_cast<char>(byte());
    if (text[length] != '\n') continue;
    const std::string_view name(text.data(), length);
    const auto keyword = Values::keyword_of(name);
    if (keyword == Keyword::other) Values::throw_unknown(std::string(name));
    return keyword;
  }
  throw NotPlain("a name is longer than those of plain data");
}

// Runs an opcode that only pushes a value of the file; returns false for other opcodes.
bool Interpreter::push(uint8_t code) {
  switch (code) {
    case 'N': stack_.push_back({.type = ValueType::none}); return true;
    case 0x88: stack_.push_back({.type = ValueType::boolean, .at = 1}); return true;
    case 0x89: stack_.push_back({.type = ValueType::boolean}); return true;
    case 'K':
    case 'M': {
      const auto value = static_cast<int64_t>(number(code == 'K' ? 1 : 2));
      stack_.push_back({.type = ValueType::integer, .at = value});
      return true;
    }
    case 'J': {
      const auto value = static_cast<int32_t>(static_cast<uint32_t>(number(4)));
      stack_.push_back({.type = ValueType::integer, .at = value});
      return true;
    }
    case 0x8A: push_long(); return true;
    case 'G':
      stack_.push_back({.type = ValueType::real, .count = reals_++, .at = take(8) - 1});
      return true;
    case 0x8C: push_text(1); return true;
    case 'X': push_text(4); return true;
    case 0x8D: push_text(8); return true;
    case 'C': push_bytes(1); return true;
    case 'B': push_bytes(4); return true;
    case 0x8E:
    case 0x96: push_bytes(8); return true;  // 0x96: a bytearray, protocol 5's in-band data
    case ')': stack_.push_back(values_.tuple({})); return true;
    case ']': stack_.push_back(values_.list({})); return true;
    case '}': stack_.push_back(values_.dict()); return true;
    case 0x8F: stack_.push_back(values_.set_of(0)); return true;
    case 'h':
    case 'j': get(number(code == 'h' ? 1 : 4)); return true;
    default: return false;
  }
}

// Runs an opcode that takes the values above the last mark.
void Interpreter::step_with_mark(uint8_t code) {
  taken_.assign(stack_.begin() + static_cast<int64_t>(frame_start()), stack_.end());
  const std::span<const Value> taken = taken_;
  drop_mark();
  switch (code) {
    case '1': return;
    case 't': return stack_.push_back(values_.tuple(taken));
    case 'l': return stack_.push_back(values_.list(taken));
    case 'e': {
      const auto target = top(ValueType::list);
      for (const auto& value : taken) values_.append(target, value);
      return;
    }
    case 'u': {
      const auto target = top(ValueType::dict);
      if (taken.size() % 2) throw NotPlain("a dict has a key without a value");
      for (size_t i = 0; i < taken.size(); i += 2) values_.set(target, taken[i], taken[i + 1]);
      return;
    }
    default:
      for (const auto& value : taken) Values::check_key(value);
      if (code == 0x90) static_cast<void>(top(ValueType::set));
      const auto set = values_.set_of(taken.size());
      if (code == 0x91) stack_.push_back(set);
  }
}

bool Interpreter::step() {
  const auto code = byte();
  if (code != 'G' && !is_between_reals(code)) values_.reals_from = at_;
  if (push(code)) return true;
  switch (code) {
    case '.': return false;
    case 0x80: {
      const auto protocol = byte();
      if (protocol < 2 || protocol > 5) throw NotPlain("its protocol is not 2, 3, 4 or 5");
      return true;
    }
    case 0x95: begin_frame(); return true;
    case '(': marks_.push_back(stack_.size()); return true;
    case '0': pop(); return true;
    case 't':
    case 'l':
    case '1':
    case 'e':
    case 'u':
    case 0x90:
    case 0x91: step_with_mark(code); return true;
    case 0x85:
    case 0x86:
    case 0x87: push_tuple(code - 0x84); return true;
    case 'a': {
      const auto value = pop();
      values_.append(top(ValueType::list), value);
      return true;
    }
    case 's': {
      const auto value = pop(), key = pop();
      values_.set(top(ValueType::dict), key, value);
      return true;
    }
    case 'q':
    case 'r': put(number(code == 'q' ? 1 : 4)); return true;
    case 0x94: put(memo_.size()); return true;
    case 0x93: {
      const auto name = pop(), module = pop();
      if (name.type != ValueType::text || module.type != ValueType::text)
        throw NotPlain("the name of a global is not a text");
      stack_.push_back(values_.global(module, name));
      return true;
    }
    case 'c': {
      const auto module = line();
      stack_.push_back(
          values_.global({.keyword = module, .at = -1}, {.keyword = line(), .at = -1}));
      return true;
    }
    case 'R': {
      const auto arguments = pop(), name = pop();
      stack_.push_back(values_.call(name, arguments));
      return true;
    }
    case 'b': {
      const auto state = pop();
      values_.build(top(), state);
      return true;
    }
    default: throw NotPlain("it has an opcode that does not build plain data");
  }
}

}  // namespace

PickledList find_rows(Window& window, std::span<const std::string> names, int64_t max_steps) {
  if (window.begin() != 0 || window.end() > int64_t{kNowhere})
    throw NotPlain("it is 4 GiB or larger");
  Interpreter interpreter(window, names);
  try {
    return interpreter.run(max_steps);
  } catch (const NotPlain& fault) {
    throw NotPlain(interpreter.place() + ": " + fault.what());
  }
}

}  // namespace realign_fast::io
