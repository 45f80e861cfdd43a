// To be preloaded: counts the allocations that native code makes during a call from Python, for steady.py. What holds
// the interpreter's lock is Python's or the binding's, on the way in and out; kernels run without it, on any thread.
//
// Aligned memory comes from the next library that offers it: guard.cc where that is preloaded after this one.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>

extern "C" void* __libc_malloc(std::size_t size);
extern "C" void* __libc_calloc(std::size_t count, std::size_t size);
extern "C" void* __libc_realloc(void* p, std::size_t size);
extern "C" void* __libc_memalign(std::size_t alignment, std::size_t size);
extern "C" [[gnu::weak]] int PyGILState_Check();  // the process may be another program than Python

namespace {

constexpr std::size_t kLarge = 4096;  // neither an argument nor a message of the binding

std::atomic<bool> counting{false};
std::atomic<long> count{0};
thread_local bool caller = false;

void note(std::size_t size) {
  if (!counting.load(std::memory_order_relaxed)) return;
  if (PyGILState_Check() == 0 || (caller && size >= kLarge)) ++count;
}

}  // namespace

#pragma GCC visibility push(default)

extern "C" {

void allocations_start() {
  count = 0;
  caller = true;
  counting = true;
}

long allocations_stop() {
  counting = false;
  caller = false;
  return count;
}

void* malloc(std::size_t size) {
  note(size);
  return __libc_malloc(size);
}

void* calloc(std::size_t n, std::size_t size) {
  note(n * size);
  return __libc_calloc(n, size);
}

void* realloc(void* p, std::size_t size) {
  note(size);
  return __libc_realloc(p, size);
}

void* memalign(std::size_t alignment, std::size_t size) {
  note(size);
  return __libc_memalign(alignment, size);
}

void* aligned_alloc(std::size_t alignment, std::size_t size) { return memalign(alignment, size); }

int posix_memalign(void** out, std::size_t alignment, std::size_t size) {
  using Function = int(void**, std::size_t, std::size_t);
  static auto* const next = reinterpret_cast<Function*>(dlsym(RTLD_NEXT, "posix_memalign"));
  note(size);
  return next(out, alignment, size);
}

}  // extern "C"

#pragma GCC visibility pop
