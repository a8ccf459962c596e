/* Host memory: checked size arithmetic, zeroed 64-byte aligned blocks, and a counter that the
 * tests use to show that the token loop allocates nothing.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_MEM_H
#define PMPD_CORE_MEM_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

enum { MEM_ALIGN = 64 };

/* *out = a * b. Errors: ST_SHAPE on overflow. */
MUST_CHECK enum status mem_mul(size_t *out, size_t a, size_t b);
/* *out = a + b. Errors: ST_SHAPE on overflow. */
MUST_CHECK enum status mem_add(size_t *out, size_t a, size_t b);
/* A zeroed block of n * size bytes, 64-byte aligned, at least one byte; owned by the caller, given
 * back with mem_free. Errors: ST_SHAPE (n * size overflows), ST_NOMEM. */
MUST_CHECK enum status mem_alloc_array(void **out, size_t n, size_t size);
/* The same block with room for n_new elements: old contents kept, the rest zero. *ptr may be NULL
 * (then n_old is 0). On failure *ptr is unchanged. */
MUST_CHECK enum status mem_grow_array(void **ptr, size_t n_old, size_t n_new, size_t size);
/* A copy of a string; free with mem_free. */
MUST_CHECK enum status mem_strdup(char **out, const char *text);
/* NULL is allowed. */
void mem_free(void *ptr);
/* Blocks handed out since the program started. */
uint64_t mem_alloc_count(void);

/* MEM_NEW(&ptr, n): an array of n elements of ptr's type. */
#define MEM_NEW(ptr, n) mem_alloc_array((void **)(ptr), (size_t)(n), sizeof **(ptr))

#endif
