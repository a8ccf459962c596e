/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/host.h"

#include <string.h>

#include "core/mem.h"

bool host_is_host(const struct backend *be)
{
    (void)be;
    return true;
}

const char *host_device(const struct backend *be)
{
    (void)be;
    return "";
}

enum status host_alloc(struct backend *be, void **out, size_t bytes)
{
    (void)be;
    TRY(mem_alloc_array(out, bytes, 1));
    return ST_OK;
}

void host_release(struct backend *be, void *ptr)
{
    (void)be;
    mem_free(ptr);
}

enum status host_upload(struct backend *be, void *dst, const void *src, size_t bytes)
{
    (void)be;
    memcpy(dst, src, bytes);
    return ST_OK;
}

enum status host_download(struct backend *be, void *dst, const void *src, size_t bytes)
{
    (void)be;
    memcpy(dst, src, bytes);
    return ST_OK;
}

enum status host_zero(struct backend *be, void *dst, size_t bytes)
{
    (void)be;
    memset(dst, 0, bytes);
    return ST_OK;
}

enum status host_sync(struct backend *be)
{
    (void)be;
    return ST_OK;
}

enum status host_scratch_reserve(struct host_scratch *s, size_t n)
{
    if (n <= s->n) {
        return ST_OK;
    }
    float *data = NULL;
    TRY(MEM_NEW(&data, n));
    mem_free(s->data);
    *s = (struct host_scratch){.data = data, .n = n};
    return ST_OK;
}

enum status host_check_place(const char *op, const struct token_place *place, int32_t n_slots,
                             int32_t n_rows)
{
    const int32_t *slot = place->slot.data, *pos = place->pos.data, *row = place->kv_row.data;
    for (int32_t i = 0; i < place->pos.dims[0]; i++) {
        if (pos[i] < 0 || pos[i] > place->max_pos) {
            FAIL(ST_SHAPE, "%s: token %d is at position %d, expected 0..%d (max_pos)", op, i,
                 pos[i], place->max_pos);
        }
        if (n_slots == 0) {
            continue;
        }
        if (slot[i] < 0 || slot[i] >= n_slots || row[i] < 0 || row[i] >= n_rows) {
            FAIL(ST_SHAPE, "%s: token %d lives in slot %d, row %d, expected below %d and %d", op, i,
                 slot[i], row[i], n_slots, n_rows);
        }
    }
    return ST_OK;
}

enum status host_check_bits(const struct tensor *bits, uint32_t bits_used)
{
    const uint8_t *b = bits->data;
    for (int32_t i = 0; i < bits->dims[0]; i++) {
        if (b[i] > BITS_MAX || !(bits_used >> b[i] & 1)) {
            FAIL(ST_SHAPE,
                 "matmul_nested: token %d has %d bits, expected a precision of bits_used "
                 "(0x%x)",
                 i, b[i], bits_used);
        }
    }
    return ST_OK;
}

enum status host_check_ids(const struct tensor *ids, int32_t n_vocab)
{
    const int32_t *id = ids->data;
    for (int32_t i = 0; i < ids->dims[0]; i++) {
        if (id[i] < 0 || id[i] >= n_vocab) {
            FAIL(ST_SHAPE, "embed: id %d of token %d, expected 0..%d", id[i], i, n_vocab - 1);
        }
    }
    return ST_OK;
}

void host_copy_rows(void *dst, const void *src, size_t value_bytes, size_t n_rows, size_t n_values,
                    size_t row_begin, size_t src_values, size_t begin)
{
    const char *from = (const char *)src + (row_begin * src_values + begin) * value_bytes;
    char *to = dst;
    for (size_t r = 0; r < n_rows; r++) {
        memcpy(to, from, n_values * value_bytes);
        to += n_values * value_bytes;
        from += src_values * value_bytes;
    }
}
