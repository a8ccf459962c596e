/* Memory for weights: pieces of many matrices packed into large chunks on huge pages, so that
 * reading them in turn costs few address translations. A chunk is given back when its last piece
 * is; pieces that are dropped together (one plane number, one precision) therefore share an arena.
 * Not for threads: one caller at a time.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_ARENA_H
#define PMPD_KERNELS_CPU_ARENA_H

#include <stddef.h>

#include "core/status.h"

struct arena_chunk;
/* Zero it before use. Owns its chunks; it is empty again when all pieces have been given back. */
struct cpu_arena {
    struct arena_chunk *chunks;
};

/* A zeroed piece, aligned for every vector; back with arena_free. Its pages are not touched, so
 * that the first thread to write one decides where it lies. Errors: ST_SHAPE (overflow), ST_NOMEM.
 */
MUST_CHECK enum status arena_alloc(struct cpu_arena *arena, void **out, size_t bytes);
/* NULL is allowed. */
void arena_free(struct cpu_arena *arena, void *piece);

#endif
