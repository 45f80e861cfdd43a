// To be preloaded: every tensor that torch allocates ends where inaccessible memory begins, to the next multiple of
// four bytes, and becomes inaccessible when it is freed. So an access beyond it is a crash, also by masked and
// streaming instructions, which the address sanitizer does not see.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

extern "C" void* __libc_memalign(std::size_t alignment, std::size_t size);
extern "C" void __libc_free(void* p);

namespace {

constexpr std::size_t kPage = 4096, kRegion = std::size_t{1} << 40;
constexpr std::size_t kTorch = 64;  // the alignment that torch asks for

char* reserve(std::size_t size, int protection) {
  return static_cast<char*>(mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

char* region() {
  static char* const start = reserve(kRegion, PROT_NONE);
  return start;
}

// Pages of the block whose first page is p.
std::uint32_t& pages_of(std::size_t p) {
  static auto* const table =
      reinterpret_cast<std::uint32_t*>(reserve(kRegion / kPage * sizeof(std::uint32_t), PROT_READ | PROT_WRITE));
  return table[p];
}

std::atomic<std::size_t> next_page{0};

}  // namespace

#pragma GCC visibility push(default)

extern "C" int posix_memalign(void** out, std::size_t alignment, std::size_t size) {
  if (alignment != kTorch) {
    *out = __libc_memalign(alignment, size);
    return *out == nullptr ? ENOMEM : 0;
  }
  size = std::max<std::size_t>((size + 3) / 4 * 4, 4);
  const std::size_t pages = (size + kPage - 1) / kPage, first = next_page.fetch_add(pages + 1);
  if (first + pages >= kRegion / kPage) return ENOMEM;
  char* const start = region() + first * kPage;
  if (mprotect(start, pages * kPage, PROT_READ | PROT_WRITE) != 0) return ENOMEM;
  pages_of(first) = static_cast<std::uint32_t>(pages);
  *out = start + pages * kPage - size;
  return 0;
}

extern "C" void free(void* p) {
  const std::size_t offset = reinterpret_cast<std::uintptr_t>(p) - reinterpret_cast<std::uintptr_t>(region());
  if (offset >= kRegion) {
    __libc_free(p);
    return;
  }
  // Mapped anew, so that the memory goes back to the system.
  mmap(region() + offset / kPage * kPage, pages_of(offset / kPage) * kPage, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

#pragma GCC visibility pop
