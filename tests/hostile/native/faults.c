// A library for LD_PRELOAD that lets one call of the system fail, or write a part of its bytes, on
// files below a folder, or does something else before that call. tests/hostile/faults.py arms it in
// a fork and counts the calls.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[4096];
static atomic_long calls;
static long failing_call = -1;  // counted from 0
static int failing_errno;       // 0: a write of half the bytes
static char failed[4352];       // the name of the call that failed, and its file
static void (*action)(void);    // is called before the call, which then goes on
static atomic_long clock_step;  // seconds that the clock of the day is ahead

// Watches the files below `path` from now on; call number `at` fails with `error`.
void faults_arm(const char* path, long at, int error) {
  snprintf(folder, sizeof folder, "%s/", path);
  failing_call = at;
  failing_errno = error;
  failed[0] = 0;
  action = NULL;
  atomic_store(&calls, 0);
}

// The call that was armed does not fail: `act` runs before it.
void faults_act(void (*act)(void)) { action = act; }
void faults_step_clock(long seconds) { atomic_store(&clock_step, seconds); }
void faults_disarm(void) { folder[0] = 0; }
long faults_calls(void) { return atomic_load(&calls); }
const char* faults_failed(void) { return failed; }

static int fails(const char* name, const char* path) {
  if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
  if (atomic_fetch_add(&calls, 1) != failing_call) return 0;
  snprintf(failed, sizeof failed, "%s %s", name, path);
  if (action) {
    action();
    return 0;
  }
  errno = failing_errno;
  return 1;
}

static int fails_of(const char* name, int descriptor) {
  char link[64], path[4096];
  if (!folder[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(name, path);
}

// A path relative to an open folder, made absolute. Fails where the folder is not known.
static const char* absolute(int at, const char* path, char* buffer, size_t size) {
  if (!path || path[0] == '/' || at == AT_FDCWD) return path;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  const ssize_t length = readlink(link, buffer, size - 1);
  if (length < 0 || (size_t)length + strlen(path) + 2 > size) return path;
  buffer[length] = '/';
  strcpy(buffer + length + 1, path);
  return buffer;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_PATH(type, name, path, parameters, arguments)        \
  type name parameters {                                        \
    if (fails(#name, path) && failing_errno) return (type)(-1); \
    return REAL(name) arguments;                                \
  }
#define ON_FILE(type, name, parameters, arguments)                      \
  type name parameters {                                                \
    if (fails_of(#name, descriptor) && failing_errno) return (type)(-1); \
    return REAL(name) arguments;                                        \
  }
// A write that is short in place of failing: half of its bytes, at least one.
#define ON_WRITE(name, parameters, arguments, half_arguments) \
  ssize_t name parameters {                                   \
    if (fails_of(#name, descriptor)) {                        \
      if (failing_errno) return -1;                           \
      const size_t half = bytes / 2 + bytes % 2;              \
      return REAL(name) half_arguments;                       \
    }                                                         \
    return REAL(name) arguments;                              \
  }
#define OPEN(name)                                             \
  int name(const char* path, int flags, ...) {                 \
    va_list rest;                                              \
    va_start(rest, flags);                                     \
    const mode_t mode = va_arg(rest, mode_t);                  \
    va_end(rest);                                              \
    if (fails(#name, path) && failing_errno) return -1;        \
    return REAL(name)(path, flags, mode);                      \
  }
#define OPENAT(name)                                                                      \
  int name(int at, const char* path, int flags, ...) {                                    \
    char buffer[8192];                                                                    \
    va_list rest;                                                                         \
    va_start(rest, flags);                                                                \
    const mode_t mode = va_arg(rest, mode_t);                                             \
    va_end(rest);                                                                         \
    if (fails(#name, absolute(at, path, buffer, sizeof buffer)) && failing_errno) return -1; \
    return REAL(name)(at, path, flags, mode);                                             \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ON_PATH(int, mkdir, path, (const char* path, mode_t mode), (path, mode))
ON_PATH(int, unlink, path, (const char* path), (path))
ON_PATH(int, rmdir, path, (const char* path), (path))
ON_PATH(int, rename, to, (const char* from, const char* to), (from, to))
ON_PATH(int, link, to, (const char* from, const char* to), (from, to))
ON_PATH(int, symlink, to, (const char* from, const char* to), (from, to))
ON_PATH(int, truncate, path, (const char* path, off_t size), (path, size))
ON_FILE(ssize_t, read, (int descriptor, void* data, size_t bytes), (descriptor, data, bytes))
ON_FILE(ssize_t, pread, (int descriptor, void* data, size_t bytes, off_t at),
        (descriptor, data, bytes, at))
ON_FILE(ssize_t, pread64, (int descriptor, void* data, size_t bytes, off64_t at),
        (descriptor, data, bytes, at))
ON_FILE(int, fsync, (int descriptor), (descriptor))
ON_FILE(int, fdatasync, (int descriptor), (descriptor))
ON_FILE(int, ftruncate, (int descriptor, off_t size), (descriptor, size))
ON_FILE(int, ftruncate64, (int descriptor, off64_t size), (descriptor, size))
ON_FILE(int, fchmod, (int descriptor, mode_t mode), (descriptor, mode))
ON_WRITE(write, (int descriptor, const void* data, size_t bytes), (descriptor, data, bytes),
         (descriptor, data, half))
ON_WRITE(pwrite, (int descriptor, const void* data, size_t bytes, off_t at),
         (descriptor, data, bytes, at), (descriptor, data, half, at))
ON_WRITE(pwrite64, (int descriptor, const void* data, size_t bytes, off64_t at),
         (descriptor, data, bytes, at), (descriptor, data, half, at))

int clock_gettime(clockid_t clock, struct timespec* now) {
  const int status = REAL(clock_gettime)(clock, now);
  if (status == 0 && clock == CLOCK_REALTIME) now->tv_sec += atomic_load(&clock_step);
  return status;
}
int gettimeofday(struct timeval* now, void* zone) {
  const int status = REAL(gettimeofday)(now, zone);
  if (status == 0) now->tv_sec += atomic_load(&clock_step);
  return status;
}
time_t time(time_t* now) {
  const time_t seconds = REAL(time)(NULL) + atomic_load(&clock_step);
  if (now) *now = seconds;
  return seconds;
}
