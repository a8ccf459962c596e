/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/share.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/weights.h"

void share_rows(int32_t *begin, int32_t *end, int32_t n_rows, int32_t unit,
                const struct collective *coll, int rank)
{
    int32_t n_units = (n_rows + unit - 1) / unit;
    *begin = unit * split_at(n_units, coll->size, rank);
    *end = unit * split_at(n_units, coll->size, rank + 1);
    *end = *end < n_rows ? *end : n_rows;
    *begin = *begin < n_rows ? *begin : n_rows;
}

/* whole: bytes on every rank, of which this rank's part is in place; counts (ranks) bytes. */
static enum status gather_bytes(struct collective *coll, void *whole, size_t own_at,
                                const size_t *counts)
{
    size_t total = 0;
    for (int r = 0; r < coll->size; r++) {
        total += counts[r];
    }
    if (total > INT32_MAX) {
        FAIL(ST_SHAPE, "%zu bytes of a matrix do not fit one exchange", total);
    }
    struct tensor all = tensor_1d(whole, DT_U8, (int32_t)total);
    struct tensor part = tensor_1d((char *)whole + own_at, DT_U8, (int32_t)counts[coll->rank]);
    return collective_all_gather(coll, &all, &part, counts);
}

/* What a rank says of itself. */
struct verdict {
    int32_t st;
    char text[508];
};

enum status share_agree(struct collective *coll, enum status st)
{
    struct verdict *all = NULL;
    size_t *counts = NULL;
    if (coll->size == 1) {
        return st;
    }
    enum status own = st;
    TRY_GOTO(st, MEM_NEW(&all, coll->size), done);
    TRY_GOTO(st, MEM_NEW(&counts, coll->size), done);
    for (int r = 0; r < coll->size; r++) {
        counts[r] = sizeof *all;
    }
    all[coll->rank].st = (int32_t)own;
    snprintf(all[coll->rank].text, sizeof all->text, "%s", own ? status_message() : "");
    TRY_GOTO(st, gather_bytes(coll, all, (size_t)coll->rank * sizeof *all, counts), done);
    st = own;
    for (int r = 0; st == ST_OK && r < coll->size; r++) {
        if (all[r].st != ST_OK) {
            st = status_raise((enum status)all[r].st, __FILE__, __LINE__, __func__,
                              "rank %d: %.507s", r, all[r].text);
        }
    }
done:
    mem_free(all);
    mem_free(counts);
    return st;
}

/* Rows of one array (n_rows, row_bytes). */
static enum status gather_rows(struct collective *coll, const void *array, int32_t n_rows,
                               size_t row_bytes, int32_t unit, size_t *counts)
{
    int32_t begin, end, own_begin = 0;
    for (int r = 0; r < coll->size; r++) {
        share_rows(&begin, &end, n_rows, unit, coll, r);
        counts[r] = (size_t)(end - begin) * row_bytes;
        own_begin = r == coll->rank ? begin : own_begin;
    }
    /* the source's pointers are const views of the buffer's own block */
    void *whole = (void *)(uintptr_t)array;
    return gather_bytes(coll, whole, (size_t)own_begin * row_bytes, counts);
}

static enum status gather_levels(struct collective *coll, const struct nested_source *s, int bits,
                                 int32_t unit, size_t *counts)
{
    size_t grid = (size_t)nested_n_groups(s) * sizeof(uint16_t);
    const struct {
        const void *array;
        size_t row_bytes;
    } arrays[] = {{s->scale[bits], grid},
                  {s->offset[bits], grid},
                  {s->alpha[bits], grid * (size_t)bits},
                  {s->lut[bits], sizeof(uint16_t) << bits},
                  {bits == BITS_MAX ? s->tail : NULL, grid}};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        if (arrays[i].array) {
            TRY(gather_rows(coll, arrays[i].array, s->n_rows, arrays[i].row_bytes, unit, counts));
        }
    }
    return ST_OK;
}

enum status share_gather(struct collective *coll, struct nested_buffer *buffer, int32_t unit)
{
    const struct nested_source *s = &buffer->source;
    size_t row = (size_t)s->n_cols_padded / 8, *counts = NULL;
    enum status st = ST_OK;
    if (coll->size == 1) {
        return ST_OK;
    }
    TRY(MEM_NEW(&counts, coll->size));
    for (int p = 0; p < s->n_planes; p++) {
        TRY_GOTO(st,
                 gather_rows(coll, s->planes + (size_t)p * row * (size_t)s->n_rows, s->n_rows, row,
                             unit, counts),
                 done);
    }
    for (int b = 1; b <= BITS_MAX; b++) {
        TRY_GOTO(st, gather_levels(coll, s, b, unit, counts), done);
    }
done:
    mem_free(counts);
    return st;
}

enum status share_report(struct collective *coll, struct fit_report *report)
{
    struct fit_report *all = NULL, sum = {0};
    size_t *counts = NULL;
    enum status st = ST_OK;
    if (coll->size == 1) {
        return ST_OK;
    }
    TRY_GOTO(st, MEM_NEW(&all, coll->size), done);
    TRY_GOTO(st, MEM_NEW(&counts, coll->size), done);
    for (int r = 0; r < coll->size; r++) {
        counts[r] = sizeof *all;
    }
    all[coll->rank] = *report;
    TRY_GOTO(st, gather_bytes(coll, all, (size_t)coll->rank * sizeof *all, counts), done);
    for (int r = 0; r < coll->size; r++) {
        fit_report_add(&sum, &all[r]);
    }
    *report = sum;
done:
    mem_free(all);
    mem_free(counts);
    return st;
}

enum status share_broadcast(struct collective *coll, void *data, size_t n)
{
    if (n > INT32_MAX) {
        FAIL(ST_SHAPE, "%zu bytes of a matrix do not fit one exchange", n);
    }
    struct tensor t = tensor_1d(data, DT_U8, (int32_t)n);
    return collective_broadcast(coll, &t, 0);
}
