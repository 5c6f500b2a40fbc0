/* The kernels for one instruction set; compiled once for each, with ZO_BUILD_<ISA> defined. */

#include <type_traits>

#include "crc.h"
#include "parts.h"
#include "tile.h"
#if defined(ZO_BUILD_AVX512)
#include "fused_avx512.h"
#endif

namespace {

uint32_t draws_in(const zo_step *steps, uint32_t num_steps) {
  uint32_t total = 0;
  for (uint32_t s = 0; s < num_steps; ++s) total += steps[s].num_draws;
  return total;
}

/* A thread's room, with a table for each draw where the direction needs them. */
struct Workshop {
  std::unique_ptr<Room> room{new (std::nothrow) Room};
  std::unique_ptr<Table[]> tables;

  bool open(uint32_t direction, uint32_t num_draws) {
    if (!room) return false;
    if (direction == ZO_GAUSSIAN) {
      tables.reset(new (std::nothrow) Table[num_draws]);
      if (!tables) return false;
      room->tables = tables.get();
    }
    return true;
  }
};

#if defined(ZO_BUILD_AVX512)
template <class Z>
using InRegisters = std::conditional_t<std::is_same<Z, Signs>::value, FusedSigns, FusedCells>;
#endif

/* False where a packed wire is damaged. */
template <class Z>
bool walk(const zo_job &job, uint64_t start, uint64_t stop, Room &room) {
  const uint32_t of_steps = draws_in(job.steps, job.num_steps);
  const uint32_t ahead = draws_in(job.ahead, job.num_ahead);
#if defined(ZO_BUILD_AVX512)
  const Fused fused(job);
#endif
  uint32_t low = 0, high = job.num_segments; /* the segment that holds `start` */
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    (job.segments[middle].start <= start ? low : high) = middle;
  }
  for (uint64_t at = start; at < stop;) {
    while (at >= job.segments[low].stop) ++low;
    const zo_segment &segment = job.segments[low];
    const uint64_t end = segment.stop < stop ? segment.stop : stop;
    const uint32_t count = uint32_t(end - at < kTile ? end - at : kTile);
    const uint64_t before = uint64_t{segment.block} * kAlign;
    const Place place = {at - segment.start + before, segment.parameter, segment.scale};
#if defined(ZO_BUILD_AVX512)
    if (fused.fits)
      fused_tile<InRegisters<Z>>(job, fused, place, at, count, room);
    else
#endif
        if (!walk_tile<Z>(job, place, at, count, of_steps, ahead, room))
      return false;
    at += count;
  }
  return true;
}

template <class Z>
void walk_rows(const zo_rows &job, uint64_t first, uint64_t last, Room &room) {
  for (uint64_t r = first; r < last; ++r) {
    const uint64_t row = uint64_t(job.rows[r]) * job.width;
    for (uint64_t done = 0; done < job.width;) {
      const uint64_t at = row + done, element = at + job.offset;
      const uint64_t aligned = element / kAlign * kAlign;
      const uint32_t skip = uint32_t(element - aligned);
      const uint64_t left = job.width - done;
      const uint32_t count = uint32_t(left < kTile - skip ? left : kTile - skip);
      const uint32_t whole = (skip + count + kAlign - 1) / kAlign * kAlign;
      const Place place = {aligned, job.parameter, job.scale};
      words_of(job.draw, kNoise, place, whole, Z::kPerBlock, room.words);
      const Z z(job.draw.coefficient * job.scale, room.tables, job.cells, room.words, whole, room);
      float *__restrict sum = room.sum;
      z.over(whole, [=](uint32_t e, float term) { sum[e] = term; });
      float *__restrict value = room.value;
      decode_wire(job.format, job.wire, at, count, value);
      for (uint32_t e = 0; e < count; ++e) value[e] += sum[skip + e];
      const uint64_t to = r * job.width + done;
      uint16_t *halves = static_cast<uint16_t *>(job.out) + to;
      if (job.format == ZO_FP32)
        for (uint32_t e = 0; e < count; ++e)
          static_cast<float *>(job.out)[to + e] = float_of(canonical(bits_of(value[e])));
      else if (job.format == ZO_FP16)
        for (uint32_t e = 0; e < count; ++e) halves[e] = float_to_half(bits_of(value[e]));
      else
        for (uint32_t e = 0; e < count; ++e) halves[e] = uint16_t(nearest_bf16(bits_of(value[e])));
      done += count;
    }
  }
}

int run_part(const zo_job &job, uint64_t start, uint64_t stop) {
  Workshop workshop;
  const uint32_t draws =
      draws_in(job.steps, job.num_steps) + draws_in(job.ahead, job.num_ahead) + job.num_points;
  if (!workshop.open(job.direction, draws)) return ZO_NO_MEMORY;
  const bool whole = job.direction == ZO_GAUSSIAN ? walk<Cells>(job, start, stop, *workshop.room)
                                                  : walk<Signs>(job, start, stop, *workshop.room);
#if defined(ZO_BUILD_AVX512) || defined(ZO_BUILD_AVX2)
  if (job.streaming) _mm_sfence();
#endif
  return whole ? ZO_OK : ZO_BAD_BYTES;
}

bool run_rows_part(const zo_rows &job, uint64_t first, uint64_t last) {
  Workshop workshop;
  if (!workshop.open(job.direction, 1)) return false;
  if (job.direction == ZO_GAUSSIAN)
    walk_rows<Cells>(job, first, last, *workshop.room);
  else
    walk_rows<Signs>(job, first, last, *workshop.room);
  return true;
}

void encode_part(const zo_values &job, uint64_t start, uint64_t stop) {
  alignas(64) float value[kTile];
  for (uint64_t at = start; at < stop; at += kTile) {
    const uint32_t count = uint32_t(stop - at < kTile ? stop - at : kTile);
    hold(job.format, job.values + at, count, value);
    store_master(job.format, value, job.wire, job.rest, at, count);
  }
}

void copy_part(void *out, const void *from, uint64_t bytes) {
  stream(out, from, bytes);
#if defined(ZO_BUILD_AVX512) || defined(ZO_BUILD_AVX2)
  _mm_sfence();
#endif
}

/* The finalizer of SplitMix64 (Steele, Lea, Flood 2014) over word and place, added up. */
uint64_t digest_part(const uint32_t *words, uint64_t count, uint64_t first) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t x = uint64_t(words[i]) + ((first + i) << 32);
    x += 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    sum += x ^ x >> 31;
  }
  return sum;
}

uint32_t crc32c_part(uint32_t crc, const void *data, uint64_t bytes) {
  const unsigned char *at = static_cast<const unsigned char *>(data);
#if !defined(ZO_BUILD_SCALAR)
  if (has_crc()) return ~crc_walk(CrcByInstruction{}, ~crc, at, bytes);
#endif
  return ~crc_walk(CrcByTable{}, ~crc, at, bytes);
}

}  // namespace

#if defined(ZO_BUILD_AVX512)
#define ZO_PARTS zo_avx512
#elif defined(ZO_BUILD_AVX2)
#define ZO_PARTS zo_avx2
#elif defined(ZO_BUILD_NEON)
#define ZO_PARTS zo_neon
#else
#define ZO_PARTS zo_scalar
#endif
extern const zo_parts ZO_PARTS = {run_part,    run_rows_part, encode_part, copy_part,       digest_part,
                                  crc32c_part, unpack_part,   pack_part,   count_exponents, pack_twelve};
