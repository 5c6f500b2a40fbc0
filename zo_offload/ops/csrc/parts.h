/* What an instruction set provides: each works on a part of a job, in the calling thread. */
#pragma once

#include "kernels.h"

struct zo_parts {
  int (*run)(const zo_job &job, uint64_t start, uint64_t stop); /* a zo_status */
  bool (*run_rows)(const zo_rows &job, uint64_t first, uint64_t last);
  void (*encode)(const zo_values &job, uint64_t start, uint64_t stop);
  void (*copy)(void *out, const void *from, uint64_t bytes);
  uint64_t (*digest)(const uint32_t *words, uint64_t count, uint64_t first);
  uint32_t (*crc32c)(uint32_t crc, const void *data, uint64_t bytes);
  bool (*unpack)(const zo_pack &pack, uint64_t start, uint64_t stop); /* false: damaged */
  void (*pack)(const zo_pack &pack, uint64_t start, uint64_t stop);
  void (*count_exponents)(const uint16_t *wire, uint64_t count, uint64_t *histogram);
  void (*pack_twelve)(const uint16_t *wire, uint64_t count, uint32_t top, uint8_t *planes,
                      uint8_t *codes, uint8_t *counts);
};

extern const zo_parts zo_scalar, zo_neon, zo_avx2, zo_avx512;
