// The errors of the readers. No Python, no torch.
#pragma once

#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace realign_fast::io {

// The file is damaged, or written in a way that this reader does not support; the message says in
// which. The Python reader of the format takes over.
struct NotPlain : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws the error of the last system call.
[[noreturn]] inline void throw_errno() { throw std::system_error(errno, std::generic_category()); }

}  // namespace realign_fast::io
