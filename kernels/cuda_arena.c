/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda_arena.h"

#include "core/mem.h"

/* Address space is free: more than any GPU has memory for one plane of its weights. */
static const size_t SPAN = (size_t)64 << 30;
enum { ALIGN = 256 };

enum status cuda_arena_open(struct cuda_arena *a, struct gpu *gpu)
{
    *a = (struct cuda_arena){.gpu = gpu};
    a->span = SPAN / gpu->page_bytes * gpu->page_bytes;
    a->n_pages = a->span / gpu->page_bytes;
    return ST_OK;
}

void cuda_arena_close(struct cuda_arena *a)
{
    for (int p = 0; p < BITS_MAX; p++) {
        for (size_t i = 0; a->used[p] && i < a->n_pages; i++) {
            if (a->used[p][i] > 0) {
                gpu_decommit(a->gpu, a->base[p] + i * a->gpu->page_bytes, a->gpu->page_bytes);
            }
        }
        if (a->base[p]) {
            gpu_unreserve(a->gpu, a->base[p], a->span);
        }
        mem_free(a->used[p]);
    }
    while (a->first) {
        struct cuda_range *next = a->first->next;
        mem_free(a->first);
        a->first = next;
    }
    *a = (struct cuda_arena){0};
}

/* The first gap that is large enough. */
enum status cuda_arena_place(struct cuda_arena *a, struct cuda_range **out, size_t bytes,
                             int n_planes)
{
    struct cuda_range **at = &a->first, *range = NULL;
    size_t offset = 0, room = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    while (*at && (*at)->offset - offset < room) {
        offset = (*at)->offset + (*at)->bytes;
        at = &(*at)->next;
    }
    if (room < bytes || offset > a->span || room > a->span - offset) {
        FAIL(ST_NOMEM,
             "planes of %zu bytes on top of %zu do not fit the %zu bytes that are reserved for one "
             "plane of all matrices: spread the model over more ranks (parallel.tensor_ranks)",
             bytes, offset, a->span);
    }
    for (int p = 0; p < n_planes; p++) {
        if (!a->base[p]) {
            void *base = NULL;
            TRY(gpu_reserve(a->gpu, &base, a->span));
            a->base[p] = base;
        }
        if (!a->used[p]) {
            TRY(MEM_NEW(&a->used[p], a->n_pages));
        }
    }
    TRY(MEM_NEW(&range, 1));
    *range = (struct cuda_range){.offset = offset, .bytes = room, .next = *at};
    *at = range;
    *out = range;
    return ST_OK;
}

static void page_span(const struct cuda_arena *a, const struct cuda_range *range, size_t *first,
                      size_t *end)
{
    *first = range->offset / a->gpu->page_bytes;
    *end = (range->offset + range->bytes - 1) / a->gpu->page_bytes + 1;
}

/* Pages [first, end) of plane p hold one plane less. Runs of pages that empty go at once. */
static void leave_pages(struct cuda_arena *a, int p, size_t first, size_t end)
{
    size_t page = a->gpu->page_bytes;
    for (size_t i = first; i < end; i++) {
        if (--a->used[p][i] == 0) {
            gpu_decommit(a->gpu, a->base[p] + i * page, page);
        }
    }
}

enum status cuda_arena_commit(struct cuda_arena *a, const struct cuda_range *range, int p,
                              void **address)
{
    size_t first, end, page = a->gpu->page_bytes;
    page_span(a, range, &first, &end);
    for (size_t i = first; i < end; i++) {
        if (a->used[p][i] == 0) {
            enum status st = gpu_commit(a->gpu, a->base[p] + i * page, page);
            if (st != ST_OK) {
                leave_pages(a, p, first, i);
                return status_trace(st, __FILE__, __LINE__, __func__);
            }
        }
        a->used[p][i]++;
    }
    *address = a->base[p] + range->offset;
    return ST_OK;
}

void cuda_arena_decommit(struct cuda_arena *a, const struct cuda_range *range, int p)
{
    size_t first, end;
    page_span(a, range, &first, &end);
    leave_pages(a, p, first, end);
}

const void *cuda_arena_address(const struct cuda_arena *a, const struct cuda_range *range, int p)
{
    return a->base[p] + range->offset;
}

void cuda_arena_release(struct cuda_arena *a, struct cuda_range **range)
{
    for (struct cuda_range **at = &a->first; *at; at = &(*at)->next) {
        if (*at == *range) {
            *at = (*range)->next;
            mem_free(*range);
            *range = NULL;
            return;
        }
    }
}
