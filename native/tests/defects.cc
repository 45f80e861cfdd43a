// Defects that the checks must report: what shows that a clean run means something. Called through ctypes, on memory
// that torch allocated.
#include <new>

extern "C" {
#pragma GCC visibility push(default)

float beyond(const float* x, long n) { return x[n]; }

int overflow(int x) { return x + 1; }

// The calls are the library's, which the compiler must keep.
void allocate() { ::operator delete(::operator new(1)); }

#pragma GCC visibility pop
}
