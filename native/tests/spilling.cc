// A loop with more accumulators than registers, of WIDTH bytes each: what spills.py must report.
typedef float Vector __attribute__((vector_size(WIDTH)));

void spilling(const Vector* x, long n, Vector* out) {
  constexpr int kAccumulators = 40;
  Vector sums[kAccumulators];
#pragma GCC unroll 40
  for (int j = 0; j < kAccumulators; ++j) sums[j] = Vector{};
  for (long i = 0; i < n; ++i) {
    const Vector a = x[i];
#pragma GCC unroll 40
    for (int j = 0; j < kAccumulators; ++j) sums[j] = sums[j] * a + sums[(j + 1) % kAccumulators];
  }
#pragma GCC unroll 40
  for (int j = 0; j < kAccumulators; ++j) out[j] = sums[j];
}
