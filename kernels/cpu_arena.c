/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu_arena.h"

#include <stdint.h>
#include <sys/mman.h>

#include "core/mem.h"

enum { ALIGN = 128 };
static const size_t small_chunk = (size_t)1 << 20, large_chunk = (size_t)32 << 20;
static const size_t huge_page = (size_t)2 << 20;

struct arena_chunk {
    struct arena_chunk *next;
    char *base;
    size_t size, used;
    int n_pieces;
};

/* The first chunk of an arena is small: tiny models stay tiny. */
static enum status add_chunk(struct cpu_arena *arena, size_t bytes)
{
    struct arena_chunk *c = NULL;
    size_t size = arena->chunks || bytes > small_chunk ? large_chunk : small_chunk;
    if (bytes > size) {
        TRY(mem_add(&size, bytes, huge_page - 1));
        size &= ~(huge_page - 1);
    }
    TRY(mem_alloc_array((void **)&c, 1, sizeof *c));
    /* one huge page more than needed, to begin at a boundary; address space only */
    size_t slack = size >= huge_page ? huge_page : 0;
    char *base =
        mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        mem_free(c);
        FAIL(ST_NOMEM, "no memory for %zu bytes of weights; use fewer planes or more tensor ranks",
             size);
    }
    if (slack > 0) {
        size_t skip = (huge_page - (uintptr_t)base % huge_page) % huge_page;
        if (skip > 0) {
            munmap(base, skip);
        }
        base += skip;
        if (slack > skip) {
            munmap(base + size, slack - skip);
        }
        (void)madvise(base, size, MADV_HUGEPAGE); /* a wish: without it, only slower */
    }
    *c = (struct arena_chunk){.next = arena->chunks, .base = base, .size = size};
    arena->chunks = c;
    return ST_OK;
}

enum status arena_alloc(struct cpu_arena *arena, void **out, size_t bytes)
{
    TRY(mem_add(&bytes, bytes > 0 ? bytes : 1, ALIGN - 1));
    bytes &= ~(size_t)(ALIGN - 1);
    struct arena_chunk *c = arena->chunks;
    if (!c || c->size - c->used < bytes) {
        TRY(add_chunk(arena, bytes));
        c = arena->chunks;
    }
    *out = c->base + c->used;
    c->used += bytes;
    c->n_pieces++;
    return ST_OK;
}

void arena_free(struct cpu_arena *arena, void *piece)
{
    const char *at = piece;
    for (struct arena_chunk **link = &arena->chunks; at && *link; link = &(*link)->next) {
        struct arena_chunk *c = *link;
        if (at < c->base || at >= c->base + c->size) {
            continue;
        }
        if (--c->n_pieces == 0) {
            *link = c->next;
            munmap(c->base, c->size);
            mem_free(c);
        }
        return;
    }
    INVARIANT(!at);
}
