/* Runs the same jobs with every instruction set of the machine; says where one differs from scalar.
 *
 * The last line is a digest of all results, to be compared between machines.
 */

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../zo_offload/ops/csrc/kernels.h"

namespace {

constexpr uint64_t kElements = 128 * 41;
constexpr uint32_t kFormats = 5, kDirections = 2;

struct Buffers {
  std::vector<uint32_t> wire, rest, plus, minus, given, kept;

  Buffers()
      : wire(kElements), rest(kElements), plus(kElements), minus(kElements), given(kElements),
        kept(kElements) {
    uint32_t state = 5; /* any bits at all: NaN, infinities and denormals among them */
    for (std::vector<uint32_t> *each : {&wire, &rest})
      for (uint32_t &word : *each) word = state = state * 1664525u + 1013904223u;
  }
  bool operator==(const Buffers &other) const {
    return wire == other.wire && rest == other.rest && plus == other.plus &&
           minus == other.minus && given == other.given && kept == other.kept;
  }
};

Buffers worked(uint32_t format, uint32_t direction, bool dither, uint32_t threads, uint32_t isa) {
  static double cells[4096];
  for (int i = 0; i < 2048; ++i) cells[2048 + i] = i * 0.0017 + 0.0003, cells[2047 - i] = -cells[2048 + i];
  const zo_segment segments[] = {{0, 128 * 7, 0.37, 9, 0},
                                 {128 * 7, 128 * 8, 17.25, 2, 0},
                                 {128 * 8, kElements, 1.0, 1000000, 0}};
  const zo_draw one[] = {{uint64_t{1} << 63 | 5, 0.1, 3, 0}};
  const zo_draw many[] = {{5, 0.1, 4, 0}, {5, -3e-45, 4, 1}, {5, 7.0, 4, 2}};
  const zo_step steps[] = {{7, 1.0, one, 1, 3}, {7, 0.9999, many, 3, 4}, {7, 0.5, nullptr, 0, 5}};
  Buffers all;
  const zo_point points[] = {{all.plus.data(), {5, 1e-3, 9, 0}}, {all.minus.data(), {5, -1e-3, 9, 0}}};
  zo_job job = {};
  job.format = format, job.direction = direction, job.dither = dither, job.num_threads = threads;
  job.num_segments = 3, job.segments = segments, job.count = kElements;
  job.num_points = 2, job.points = points, job.cells = cells;
  job.wire = all.wire.data(), job.rest = all.rest.data();
  job.num_steps = 3, job.steps = steps;
  if (zo_run(&job, isa) != ZO_OK) std::abort();
  job.num_steps = 1; /* the usual job, which may have a way of its own */
  if (zo_run(&job, isa) != ZO_OK) std::abort();
  const Buffers any;
  const zo_values values = {format, threads, kElements - 3,
                            reinterpret_cast<const float *>(any.rest.data() + 1),
                            all.given.data(), all.kept.data()};
  if (zo_lay_out(&values, isa) != ZO_OK) std::abort();
  return all;
}

/* Any wire packed, then decoded with its own scales and with others. */
std::vector<uint32_t> coded(uint32_t codec, uint32_t group, uint32_t threads, uint32_t isa) {
  const Buffers any;
  std::vector<uint32_t> all(2 * kElements + kElements / 2, 0);
  zo_pack pack = {};
  pack.codec = codec, pack.group = group, pack.format = ZO_FP32, pack.out_format = ZO_FP32;
  pack.num_threads = threads, pack.elements = pack.count = kElements;
  pack.wire = any.wire.data();
  pack.packed = all.data() + 2 * kElements, pack.packed_bytes = 4 * (kElements / 2);
  pack.out = all.data();
  uint64_t used;
  if (zo_encode(&pack, isa, &used) != ZO_OK || zo_decode(&pack, isa) != ZO_OK) std::abort();
  pack.out = all.data() + kElements, pack.scales = reinterpret_cast<const float *>(any.rest.data());
  if (zo_decode(&pack, isa) != ZO_OK) std::abort();
  return all;
}

uint64_t digest_of(const std::vector<uint32_t> &words, uint32_t isa) {
  uint64_t digest = 0;
  if (zo_digest(words.data(), words.size(), 0, 2, isa, &digest) != ZO_OK) std::abort();
  return digest;
}

uint32_t crc_of(const std::vector<uint32_t> &words, uint32_t isa) {
  uint32_t crc = 0;
  if (zo_crc32c(words.data(), words.size() * 4, 0, 2, isa, &crc) != ZO_OK) std::abort();
  return crc;
}

}  // namespace

int main() {
  int differing = 0, compared = 0;
  uint64_t total = 0;
  for (uint32_t format = 0; format < kFormats; ++format)
    for (uint32_t direction = 0; direction < kDirections; ++direction)
      for (bool dither : {false, true}) {
        if (dither && (format == ZO_FP32 || format == ZO_FP16)) continue;
        const Buffers expected = worked(format, direction, dither, 1, ZO_SCALAR);
        for (const std::vector<uint32_t> *each :
             {&expected.wire, &expected.rest, &expected.plus, &expected.minus, &expected.given,
              &expected.kept})
          total = (total * 31 + digest_of(*each, ZO_SCALAR)) * 31 + crc_of(*each, ZO_SCALAR);
        for (uint32_t isa = ZO_SCALAR; isa <= ZO_AVX512; ++isa)
          for (uint32_t threads = 1; zo_has_isa(isa) && threads <= 2; ++threads, ++compared)
            if (!(worked(format, direction, dither, threads, isa) == expected) ||
                digest_of(expected.wire, isa) != digest_of(expected.wire, ZO_SCALAR) ||
                crc_of(expected.wire, isa) != crc_of(expected.wire, ZO_SCALAR))
              ++differing, std::fprintf(stderr, "instruction set %u differs: format %u, direction %u, dither %d\n",
                                        isa, format, direction, dither);
      }
  for (uint32_t codec = ZO_FP8_E4M3; codec <= ZO_NF4; ++codec)
    for (uint32_t group : {64, 128}) {
      const std::vector<uint32_t> expected = coded(codec, group, 1, ZO_SCALAR);
      total = total * 31 + digest_of(expected, ZO_SCALAR);
      for (uint32_t isa = ZO_SCALAR; isa <= ZO_AVX512; ++isa)
        for (uint32_t threads = 1; zo_has_isa(isa) && threads <= 2; ++threads, ++compared)
          if (coded(codec, group, threads, isa) != expected)
            ++differing, std::fprintf(stderr, "instruction set %u differs: codec %u, group %u\n", isa, codec, group);
    }
  std::fprintf(stderr, "best instruction set %u; %d runs, %d differ\n", zo_best_isa(), compared, differing);
  std::printf("%016llx\n", static_cast<unsigned long long>(total));
  return differing != 0;
}
