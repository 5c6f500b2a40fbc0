/* The native kernels' C interface, and all that there is of it.
 *
 * A job walks once over a stretch of a span (see ops/span.py): master values are loaded, brought
 * through `steps`, stored; then what the forward sees, brought through `ahead` in fp32, is written
 * along each of `points`. Any of the three may be empty. The bits are those of ops/reference.py,
 * whatever the instruction set, the number of threads and the caller's rounding flags.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define ZO_VERSION 4
#define ZO_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum zo_isa { ZO_SCALAR = 0, ZO_NEON = 1, ZO_AVX2 = 2, ZO_AVX512 = 3 };
enum zo_direction { ZO_RADEMACHER = 0, ZO_GAUSSIAN = 1 };
enum zo_status {
  ZO_OK = 0,
  ZO_BAD_JOB = 1,
  ZO_NO_SUCH_ISA = 2,
  ZO_NO_MEMORY = 3,
  ZO_BAD_BYTES = 4, /* of a packed span: too few, or damaged */
};

/* How a master lies in memory: what travels (wire), and what rests beside it. */
enum zo_format {
  ZO_FP32 = 0,    /* wire: the master */
  ZO_BF16 = 1,    /* wire: its upper sixteen bits, rounded; rest: its lower sixteen */
  ZO_FP16 = 2,    /* wire: rounded from the master; rest: the master */
  ZO_BF16_8 = 3,  /* wire: upper sixteen of the top 24 bits; rest: the lower eight of those */
  ZO_BF16_SR = 4, /* wire: the master, which is a bfloat16 */
};

/* How a span's wire is packed for the bus (docs/codecs.md). */
enum zo_codec {
  ZO_IDENTITY = 0,
  ZO_WIRE_BF16 = 1,
  ZO_WIRE_FP16 = 2,
  ZO_LOSSLESS12 = 3,
  ZO_FP8_E4M3 = 4,
  ZO_INT8 = 5,
  ZO_INT4 = 6,
  ZO_NF4 = 7,
};

/* One parameter, or a part of one: elements start to stop of the span, both multiples of 128. */
struct zo_segment {
  uint64_t start, stop;
  double scale;
  uint32_t parameter;
  uint32_t block; /* of the parameter's blocks of 128 elements, the one that lies at `start` */
};

/* coefficient * z, where seed, step and probe name z. */
struct zo_draw {
  uint64_t seed;
  double coefficient;
  uint32_t step, probe;
};

/* The master times `decay`, minus the sum of the draws; numbered for its rounding's own noise. */
struct zo_step {
  uint64_t seed;
  double decay;
  const struct zo_draw *draws;
  uint32_t num_draws, step;
};

/* A perturbed copy of the stretch: `out` holds `count` elements of the forward's type. */
struct zo_point {
  void *out;
  struct zo_draw draw;
};

struct zo_job {
  uint32_t format, direction;
  uint32_t dither;       /* points are rounded stochastically (bfloat16 only) */
  uint32_t num_threads;  /* at most */
  uint32_t num_segments, num_steps, num_ahead, num_points;
  uint64_t first, count; /* the stretch, in multiples of 128 */
  uint64_t streaming;    /* points go around the caches */
  void *wire, *rest;     /* of the span's element 0 */
  const struct zo_segment *segments;
  const struct zo_step *steps, *ahead;
  const struct zo_point *points;
  const double *cells; /* the 4,096 values of a gaussian element */
  uint32_t codec, group; /* of a wire that is packed: such a job has no steps */
  uint64_t wire_bytes;
};

/* Packing the whole of a span's wire, or unpacking a stretch of it. */
struct zo_pack {
  uint32_t codec, group; /* elements that share a scale: 64, 128, or none at all */
  uint32_t format;       /* zo_format of the wire */
  uint32_t out_format;   /* unpacking: ZO_FP32, or ZO_BF16 or ZO_FP16, rounded */
  uint32_t num_threads, reserved;
  uint64_t elements;     /* of the span, a multiple of 128 */
  uint64_t first, count; /* the stretch that is unpacked, multiples of 128 */
  uint64_t packed_bytes; /* packing: room for the most that the codec takes */
  const void *wire;
  void *packed, *out;
  const float *scales; /* unpacking: of each group of the stretch, in place of its own; NULL: its own */
};

/* Rows of one two-dimensional parameter, or of a part of it, along one draw. */
struct zo_rows {
  uint32_t format, direction;
  uint32_t num_threads, parameter;
  uint64_t width, num_rows;
  uint64_t offset; /* elements of the parameter before the part */
  double scale;
  const void *wire; /* of the part's element 0 */
  const int64_t *rows;
  void *out; /* [num_rows, width] */
  struct zo_draw draw;
  const double *cells;
};

/* fp32 values, any bits, to be laid out as a master: the nearest that its format holds. */
struct zo_values {
  uint32_t format, num_threads;
  uint64_t count;
  const float *values;
  void *wire, *rest; /* rest: NULL where the format has none, or no master stands behind an fp16 wire */
};

ZO_API uint32_t zo_version(void);
/* The best instruction set of this machine, among those that were built. */
ZO_API uint32_t zo_best_isa(void);
ZO_API uint32_t zo_has_isa(uint32_t isa);
/* The process's GOMP_parallel, so that its threads serve here as well; NULL: threads of our own. */
ZO_API void zo_use_openmp(void *gomp_parallel);

ZO_API int zo_run(const struct zo_job *job, uint32_t isa);
ZO_API int zo_run_rows(const struct zo_rows *rows, uint32_t isa);
ZO_API int zo_lay_out(const struct zo_values *values, uint32_t isa);
/* *used: bytes that were written, a multiple of 64. */
ZO_API int zo_encode(const struct zo_pack *pack, uint32_t isa, uint64_t *used);
ZO_API int zo_decode(const struct zo_pack *pack, uint32_t isa);
/* A copy around the caches, in whole cache lines: what memory can do at most. */
ZO_API int zo_copy(void *out, const void *from, uint64_t bytes, uint32_t num_threads, uint32_t isa);
/* Sum over 32-bit words w_i, i from `first`, of mix(w_i + 2^32 i), modulo 2^64: any division adds up. */
ZO_API int zo_digest(const uint32_t *words, uint64_t count, uint64_t first, uint32_t num_threads,
                     uint32_t isa, uint64_t *digest);
/* CRC-32C of bytes that follow those of CRC `initial` (0: none). */
ZO_API int zo_crc32c(const void *data, uint64_t bytes, uint32_t initial, uint32_t num_threads,
                     uint32_t isa, uint32_t *crc);

#ifdef __cplusplus
}
#endif
