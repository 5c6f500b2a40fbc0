/* The exported functions: which instruction set, how many threads, which part for whom. */

#include <atomic>
#include <new>
#include <thread>
#include <vector>

#include "crc.h"
#include "parts.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t kPart = uint64_t{1} << 16; /* elements that a thread takes at a time */
constexpr uint64_t kCrcPart = uint64_t{1} << 20; /* bytes */
constexpr uint64_t kLeast = uint64_t{1} << 15; /* fewer are not worth a second thread */

typedef void (*Openmp)(void (*work)(void *), void *data, unsigned num_threads, unsigned flags);
std::atomic<Openmp> openmp{nullptr};

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
  const Openmp call = openmp.load();
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

bool runs_here(uint32_t isa) {
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

const zo_parts *parts_of(uint32_t isa) {
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

bool is_sound(const zo_job &job) {
  if (job.format > ZO_BF16_SR || job.direction > ZO_GAUSSIAN) return false;
  if (job.first % 128 || job.count % 128 || !job.num_segments) return false;
  if (job.direction == ZO_GAUSSIAN && !job.cells) return false;
  const zo_segment *all = job.segments;
  if (job.first < all[0].start || job.first + job.count > all[job.num_segments - 1].stop)
    return false;
  for (uint32_t i = 0; i < job.num_segments; ++i) {
    if (all[i].start % 128 || all[i].stop % 128 || all[i].start >= all[i].stop) return false;
    if (i && all[i].start != all[i - 1].stop) return false;
  }
  return true;
}

}  // namespace

extern "C" {

uint32_t zo_version(void) { return ZO_VERSION; }

uint32_t zo_has_isa(uint32_t isa) { return runs_here(isa); }

uint32_t zo_best_isa(void) {
  uint32_t isa = ZO_AVX512;
  while (!runs_here(isa)) --isa;
  return isa;
}

void zo_use_openmp(void *gomp_parallel) { openmp = reinterpret_cast<Openmp>(gomp_parallel); }

int zo_run(const zo_job *job, uint32_t isa) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  if (!is_sound(*job)) return ZO_BAD_JOB;
  std::atomic<bool> whole{true};
  const uint64_t count = (job->count + kPart - 1) / kPart;
  in_parallel(job->count > kLeast ? count : 1, job->num_threads, [&](uint64_t i) {
    const uint64_t start = i * kPart, stop = start + kPart < job->count ? start + kPart : job->count;
    if (!parts->run(*job, job->first + start, job->first + stop)) whole = false;
  });
  return whole ? ZO_OK : ZO_NO_MEMORY;
}

int zo_run_rows(const zo_rows *rows, uint32_t isa) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  if (rows->format > ZO_BF16_SR || rows->direction > ZO_GAUSSIAN || !rows->width) return ZO_BAD_JOB;
  std::atomic<bool> whole{true};
  const uint64_t step = kLeast / rows->width + 1, count = (rows->num_rows + step - 1) / step;
  in_parallel(count, rows->num_threads, [&](uint64_t i) {
    const uint64_t first = i * step, last = first + step;
    if (!parts->run_rows(*rows, first, last < rows->num_rows ? last : rows->num_rows))
      whole = false;
  });
  return whole ? ZO_OK : ZO_NO_MEMORY;
}

int zo_copy(void *out, const void *from, uint64_t bytes, uint32_t num_threads, uint32_t isa) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  in_parallel((bytes + kPart - 1) / kPart, num_threads, [&](uint64_t i) {
    const uint64_t start = i * kPart, length = bytes - start < kPart ? bytes - start : kPart;
    parts->copy(static_cast<char *>(out) + start, static_cast<const char *>(from) + start, length);
  });
  return ZO_OK;
}

int zo_digest(const uint32_t *words, uint64_t count, uint64_t first, uint32_t num_threads,
              uint32_t isa, uint64_t *digest) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  std::atomic<uint64_t> sum{0};
  in_parallel((count + kPart - 1) / kPart, num_threads, [&](uint64_t i) {
    const uint64_t start = i * kPart, length = count - start < kPart ? count - start : kPart;
    sum += parts->digest(words + start, length, first + start);
  });
  *digest = sum;
  return ZO_OK;
}

int zo_crc32c(const void *data, uint64_t bytes, uint32_t initial, uint32_t num_threads,
              uint32_t isa, uint32_t *crc) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  const unsigned char *at = static_cast<const unsigned char *>(data);
  const uint64_t count = (bytes + kCrcPart - 1) / kCrcPart;
  if (count <= 1 || num_threads <= 1) {
    *crc = parts->crc32c(initial, at, bytes);
    return ZO_OK;
  }
  std::vector<uint32_t> found;
  try {
    found.resize(count);
  } catch (const std::bad_alloc &) {
    return ZO_NO_MEMORY;
  }
  const auto length = [&](uint64_t i) {
    return i + 1 < count ? kCrcPart : bytes - i * kCrcPart;
  };
  in_parallel(count, num_threads, [&](uint64_t i) {
    found[i] = parts->crc32c(i ? 0 : initial, at + i * kCrcPart, length(i));
  });
  const uint32_t shift = crc_shift(kCrcPart);
  *crc = found[0];
  for (uint64_t i = 1; i < count; ++i)
    *crc = crc_times(i + 1 < count ? shift : crc_shift(length(i)), *crc) ^ found[i];
  return ZO_OK;
}

}  // extern "C"
