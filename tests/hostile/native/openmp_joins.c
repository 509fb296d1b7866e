// A library for LD_PRELOAD that tells ThreadSanitizer where threads of OpenMP begin and join.
//
// torch runs the kernels in GOMP_parallel, and neither torch nor libgomp is compiled for
// ThreadSanitizer: it sees no order between the thread that calls and those that work. OpenMP
// promises this order (a parallel region begins after the calling thread reached it, and ends after
// a barrier), and nothing about the threads among each other.
// Beginning and end have an address each, so a thread that ends is not ordered before one that
// begins later, and races between them are still found.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>

void __tsan_acquire(void* address);
void __tsan_release(void* address);

struct Region {
  void (*body)(void*);
  void* data;
  char begun, ended;
};

static void run(void* argument) {
  struct Region* region = argument;
  __tsan_acquire(&region->begun);
  region->body(region->data);
  __tsan_release(&region->ended);
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  void (*next)(void (*)(void*), void*, unsigned, unsigned) = dlsym(RTLD_NEXT, "GOMP_parallel");
  if (!next) abort();
  struct Region region = {body, data, 0, 0};
  __tsan_release(&region.begun);
  next(run, &region, threads, flags);
  __tsan_acquire(&region.ended);
}
