/* SPDX-License-Identifier: Apache-2.0 */
#include "core/tokenizer_internal.h"

#include <string.h>

#include "core/mem.h"
#include "core/unicode.h"

static bool stands_for_itself(int byte)
{
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) ||
           (byte >= 0xAE && byte <= 0xFF);
}

int32_t byte_to_letter(int byte)
{
    if (stands_for_itself(byte)) {
        return byte;
    }
    // the others in order: 0x00..0x20, 0x7F..0xA0, 0xAD
    int place = byte <= 0x20 ? byte : byte <= 0xA0 ? 0x21 + byte - 0x7F : 0x21 + 0xA1 - 0x7F;
    return 0x100 + place;
}

int byte_from_letter(int32_t code)
{
    if (code < 0x100) {
        return stands_for_itself(code) ? code : -1;
    }
    int place = code - 0x100;
    if (place <= 0x20) {
        return place;
    }
    if (place < 0x21 + 0xA1 - 0x7F) {
        return place - 0x21 + 0x7F;
    }
    return place == 0x21 + 0xA1 - 0x7F ? 0xAD : -1;
}

enum status encode_work_add(struct encode_work *w, int32_t id)
{
    if (w->n_ids == w->ids_capacity) {
        size_t more = w->ids_capacity ? 2 * w->ids_capacity : 64;
        if (more > INT32_MAX) {
            FAIL(ST_USER, "a text of more than %d tokens is refused", INT32_MAX / 2);
        }
        TRY(mem_grow_array((void **)&w->ids, w->n_ids, more, sizeof *w->ids));
        w->ids_capacity = more;
    }
    w->ids[w->n_ids++] = id;
    return ST_OK;
}

static enum status reserve_symbols(struct encode_work *w, size_t n)
{
    size_t n_events = 0;
    if (n <= w->symbol_capacity) {
        return ST_OK;
    }
    if (n > INT32_MAX / 4) {
        FAIL(ST_USER, "a word of %zu bytes is refused", n);
    }
    size_t more = n < 256 ? 256 : n + n / 2;
    // every pair at the start, and two for each merge: n - 1 + 2 (n - 1)
    TRY(mem_mul(&n_events, more, 3));
    w->symbol_capacity = 0;
    mem_free(w->symbol);
    mem_free(w->heap);
    w->symbol = NULL;
    w->heap = NULL;
    TRY(MEM_NEW(&w->symbol, more));
    TRY(MEM_NEW(&w->heap, n_events));
    w->symbol_capacity = more;
    return ST_OK;
}

static bool event_before(const struct bpe_event *a, const struct bpe_event *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->pos < b->pos;
}

static void heap_push(struct bpe_event *heap, size_t *n, struct bpe_event e)
{
    size_t i = (*n)++;
    while (i > 0 && event_before(&e, &heap[(i - 1) / 2])) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = e;
}

static struct bpe_event heap_pop(struct bpe_event *heap, size_t *n)
{
    struct bpe_event top = heap[0], last = heap[--*n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= *n) {
            break;
        }
        if (child + 1 < *n && event_before(&heap[child + 1], &heap[child])) {
            child++;
        }
        if (!event_before(&heap[child], &last)) {
            break;
        }
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

static void push_pair(struct encode_work *w, size_t *n_events, int32_t left)
{
    int32_t right = left >= 0 ? w->symbol[left].next : -1;
    if (right < 0) {
        return;
    }
    const struct merge *m = merge_find(w->tok, w->symbol[left].id, w->symbol[right].id);
    if (m) {
        heap_push(w->heap, n_events, (struct bpe_event){m->rank, left, m->made});
    }
}

/* The lowest rank first, at equal ranks the leftmost. An event is stale when its pair is gone or
 * makes another piece by now; that it may have come from another pair with the same result is what
 * the reference implementation accepts too. Every merge removes a symbol, so it ends. */
static void merge_symbols(struct encode_work *w, size_t n)
{
    size_t n_events = 0;
    struct bpe_symbol *s = w->symbol;
    for (size_t i = 0; i < n; i++) {
        s[i].prev = (int32_t)i - 1;
        s[i].next = i + 1 < n ? (int32_t)i + 1 : -1;
    }
    for (size_t i = 0; i + 1 < n; i++) {
        push_pair(w, &n_events, (int32_t)i);
    }
    while (n_events > 0) {
        struct bpe_event e = heap_pop(w->heap, &n_events);
        int32_t right = s[e.pos].next;
        if (s[e.pos].id < 0 || right < 0) {
            continue;
        }
        const struct merge *m = merge_find(w->tok, s[e.pos].id, s[right].id);
        if (!m || m->made != e.made) {
            continue;
        }
        s[e.pos].id = e.made;
        s[e.pos].next = s[right].next;
        s[right].id = -1;
        if (s[right].next >= 0) {
            s[s[right].next].prev = e.pos;
        }
        push_pair(w, &n_events, s[e.pos].prev);
        push_pair(w, &n_events, e.pos);
    }
}

/* Characters that have no piece: unknown ones side by side make one unknown piece when the file
 * says so (fuse_unk). */
struct pending {
    bool unknown;
};

static void flush_unknown(struct encode_work *w, size_t *n, struct pending *p)
{
    if (p->unknown) {
        w->symbol[(*n)++].id = w->tok->unk;
        p->unknown = false;
    }
}

static enum status add_unknown(struct encode_work *w, size_t *n, struct pending *p,
                               const char *text, int size)
{
    if (w->tok->unk < 0) {
        FAIL(ST_USER,
             "the text has the character \"%.*s\", for which the tokenizer has neither a "
             "piece nor an unknown token",
             size, text);
    }
    if (p->unknown && !w->tok->fuse_unk) {
        flush_unknown(w, n, p);
    }
    p->unknown = true;
    return ST_OK;
}

static bool fall_back_to_bytes(struct encode_work *w, size_t *n, const char *text, int size)
{
    for (int i = 0; i < size; i++) {
        if (w->tok->byte_id[(unsigned char)text[i]] < 0) {
            return false;
        }
    }
    for (int i = 0; i < size; i++) {
        w->symbol[(*n)++].id = w->tok->byte_id[(unsigned char)text[i]];
    }
    return true;
}

static enum status symbols_of_characters(struct encode_work *w, const char *text, size_t bytes,
                                         size_t *n)
{
    struct pending pending = {0};
    for (size_t i = 0; i < bytes;) {
        int size = utf8_read(text + i, bytes - i, NULL);
        INVARIANT(size > 0);
        int32_t id = vocab_find(w->tok, text + i, (size_t)size);
        if (id >= 0) {
            flush_unknown(w, n, &pending);
            w->symbol[(*n)++].id = id;
        } else if (!w->tok->byte_fallback || !fall_back_to_bytes(w, n, text + i, size)) {
            TRY(add_unknown(w, n, &pending, text + i, size));
        }
        i += (size_t)size;
    }
    flush_unknown(w, n, &pending);
    return ST_OK;
}

static enum status symbols_of_bytes(struct encode_work *w, const char *text, size_t bytes,
                                    size_t *n)
{
    struct pending pending = {0};
    for (size_t i = 0; i < bytes; i++) {
        int32_t id = w->tok->byte_id[(unsigned char)text[i]];
        if (id >= 0) {
            flush_unknown(w, n, &pending);
            w->symbol[(*n)++].id = id;
        } else {
            char letter[4];
            int size = utf8_write(letter, byte_to_letter((unsigned char)text[i]));
            TRY(add_unknown(w, n, &pending, letter, size));
        }
    }
    flush_unknown(w, n, &pending);
    return ST_OK;
}

/* The id of a whole piece, for models that look it up before they merge. */
static enum status find_whole(struct encode_work *w, const char *text, size_t bytes, int32_t *id)
{
    *id = -1;
    if (bytes > TOKENIZER_MAX_PIECE) {
        return ST_OK;
    }
    if (!w->tok->byte_level) {
        *id = vocab_find(w->tok, text, bytes);
        return ST_OK;
    }
    w->letters.n = 0;
    for (size_t i = 0; i < bytes; i++) {
        char letter[4];
        int size = utf8_write(letter, byte_to_letter((unsigned char)text[i]));
        TRY(byte_buffer_add(&w->letters, letter, (size_t)size));
    }
    *id = vocab_find(w->tok, w->letters.data, w->letters.n);
    return ST_OK;
}

enum status bpe_encode(struct encode_work *w, const char *text, size_t bytes)
{
    size_t n = 0;
    if (bytes == 0) {
        return ST_OK;
    }
    if (w->tok->ignore_merges) {
        int32_t id = -1;
        TRY(find_whole(w, text, bytes, &id));
        if (id >= 0) {
            TRY(encode_work_add(w, id));
            return ST_OK;
        }
    }
    TRY(reserve_symbols(w, bytes));
    if (w->tok->byte_level) {
        TRY(symbols_of_bytes(w, text, bytes, &n));
    } else {
        TRY(symbols_of_characters(w, text, bytes, &n));
    }
    merge_symbols(w, n);
    for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = w->symbol[i].next) {
        TRY(encode_work_add(w, w->symbol[i].id));
    }
    return ST_OK;
}
