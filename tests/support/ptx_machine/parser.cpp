#include "parser.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <sstream>

#include "instructions.h"

namespace ptx {
namespace {

const std::map<std::string, Special> kSpecials = {
    {"%tid.x", Special::thread},      {"%ctaid.x", Special::block_x},
    {"%ctaid.y", Special::block_y},   {"%nctaid.x", Special::blocks_x},
    {"%nctaid.y", Special::blocks_y}, {"%ntid.x", Special::threads},
};

std::string trimmed(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\n\r");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\n\r") - begin + 1);
}

// Splits "a, {b, c}, [d]" at the commas that are outside of braces and brackets.
std::vector<std::string> split_operands(const std::string& text) {
  std::vector<std::string> operands;
  std::string operand;
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) {
      operands.push_back(trimmed(operand));
      operand.clear();
    } else {
      operand += c;
    }
  }
  if (!trimmed(operand).empty()) operands.push_back(trimmed(operand));
  return operands;
}

std::string inside(const std::string& bracketed) {
  return trimmed(bracketed.substr(1, bracketed.size() - 2));
}

// Builds a kernel while its statements are read.
class Builder {
 public:
  Kernel kernel;

  void add_parameter(const std::string& declaration) {
    std::istringstream words(declaration);
    std::string word, name;
    int align = 0, element = 0;
    while (words >> word) {
      if (word == ".align") {
        words >> align;
      } else if (word[0] == '.' && word != ".param") {
        element = std::atoi(word.c_str() + 2) / 8;
      } else if (word[0] != '.') {
        name = word;
      }
    }
    const auto bracket = name.find('[');
    int bytes = element;
    if (bracket != std::string::npos) bytes = element * std::atoi(name.c_str() + bracket + 1);
    align = std::max({align, element, 1});
    const int offset = (kernel.parameter_bytes + align - 1) / align * align;
    kernel.parameters.push_back({offset, bytes});
    kernel.parameter_bytes = offset + bytes;
    symbols_[name.substr(0, bracket)] = kParameterBase + static_cast<uint64_t>(offset);
  }

  void add_label(const std::string& label) {
    labels_[label] = static_cast<int>(kernel.instructions.size());
  }

  void add_statement(std::string text) {
    if (text[0] == '.') return;  // declarations of registers, hints to the compiler
    Instruction instruction;
    instruction.text = text;
    if (text[0] == '@') {
      const auto end = text.find_first_of(" \t");
      instruction.negated = text[1] == '!';
      const size_t begin = instruction.negated ? 2 : 1;
      instruction.predicate = slot_of(text.substr(begin, end - begin));
      text = trimmed(text.substr(end));
    }
    const auto end = std::min(text.find_first_of(" \t"), text.size());
    const std::string opcode = text.substr(0, end);
    add_operands(instruction, opcode, split_operands(text.substr(end)));
    kernel.instructions.push_back(std::move(instruction));
  }

  Kernel finish() {
    for (const auto& [place, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw Fault("no label " + label);
      kernel.instructions[static_cast<size_t>(place)].target = found->second;
    }
    kernel.slots = slots_;
    return std::move(kernel);
  }

 private:
  int slot_of(const std::string& name) {
    const auto [found, is_new] = registers_.try_emplace(name, slots_);
    if (!is_new) return found->second;
    const int slot = slots_++;
    if (const auto special = kSpecials.find(name); special != kSpecials.end()) {
      kernel.specials.push_back({slot, special->second});
    } else if (const auto symbol = symbols_.find(name); symbol != symbols_.end()) {
      kernel.constants.push_back({slot, symbol->second});
    } else if (name[0] == '%') {
      if (name.find('.') != std::string::npos) throw Fault("the machine has no " + name);
    } else if (name.size() > 2 && name[0] == '0' &&
               std::string("fFdD").find(name[1]) != name.npos) {
      kernel.constants.push_back({slot, std::strtoull(name.c_str() + 2, nullptr, 16)});
    } else if (std::isdigit(static_cast<unsigned char>(name[0])) || name[0] == '-') {
      const uint64_t value = name[0] == '-'
                                 ? static_cast<uint64_t>(std::strtoll(name.c_str(), nullptr, 0))
                                 : std::strtoull(name.c_str(), nullptr, 0);
      kernel.constants.push_back({slot, value});
    } else {
      kernel.constants.push_back({slot, 0});  // the block's shared memory, which begins at 0
    }
    return slot;
  }

  void add_operands(Instruction& instruction, const std::string& opcode,
                    const std::vector<std::string>& operands) {
    std::string name = opcode;
    size_t count = 0;
    const auto add = [&](const std::string& operand) {
      instruction.operands.at(count++) = slot_of(operand);
    };
    const auto add_list = [&](const std::string& operand) {
      if (operand[0] != '{') return add(operand);
      const auto registers = split_operands(inside(operand));
      instruction.width = static_cast<int>(registers.size());
      for (const auto& part : registers) add(part);
    };
    const auto add_address = [&](const std::string& operand, int64_t& offset) {
      const std::string address = inside(operand);
      const auto plus = address.find('+');
      if (plus != std::string::npos) offset = std::strtoll(address.c_str() + plus + 1, nullptr, 0);
      add(trimmed(address.substr(0, plus)));
    };
    const auto parts = parts_of(opcode);
    if (parts[0] == "bra") {
      branches_.push_back({static_cast<int>(kernel.instructions.size()), operands.at(0)});
    } else if (parts[0] == "ld") {
      add_address(operands.at(1), instruction.offset);
      add_list(operands.at(0));
    } else if (parts[0] == "mov" && operands.at(0)[0] == '{') {
      name = "unpack." + parts[1];
      add_list(operands[0]);
      add(operands.at(1));
    } else if (parts[0] == "mov" && operands.at(1)[0] == '{') {
      name = "pack." + parts[1];
      add(operands[0]);
      add_list(operands[1]);
    } else if (parts[0] == "bar" && parts[1] == "sync") {
      if (operands != std::vector<std::string>{"0"}) throw Fault("a barrier other than 0");
    } else {
      if (parts[0] == "cp") instruction.width = static_cast<int>(operands.size());
      bool first_address = true;
      for (const std::string& operand : operands) {
        if (operand[0] == '[') {
          add_address(operand, first_address ? instruction.offset : instruction.second_offset);
          first_address = false;
        } else {
          add_list(operand.substr(0, operand.find('|')));
        }
      }
    }
    const Decoded decoded = decode(name);
    instruction.execute = decoded.execute;
    instruction.control = decoded.control;
    instruction.whole_warp = decoded.whole_warp;
  }

  int slots_ = 0;
  std::map<std::string, int> registers_, labels_;
  std::map<std::string, uint64_t> symbols_;
  std::vector<std::pair<int, std::string>> branches_;
};

bool is_label_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '$' || c == '_';
}

std::string without_comments(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text.compare(i, 2, "//") == 0) i = std::min(text.find('\n', i), text.size() - 1);
    plain += text[i];
  }
  return plain;
}

}  // namespace

std::map<std::string, std::string> kernels_of(const std::string& module) {
  std::map<std::string, std::string> kernels;
  const std::string text = without_comments(module), entry = ".entry ";
  for (size_t at = text.find(entry); at != std::string::npos; at = text.find(entry, at)) {
    at += entry.size();
    size_t end = text.find('{', text.find(')', at));
    for (int depth = 0; end < text.size(); ++end) {
      depth += (text[end] == '{') - (text[end] == '}');
      if (depth == 0) break;
    }
    kernels[trimmed(text.substr(at, text.find('(', at) - at))] = text.substr(at, end + 1 - at);
    at = end;
  }
  return kernels;
}

Kernel parse_kernel(const std::string& text) {
  Builder builder;
  const auto open = text.find('('), close = text.find(')', open), brace = text.find('{', close);
  builder.kernel.name = trimmed(text.substr(0, open));
  for (const auto& parameter : split_operands(text.substr(open + 1, close - open - 1)))
    builder.add_parameter(parameter);
  const auto limit = text.find(".maxntid ", close);
  if (limit < brace) builder.kernel.most_threads = std::atoi(text.c_str() + limit + 9);
  const std::string body = text.substr(brace + 1, text.rfind('}') - brace - 1);
  for (size_t at = 0;;) {
    // Braces between statements only limit the names that inline assembly declares.
    at = body.find_first_not_of(" \t\n\r{};", at);
    if (at == std::string::npos) break;
    size_t end = at;
    while (end < body.size() && is_label_character(body[end])) ++end;
    if (body[end] == ':') {
      builder.add_label(body.substr(at, end - at));
      at = end + 1;
      continue;
    }
    end = std::min(body.find(';', at), body.size());
    builder.add_statement(trimmed(body.substr(at, end - at)));
    at = end;
  }
  return builder.finish();
}

}  // namespace ptx
