/* A text to encode, then tokenizer.model: a protobuf message.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz_tokenizer.h"

enum { VOCAB = 1000 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_part part[2];
    struct tokenizer *tok = NULL;
    fuzz_split(part, 2, data, size);
    if (!part[1].text) {
        return 0;
    }
    fuzz_put_part("tokenizer.model", &part[1]);
    if (fuzz_ok(tokenizer_open(&tok, fuzz_folder(), VOCAB))) {
        fuzz_tokenizer(tok, VOCAB, &part[0]);
    }
    tokenizer_close(&tok);
    return 0;
}

/* ---- a mutator that keeps the lengths of messages inside messages right ---- */

/* Bytes of the varint at p, 0: none. */
static size_t varint(const uint8_t *p, size_t bytes, uint64_t *x)
{
    *x = 0;
    for (size_t i = 0; i < bytes && i < 10; i++) {
        *x |= i < 9 ? (uint64_t)(p[i] & 0x7F) << 7 * i : 0;
        if (!(p[i] & 0x80)) {
            return i + 1;
        }
    }
    return 0;
}

struct span {
    size_t at, length_at, begin, end; /* tag; length; payload of wire type 2, else begin == end */
};

/* The field at `at`; false at the end or where the message is broken. */
static bool field(struct span *f, const uint8_t *p, size_t bytes, size_t at)
{
    uint64_t tag, x;
    size_t n = at < bytes ? varint(p + at, bytes - at, &tag) : 0;
    if (n == 0) {
        return false;
    }
    *f = (struct span){.at = at, .length_at = at + n};
    size_t m = varint(p + at + n, bytes - at - n, &x);
    size_t fixed = tag % 8 == 5 ? 4 : tag % 8 == 1 ? 8 : m;
    f->begin = f->end = at + n + fixed;
    if (tag % 8 == 2) {
        f->end = m && x <= bytes - f->begin ? f->begin + (size_t)x : bytes + 1;
    }
    return f->end <= bytes && f->end > f->length_at;
}

static size_t put_varint(uint8_t *p, uint64_t x)
{
    size_t n = 0;
    do {
        p[n++] = (uint8_t)((x & 0x7F) | (x > 0x7F ? 0x80 : 0));
        x >>= 7;
    } while (x);
    return n;
}

/* Drops, repeats or mutates one length-delimited field, whose length is written again; descends
 * with luck. Returns the new size of the message. */
static size_t mutate(uint8_t *p, size_t size, size_t max_size, unsigned seed)
{
    struct span f, pick = {0};
    unsigned n = 0;
    for (size_t at = 0; field(&f, p, size, at); at = f.end) {
        if (f.end > f.begin && (seed >> 8) % ++n == 0) {
            pick = f;
        }
    }
    if (n == 0 || max_size < 2 * size + 64 || seed % 8 == 0) {
        return LLVMFuzzerMutate(p, size, max_size);
    }
    size_t n_field = pick.end - pick.at, n_tail = size - pick.end;
    if (seed % 8 < 3) {
        size_t to = seed % 8 == 1 ? pick.at : pick.end + n_field;
        memmove(p + to, p + pick.end, n_tail);
        if (seed % 8 == 2) {
            memcpy(p + pick.end, p + pick.at, n_field);
        }
        return to + n_tail;
    }
    size_t n_inner = pick.end - pick.begin, room = max_size - size - 16;
    uint8_t *inner = malloc(room + n_tail);
    INVARIANT(inner != NULL);
    memcpy(inner, p + pick.begin, n_inner);
    memcpy(inner + room, p + pick.end, n_tail);
    n_inner = seed % 8 < 6 ? mutate(inner, n_inner, room, seed * 2654435761u + 1)
                           : LLVMFuzzerMutate(inner, n_inner, room);
    size_t at = pick.length_at + put_varint(p + pick.length_at, n_inner);
    memcpy(p + at, inner, n_inner);
    memcpy(p + at + n_inner, inner + room, n_tail);
    free(inner);
    return at + n_inner + n_tail;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    const uint8_t *stop = size ? memchr(data, 0xFF, size) : NULL;
    size_t head = stop ? (size_t)(stop - data) + 1 : 0;
    if (!stop || seed % 16 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    return head + mutate(data + head, size - head, max_size - head, seed / 16);
}
