/* Which instruction set serves, and how work is shared among threads. */
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "parts.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t kPart = uint64_t{1} << 16; /* elements that a thread takes at a time */
constexpr uint64_t kLeast = uint64_t{1} << 15; /* fewer are not worth a second thread */

typedef void (*Openmp)(void (*work)(void *), void *data, unsigned num_threads, unsigned flags);
inline std::atomic<Openmp> &openmp() {
  static std::atomic<Openmp> call{nullptr};
  return call;
}

/* Denormals count in the bit contract: neither flushed nor taken for zero, whatever the caller set. */
class Denormals {
 public:
#if defined(__x86_64__) || defined(__i386__)
  Denormals() : before_(_mm_getcsr()) { _mm_setcsr((before_ & ~0xE040u) | 0x1F80u); }
  ~Denormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  Denormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ & ~uint64_t{0x1C80000}));
  }
  ~Denormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

/* Calls part(0) ... part(count - 1), each once, on up to num_threads threads. */
template <class Part>
void in_parallel(uint64_t count, uint64_t num_threads, Part part) {
  struct Shared {
    Part &part;
    uint64_t count;
    std::atomic<uint64_t> next{0};
  } shared{part, count};
  const auto work = [](void *data) {
    Shared &all = *static_cast<Shared *>(data);
    const Denormals kept;
    for (uint64_t i; (i = all.next.fetch_add(1, std::memory_order_relaxed)) < all.count;)
      all.part(i);
  };
  if (num_threads > count) num_threads = count;
  const Openmp call = openmp().load();
  if (num_threads > 1 && call) {
    call(work, &shared, unsigned(num_threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (uint64_t i = 1; i < num_threads; ++i) others.emplace_back(work, &shared);
  } catch (...) { /* no more threads to be had: those there are do it all */
  }
  work(&shared);
  for (std::thread &other : others) other.join();
}

inline bool runs_here(uint32_t isa) {
  switch (isa) {
    case ZO_SCALAR:
      return true;
#if defined(ZO_WITH_NEON)
    case ZO_NEON:
      return true;
#endif
#if defined(ZO_WITH_AVX2)
    case ZO_AVX2:
      return __builtin_cpu_supports("avx2");
#endif
#if defined(ZO_WITH_AVX512)
    case ZO_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

inline const zo_parts *parts_of(uint32_t isa) {
  if (!runs_here(isa)) return nullptr;
  switch (isa) {
#if defined(ZO_WITH_NEON)
    case ZO_NEON:
      return &zo_neon;
#endif
#if defined(ZO_WITH_AVX2)
    case ZO_AVX2:
      return &zo_avx2;
#endif
#if defined(ZO_WITH_AVX512)
    case ZO_AVX512:
      return &zo_avx512;
#endif
    default:
      return &zo_scalar;
  }
}

}  // namespace
