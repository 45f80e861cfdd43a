// Splitting a range over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(FQTSTATS_STD_THREADS)  // for the thread sanitizer, which cannot see into an OpenMP runtime
#include <atomic>
#include <thread>
#include <typeinfo>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace fqtstats::cpu {

#if defined(FQTSTATS_STD_THREADS)
// One for every call of split in the program, for native/tests/threads.cc: have several threads run it?
struct Place {
  const char* body;
  std::atomic<bool> shared = false;
  const Place* next;
  explicit Place(const char* name) : body(name), next(first) { first = this; }
  static inline const Place* first = nullptr;
};
template <typename Body>
inline Place place{typeid(Body).name()};
#endif

// Calls body(begin, end) on disjoint ranges that cover [0, total), on at most `threads` threads, and on no more than
// one per `grain` items. With one thread no OpenMP region is entered, so a forked child may call this: an OpenMP pool
// does not survive a fork. body must not throw. Callers pass the thread count that they were given: see below.
template <typename Body>
void split(std::int64_t total, std::int64_t grain, int threads, const Body& body) {
  [[maybe_unused]] const std::int64_t parts = std::min<std::int64_t>(threads, total / grain);
#if defined(FQTSTATS_STD_THREADS)
  if (parts > 1) {
    place<Body>.shared.store(true, std::memory_order_relaxed);  // relaxed: hides no race
    std::vector<std::thread> team;
    for (std::int64_t t = 0; t < parts; ++t)
      team.emplace_back([&, t] { body(total * t / parts, total * (t + 1) / parts); });
    for (std::thread& thread : team) thread.join();
    return;
  }
#elif defined(_OPENMP)
  if (parts > 1) {
    // A team is always of the same size, though some of it may have nothing to do: libgomp ends the threads that the
    // next team has no use for, and with them goes their scratch memory.
#pragma omp parallel num_threads(threads)
    {
      // The runtime may give fewer threads than were asked for.
      const std::int64_t t = omp_get_thread_num(), team = std::min<std::int64_t>(parts, omp_get_num_threads());
      if (t < team) body(total * t / team, total * (t + 1) / team);
    }
    return;
  }
#endif
  body(std::int64_t{0}, total);
}

}  // namespace fqtstats::cpu
