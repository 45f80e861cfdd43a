// Working memory that is kept between calls: no allocation in the steady state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fqtstats::cpu {

// One grow-only buffer per thread and Tag. The contents do not survive the next call with the same Tag on the same
// thread. Aligned to 64 bytes, and readable for another 64 bytes beyond the end. Throws std::bad_alloc: call it before
// any parallel region, or in a thread's own share of one only where the size is bounded and small.
template <typename Tag, typename T>
T* scratch(std::int64_t count) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, kAlignment); }
  };
  thread_local std::unique_ptr<std::byte[], Free> buffer;
  thread_local std::size_t capacity = 0;
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T) + 64;
  if (bytes > capacity) {
    buffer.reset();
    capacity = 0;
    const std::size_t grown = bytes + bytes / 4;
    buffer.reset(static_cast<std::byte*>(::operator new[](grown, kAlignment)));
    capacity = grown;
  }
  return reinterpret_cast<T*>(buffer.get());
}

}  // namespace fqtstats::cpu
