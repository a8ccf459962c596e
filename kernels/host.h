/* What backends whose memory is the host's share: the memory slots, and checks of what only a host
 * can read (places, bits, ids). The arithmetic is not shared: the oracle has its own.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_HOST_H
#define PMPD_KERNELS_HOST_H

#include "core/backend.h"

bool host_is_host(const struct backend *be);       /* true */
const char *host_device(const struct backend *be); /* "" */
MUST_CHECK enum status host_alloc(struct backend *be, void **out, size_t bytes);
void host_release(struct backend *be, void *ptr);
MUST_CHECK enum status host_upload(struct backend *be, void *dst, const void *src, size_t bytes);
MUST_CHECK enum status host_download(struct backend *be, void *dst, const void *src, size_t bytes);
MUST_CHECK enum status host_zero(struct backend *be, void *dst, size_t bytes);
MUST_CHECK enum status host_sync(struct backend *be);

/* A block of at least n floats that is kept from call to call, so that the token loop allocates
 * nothing once the largest matrix and cache have been seen. Old contents are lost. */
struct host_scratch {
    float *data; /* owned */
    size_t n;
};
MUST_CHECK enum status host_scratch_reserve(struct host_scratch *s, size_t n);

/* Every position is 0..place->max_pos, every slot below n_slots and every row below n_rows.
 * Errors: ST_SHAPE. n_slots 0: slots and rows are not looked at (rope uses positions only). */
MUST_CHECK enum status host_check_place(const char *op, const struct token_place *place,
                                        int32_t n_slots, int32_t n_rows);
/* Every token's bits are in bits_used. Errors: ST_SHAPE. */
MUST_CHECK enum status host_check_bits(const struct tensor *bits, uint32_t bits_used);
/* Every id is a row of the table. Errors: ST_SHAPE. */
MUST_CHECK enum status host_check_ids(const struct tensor *ids, int32_t n_vocab);

/* A (n_rows, n_values) copy of columns begin.. of rows row_begin.. of a (., src_values) array. */
void host_copy_rows(void *dst, const void *src, size_t value_bytes, size_t n_rows, size_t n_values,
                    size_t row_begin, size_t src_values, size_t begin);

#endif
