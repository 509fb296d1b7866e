#include "io/mapped_range.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>

#include "io/errors.h"

namespace realign_fast::io {

// An entry of a list that only grows. Entries are used again, and every field is atomic: the
// handler reads them in the middle of anything, and so may a forked process.
struct MappedRange::Entry {
  std::atomic<bool> used{true}, lost{false};
  std::atomic<uintptr_t> begin{0}, end{0};  // `end` is 0 while they change
  Entry* next = nullptr;
};

namespace {

std::atomic<MappedRange::Entry*> entries;
struct sigaction previous;
uintptr_t page_bytes = 0;

MappedRange::Entry* take_entry() {
  for (auto* entry = entries.load(); entry != nullptr; entry = entry->next) {
    if (!entry->used.exchange(true)) return entry;
  }
  auto* entry = new MappedRange::Entry;
  entry->next = entries.load();
  while (!entries.compare_exchange_weak(entry->next, entry)) {
  }
  return entry;
}

// Puts zeros in place of the rest of the range that holds the address; only calls what a handler
// may call.
bool replace_lost_pages(uintptr_t address) {
  for (auto* entry = entries.load(); entry != nullptr; entry = entry->next) {
    const auto end = entry->end.load(), begin = entry->begin.load();
    if (address < begin || address >= end || entry->end.load() != end) continue;
    const auto page = address - address % page_bytes;
    void* zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    entry->lost = true;
    return zeros != MAP_FAILED;
  }
  return false;
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const auto error = errno;
  const bool is_lost_page =
      info->si_code == BUS_ADRERR && replace_lost_pages(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = error;
  if (is_lost_page) return;
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    return previous.sa_handler(signal);
  }
  std::signal(SIGBUS, SIG_DFL);  // the instruction fails again, or the signal is sent again
  if (info->si_code <= 0) raise(signal);
}

}  // namespace

MappedRange::MappedRange(const void* begin, int64_t bytes) : entry_(take_entry()) {
  entry_->lost = false;
  entry_->begin = reinterpret_cast<uintptr_t>(begin);
  entry_->end = reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes);
}

MappedRange::~MappedRange() {
  entry_->end = 0;
  entry_->used = false;
}

bool MappedRange::lost() const { return entry_->lost; }

void survive_lost_pages() {
  static std::once_flag once;
  std::call_once(once, [] {
    page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = &on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &previous) != 0) throw_errno();
  });
}

}  // namespace realign_fast::io
