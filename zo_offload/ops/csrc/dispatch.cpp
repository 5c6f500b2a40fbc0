/* The exported functions: which instruction set, how many threads, which part for whom. */

#include "codec_dispatch.h"
#include "crc.h"
#include "parallel.h"

namespace {

constexpr uint64_t kCrcPart = uint64_t{1} << 20; /* bytes */

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
  if (job.codec == ZO_IDENTITY) return true;
  return is_codec(job.codec, job.group) && all[0].start == 0 && !job.num_steps;
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

void zo_use_openmp(void *gomp_parallel) { openmp() = reinterpret_cast<Openmp>(gomp_parallel); }

int zo_run(const zo_job *job, uint32_t isa) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  if (!is_sound(*job)) return ZO_BAD_JOB;
  if (job->codec != ZO_IDENTITY && !can_be_read(packed_of(*job))) return ZO_BAD_BYTES;
  std::atomic<int> status{ZO_OK};
  const uint64_t count = (job->count + kPart - 1) / kPart;
  in_parallel(job->count > kLeast ? count : 1, job->num_threads, [&](uint64_t i) {
    const uint64_t start = i * kPart, stop = start + kPart < job->count ? start + kPart : job->count;
    const int found = parts->run(*job, job->first + start, job->first + stop);
    if (found != ZO_OK) status = found;
  });
  return status;
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

int zo_encode(const zo_pack *pack, uint32_t isa, uint64_t *used) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  if (!is_sound(*pack)) return ZO_BAD_JOB;
  const uint64_t most = capacity_of(pack->codec, pack->group, pack->format, pack->elements);
  if (pack->packed_bytes < most) return ZO_BAD_BYTES;
  *used = pack->codec == ZO_LOSSLESS12 ? encode_twelve(*pack, *parts) : encode_fixed(*pack, *parts);
  return ZO_OK;
}

int zo_decode(const zo_pack *pack, uint32_t isa) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  if (!is_sound(*pack)) return ZO_BAD_JOB;
  if (!can_be_read(packed_of(*pack))) return ZO_BAD_BYTES;
  std::atomic<bool> whole{true};
  in_parts(pack->count, pack->num_threads, [&](uint64_t start, uint64_t stop) {
    if (!parts->unpack(*pack, pack->first + start, pack->first + stop)) whole = false;
  });
  return whole ? ZO_OK : ZO_BAD_BYTES;
}


int zo_lay_out(const zo_values *values, uint32_t isa) {
  const zo_parts *parts = parts_of(isa);
  if (!parts) return ZO_NO_SUCH_ISA;
  const bool needs_rest = values->format == ZO_BF16 || values->format == ZO_BF16_8;
  if (values->format > ZO_BF16_SR || (needs_rest && !values->rest && values->count))
    return ZO_BAD_JOB;
  const uint64_t count = (values->count + kPart - 1) / kPart;
  in_parallel(count, values->num_threads, [&](uint64_t i) {
    const uint64_t start = i * kPart, stop = start + kPart;
    parts->encode(*values, start, stop < values->count ? stop : values->count);
  });
  return ZO_OK;
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
