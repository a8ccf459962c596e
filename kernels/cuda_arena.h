/* Where bit-planes live on the GPU. Each plane number has an address range of its own, as long as
 * the address space of the planes of all matrices together; a matrix has the same offset in all of
 * them. Pages get memory when a plane on them becomes resident and lose it when none is left, so
 * dropping plane p of a whole model gives its memory back, and no plane ever moves: kernels (and
 * graphs of them) may keep addresses.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CUDA_ARENA_H
#define PMPD_KERNELS_CUDA_ARENA_H

#include "core/bitplane.h"
#include "kernels/gpu.h"

/* One matrix's place. */
struct cuda_range {
    size_t offset, bytes;    /* in every plane's address range */
    struct cuda_range *next; /* by offset */
};

struct cuda_arena {
    struct gpu *gpu;          /* borrowed */
    char *base[BITS_MAX];     /* owned; NULL: this plane has never been used */
    uint16_t *used[BITS_MAX]; /* owned: (n_pages) planes resident on each page */
    size_t span, n_pages;     /* of one plane's address range */
    struct cuda_range *first; /* owned list */
};

MUST_CHECK enum status cuda_arena_open(struct cuda_arena *a, struct gpu *gpu);
/* Gives everything back. */
void cuda_arena_close(struct cuda_arena *a);
/* Room for planes of `bytes` each. Errors: ST_NOMEM (address space). */
MUST_CHECK enum status cuda_arena_place(struct cuda_arena *a, struct cuda_range **out, size_t bytes,
                                        int n_planes);
/* Memory for plane p, at *address. Errors: ST_NOMEM. */
MUST_CHECK enum status cuda_arena_commit(struct cuda_arena *a, const struct cuda_range *range,
                                         int p, void **address);
void cuda_arena_decommit(struct cuda_arena *a, const struct cuda_range *range, int p);
const void *cuda_arena_address(const struct cuda_arena *a, const struct cuda_range *range, int p);
/* No plane of it is committed any more. */
void cuda_arena_release(struct cuda_arena *a, struct cuda_range **range);

#endif
