// Defects that the address and the undefined-behaviour sanitizer must report: what shows that a clean run means
// something. Called through ctypes, on memory that torch allocated.
extern "C" {
#pragma GCC visibility push(default)

float beyond(const float* x, long n) { return x[n]; }

int overflow(int x) { return x + 1; }

#pragma GCC visibility pop
}
