/* SPDX-License-Identifier: Apache-2.0 */
#include "core/unicode.h"

#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/unicode_table.h"

enum {
    HANGUL_S = 0xAC00,
    HANGUL_L = 0x1100,
    HANGUL_V = 0x1161,
    HANGUL_T = 0x11A7,
    N_HANGUL_L = 19,
    N_HANGUL_V = 21,
    N_HANGUL_T = 28,
    N_HANGUL_S = N_HANGUL_L * N_HANGUL_V * N_HANGUL_T
};

int utf8_expects(const unsigned char *begin, int n)
{
    unsigned char a = begin[0];
    if (a < 0x80) {
        return 1;
    }
    int expected = a >= 0xC2 && a <= 0xDF   ? 2
                   : a >= 0xE0 && a <= 0xEF ? 3
                   : a >= 0xF0 && a <= 0xF4 ? 4
                                            : 0;
    if (n >= 2) {
        // overlong forms, surrogates and what lies above U+10FFFF show in the second byte
        unsigned char low = a == 0xE0 ? 0xA0 : a == 0xF0 ? 0x90 : 0x80;
        unsigned char high = a == 0xED ? 0x9F : a == 0xF4 ? 0x8F : 0xBF;
        if (begin[1] < low || begin[1] > high) {
            return 0;
        }
    }
    for (int i = 2; i < n; i++) {
        if ((begin[i] & 0xC0) != 0x80) {
            return 0;
        }
    }
    return expected;
}

int utf8_read(const char *text, size_t bytes, int32_t *code)
{
    if (bytes == 0) {
        return 0;
    }
    const unsigned char *p = (const unsigned char *)text;
    int n = utf8_expects(p, 1);
    if (n == 0 || (size_t)n > bytes || utf8_expects(p, n) != n) {
        return 0;
    }
    if (code) {
        static const unsigned char first_bits[5] = {0, 0x7F, 0x1F, 0x0F, 0x07};
        *code = p[0] & first_bits[n];
        for (int i = 1; i < n; i++) {
            *code = *code << 6 | (p[i] & 0x3F);
        }
    }
    return n;
}

int utf8_write(char text[4], int32_t code)
{
    if (code < 0x80) {
        text[0] = (char)code;
        return 1;
    }
    int n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const int lead[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (int i = n - 1; i > 0; i--) {
        text[i] = (char)(0x80 | (code & 0x3F));
        code >>= 6;
    }
    text[0] = (char)(lead[n] | code);
    return n;
}

size_t utf8_check(const char *text, size_t bytes)
{
    size_t i = 0;
    while (i < bytes) {
        int n = utf8_read(text + i, bytes - i, NULL);
        if (n == 0) {
            break;
        }
        i += (size_t)n;
    }
    return i;
}

bool unicode_is_space(int32_t code)
{
    return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xA0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
           code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

/* One code point on its way through the normal form. `place` keeps the sort stable. */
struct mark {
    int32_t code, kind;
    size_t place;
};
struct marks {
    struct mark *item;
    size_t n, capacity;
};

static int32_t combining_class(int32_t code)
{
    int32_t low = 0, high = unicode_n_mark_ranges;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        const struct unicode_mark_range *r = &unicode_mark_range[middle];
        if (code < r->begin) {
            high = middle;
        } else if (code > r->end) {
            low = middle + 1;
        } else {
            return r->kind;
        }
    }
    return 0;
}

static const struct unicode_decomposition *find_decomposition(int32_t code)
{
    int32_t low = 0, high = unicode_n_decompositions;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        const struct unicode_decomposition *d = &unicode_decomposition[middle];
        if (code == d->code) {
            return d;
        }
        if (code < d->code) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

/* The character that two make together, -1: none. */
static int32_t compose(int32_t first, int32_t second)
{
    if (first >= HANGUL_L && first < HANGUL_L + N_HANGUL_L && second >= HANGUL_V &&
        second < HANGUL_V + N_HANGUL_V) {
        return HANGUL_S + ((first - HANGUL_L) * N_HANGUL_V + second - HANGUL_V) * N_HANGUL_T;
    }
    if (first >= HANGUL_S && first < HANGUL_S + N_HANGUL_S && second > HANGUL_T &&
        second < HANGUL_T + N_HANGUL_T && (first - HANGUL_S) % N_HANGUL_T == 0) {
        return first + second - HANGUL_T;
    }
    int32_t low = 0, high = unicode_n_compositions;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        const struct unicode_decomposition *d = &unicode_decomposition[unicode_composition[middle]];
        if (d->first == first && d->second == second) {
            return d->code;
        }
        if (first < d->first || (first == d->first && second < d->second)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return -1;
}

static enum status push(struct marks *m, int32_t code)
{
    if (m->n == m->capacity) {
        size_t more = m->capacity ? 2 * m->capacity : 256;
        TRY(mem_grow_array((void **)&m->item, m->n, more, sizeof *m->item));
        m->capacity = more;
    }
    m->item[m->n] = (struct mark){.code = code, .kind = combining_class(code), .place = m->n};
    m->n++;
    return ST_OK;
}

/* The recursion is as deep as Unicode's own tables nest (at most 3). */
static enum status push_decomposed(struct marks *m, int32_t code)
{
    if (code >= HANGUL_S && code < HANGUL_S + N_HANGUL_S) {
        int32_t s = code - HANGUL_S;
        TRY(push(m, HANGUL_L + s / (N_HANGUL_V * N_HANGUL_T)));
        TRY(push(m, HANGUL_V + s % (N_HANGUL_V * N_HANGUL_T) / N_HANGUL_T));
        if (s % N_HANGUL_T) {
            TRY(push(m, HANGUL_T + s % N_HANGUL_T));
        }
        return ST_OK;
    }
    const struct unicode_decomposition *d = find_decomposition(code);
    if (!d) {
        TRY(push(m, code));
        return ST_OK;
    }
    TRY(push_decomposed(m, d->first));
    if (d->second) {
        TRY(push_decomposed(m, d->second));
    }
    return ST_OK;
}

static int compare_marks(const void *a, const void *b)
{
    const struct mark *x = a, *y = b;
    if (x->kind != y->kind) {
        return x->kind < y->kind ? -1 : 1;
    }
    return x->place < y->place ? -1 : x->place > y->place;
}

static void order_marks(struct marks *m)
{
    for (size_t i = 0; i < m->n;) {
        size_t end = i;
        while (end < m->n && m->item[end].kind) {
            end++;
        }
        if (end - i > 1) {
            // qsort: a hostile run of marks must not cost its square
            qsort(m->item + i, end - i, sizeof *m->item, compare_marks);
        }
        i = end > i ? end : i + 1;
    }
}

static void compose_all(struct marks *m)
{
    size_t n = 0, starter = 0;
    bool have_starter = false;
    int32_t last_kind = 0;
    for (size_t i = 0; i < m->n; i++) {
        struct mark c = m->item[i];
        if (have_starter && (last_kind == 0 || last_kind < c.kind)) {
            int32_t both = compose(m->item[starter].code, c.code);
            if (both >= 0) {
                m->item[starter].code = both;
                continue;
            }
        }
        if (c.kind == 0) {
            starter = n;
            have_starter = true;
        }
        last_kind = c.kind;
        m->item[n++] = c;
    }
    m->n = n;
}

enum status unicode_nfc(const char *text, size_t bytes, char **out, size_t *out_bytes)
{
    struct marks m = {0};
    char *made = NULL;
    size_t room = 0, n = 0;
    bool stable = true;
    enum status st = ST_OK;
    for (size_t i = 0; i < bytes && stable; i++) {
        // below U+0300, which begins with this byte, all text is its own normal form
        stable = (unsigned char)text[i] < 0xCC;
    }
    if (stable) {
        TRY(mem_alloc_array((void **)&made, bytes, 1));
        memcpy(made, text, bytes);
        *out = made;
        *out_bytes = bytes;
        return ST_OK;
    }
    for (size_t i = 0; i < bytes;) {
        int32_t code = 0;
        int size = utf8_read(text + i, bytes - i, &code);
        if (size == 0) {
            FAIL_GOTO(st, ST_USER, done, "byte %zu of the text is not UTF-8", i);
        }
        TRY_GOTO(st, push_decomposed(&m, code), done);
        i += (size_t)size;
    }
    order_marks(&m);
    compose_all(&m);
    TRY_GOTO(st, mem_mul(&room, m.n, 4), done);
    TRY_GOTO(st, mem_alloc_array((void **)&made, room, 1), done);
    for (size_t i = 0; i < m.n; i++) {
        n += (size_t)utf8_write(made + n, m.item[i].code);
    }
    *out = made;
    *out_bytes = n;
done:
    mem_free(m.item);
    return st;
}
