/* What an instruction set provides: each works on a part of a job, in the calling thread. */
#pragma once

#include "kernels.h"

struct zo_parts {
  bool (*run)(const zo_job &job, uint64_t start, uint64_t stop);
  bool (*run_rows)(const zo_rows &job, uint64_t first, uint64_t last);
  void (*copy)(void *out, const void *from, uint64_t bytes);
  uint64_t (*digest)(const uint32_t *words, uint64_t count, uint64_t first);
  uint32_t (*crc32c)(uint32_t crc, const void *data, uint64_t bytes);
};

extern const zo_parts zo_scalar, zo_neon, zo_avx2, zo_avx512;
