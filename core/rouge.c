/* SPDX-License-Identifier: Apache-2.0 */
#include "core/rouge.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "core/mem.h"

static unsigned char lower(unsigned char c)
{
    return c >= 'A' && c <= 'Z' ? (unsigned char)(c - 'A' + 'a') : c;
}

static bool in_word(unsigned char c)
{
    c = lower(c);
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c >= 0x80;
}

struct word {
    const char *at;
    size_t bytes;
};

/* words: room for (strlen(text) + 1) / 2 + 1. */
static size_t split(struct word *words, const char *text)
{
    size_t n = 0;
    for (const char *p = text; *p;) {
        const char *begin = p;
        while (in_word((unsigned char)*p)) {
            p++;
        }
        if (p > begin) {
            words[n++] = (struct word){begin, (size_t)(p - begin)};
        } else {
            p++;
        }
    }
    return n;
}

static bool same(const struct word *a, const struct word *b)
{
    if (a->bytes != b->bytes) {
        return false;
    }
    for (size_t i = 0; i < a->bytes; i++) {
        if (lower((unsigned char)a->at[i]) != lower((unsigned char)b->at[i])) {
            return false;
        }
    }
    return true;
}

enum status rouge_l(double *f1, const char *text, const char *reference)
{
    enum status st = ST_OK;
    struct word *a = NULL, *b = NULL;
    uint32_t *row = NULL;
    *f1 = 0;
    TRY_GOTO(st, MEM_NEW(&a, strlen(text) / 2 + 2), done);
    TRY_GOTO(st, MEM_NEW(&b, strlen(reference) / 2 + 2), done);
    size_t n = split(a, text), m = split(b, reference);
    TRY_GOTO(st, MEM_NEW(&row, m + 1), done);
    for (size_t i = 0; i < n; i++) {
        uint32_t corner = 0; /* of the row before, one word to the left */
        for (size_t j = 0; j < m; j++) {
            uint32_t above = row[j + 1];
            row[j + 1] = same(&a[i], &b[j]) ? corner + 1 : above > row[j] ? above : row[j];
            corner = above;
        }
    }
    if (row[m] > 0) { /* 2 P R / (P + R) = 2 LCS / (n + m) */
        *f1 = 2.0 * row[m] / (double)(n + m);
    }
done:
    mem_free(a);
    mem_free(b);
    mem_free(row);
    return st;
}
