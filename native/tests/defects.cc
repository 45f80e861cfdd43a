// Defects that the checks must report: what shows that a clean run means something. Called through ctypes, on memory
// that torch allocated.
#include <cstdlib>
#include <new>

extern "C" {
#pragma GCC visibility push(default)

float beyond(const float* x, long n) { return x[n]; }

int overflow(int x) { return x + 1; }

// One allocation of either kind. The calls are the library's, which the compiler must keep.
void allocate() {
  ::operator delete(::operator new(1));
  void* p = nullptr;
  if (posix_memalign(&p, 64, 1) == 0) std::free(p);
}

#pragma GCC visibility pop
}
