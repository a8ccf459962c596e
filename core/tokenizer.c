/* SPDX-License-Identifier: Apache-2.0 */
#include "core/tokenizer_internal.h"

#include <string.h>

#include "core/mem.h"
#include "core/unicode.h"

enum status byte_buffer_add(struct byte_buffer *b, const void *data, size_t bytes)
{
    size_t needed = 0, doubled = 0;
    TRY(mem_add(&needed, b->n, bytes));
    if (needed > b->capacity) {
        TRY(mem_mul(&doubled, needed, 2));
        size_t more = doubled < 256 ? 256 : doubled;
        TRY(mem_grow_array((void **)&b->data, b->n, more, 1));
        b->capacity = more;
    }
    if (bytes > 0) {
        memcpy(b->data + b->n, data, bytes);
    }
    b->n = needed;
    return ST_OK;
}

static bool begins_with(const char *text, size_t bytes, const char *what)
{
    size_t n = strlen(what);
    return bytes >= n && memcmp(text, what, n) == 0;
}

/* Appends text with every `from` made `to`. */
static enum status add_replaced(struct byte_buffer *out, const char *text, size_t bytes,
                                const char *from, const char *to)
{
    size_t n_from = strlen(from), n_to = strlen(to), done = 0;
    for (size_t i = 0; i + n_from <= bytes;) {
        if (text[i] == from[0] && memcmp(text + i, from, n_from) == 0) {
            TRY(byte_buffer_add(out, text + done, i - done));
            TRY(byte_buffer_add(out, to, n_to));
            i += n_from;
            done = i;
        } else {
            i++;
        }
    }
    TRY(byte_buffer_add(out, text + done, bytes - done));
    return ST_OK;
}

static enum status normalise_step(const struct norm_step *step, const char *text, size_t bytes,
                                  struct byte_buffer *out)
{
    char *form = NULL;
    size_t form_bytes = 0;
    switch (step->kind) {
    case NORM_PREPEND:
        if (bytes > 0) {
            TRY(byte_buffer_add(out, step->to, strlen(step->to)));
        }
        TRY(byte_buffer_add(out, text, bytes));
        break;
    case NORM_REPLACE:
        TRY(add_replaced(out, text, bytes, step->from, step->to));
        break;
    case NORM_NFC:
        TRY(unicode_nfc(text, bytes, &form, &form_bytes));
        enum status st = byte_buffer_add(out, form, form_bytes);
        mem_free(form);
        TRY(st);
        break;
    }
    return ST_OK;
}

enum status tokenizer_normalise(const struct tokenizer *tok, const char *text, size_t bytes,
                                struct byte_buffer *out)
{
    enum status st = ST_OK;
    struct byte_buffer now = {0}, next = {0};
    TRY_GOTO(st, byte_buffer_add(&now, text, bytes), done);
    for (int i = 0; i < tok->n_norms; i++) {
        next.n = 0;
        TRY_GOTO(st, normalise_step(&tok->norm[i], now.data, now.n, &next), done);
        struct byte_buffer swap = now;
        now = next;
        next = swap;
    }
    out->n = 0;
    TRY_GOTO(st, byte_buffer_add(out, now.data, now.n), done);
done:
    mem_free(now.data);
    mem_free(next.data);
    return st;
}

/* Byte-level: the patterns from `level` on cut the text; what lies between matches is a piece of
 * its own. */
static enum status encode_split(struct encode_work *w, int level, const char *text, size_t bytes)
{
    if (level == w->tok->n_splits) {
        TRY(bpe_encode(w, text, bytes));
        return ST_OK;
    }
    for (size_t done = 0; done < bytes;) {
        size_t begin = 0, end = 0;
        TRY(regex_find(w->tok->split[level], w->scratch, text, bytes, done, &begin, &end));
        if (begin > done) {
            TRY(encode_split(w, level + 1, text + done, begin - done));
        }
        if (end > begin) {
            TRY(encode_split(w, level + 1, text + begin, end - begin));
        }
        done = end;
    }
    return ST_OK;
}

/* Metaspace: every U+2581 begins a piece. */
static enum status encode_cut(struct encode_work *w, const char *text, size_t bytes)
{
    size_t done = 0;
    for (size_t i = 1; w->tok->cut_at_metaspace && i < bytes; i++) {
        if (begins_with(text + i, bytes - i, METASPACE)) {
            TRY(bpe_encode(w, text + done, i - done));
            done = i;
        }
    }
    TRY(bpe_encode(w, text + done, bytes - done));
    return ST_OK;
}

/* A normalised section without added tokens. */
static enum status encode_plain(struct encode_work *w, const char *text, size_t bytes,
                                bool at_start)
{
    const struct tokenizer *tok = w->tok;
    const char *space = tok->byte_level ? " " : METASPACE;
    enum status st = ST_OK;
    struct byte_buffer b = {0};
    if (tok->spaces_to_metaspace) {
        TRY_GOTO(st, add_replaced(&b, text, bytes, " ", METASPACE), done);
        text = b.data;
        bytes = b.n;
    }
    bool wanted = tok->prefix == PREFIX_ALWAYS || (tok->prefix == PREFIX_FIRST && at_start);
    if (wanted && !begins_with(text, bytes, space)) {
        struct byte_buffer longer = {0};
        st = byte_buffer_add(&longer, space, strlen(space));
        if (st == ST_OK) {
            st = byte_buffer_add(&longer, text, bytes);
        }
        mem_free(b.data);
        b = longer;
        TRY_GOTO(st, st, done);
        text = b.data;
        bytes = b.n;
    }
    TRY_GOTO(st, tok->byte_level ? encode_split(w, 0, text, bytes) : encode_cut(w, text, bytes),
             done);
done:
    mem_free(b.data);
    return st;
}

/* The longest added token at text[at..], NULL: none. The tokens are in order, so those that agree
 * with the text so far are a range, and one that ends here is the first of it. */
static const struct added_token *match_added(const struct added_set *set, const char *text,
                                             size_t bytes, size_t at)
{
    const struct added_token *best = NULL;
    int32_t low = 0, high = set->n;
    if (!set->starts[(unsigned char)text[at]]) {
        return NULL;
    }
    for (size_t depth = 0; low < high; depth++) {
        if (set->token[low].bytes == depth) {
            best = &set->token[low++];
        }
        if (at + depth == bytes) {
            break;
        }
        unsigned char c = (unsigned char)text[at + depth];
        for (int end = 0; end < 2; end++) { // the range's begin, then its end
            int32_t a = low, b = high;
            while (a < b) {
                int32_t middle = a + (b - a) / 2;
                unsigned char m = (unsigned char)set->token[middle].text[depth];
                if (m < c || (end && m == c)) {
                    a = middle + 1;
                } else {
                    b = middle;
                }
            }
            *(end ? &high : &low) = a;
        }
    }
    return best;
}

static size_t space_begin(const char *text, size_t from, size_t end)
{
    while (end > from) {
        size_t i = end - 1;
        while (i > from && ((unsigned char)text[i] & 0xC0) == 0x80) {
            i--;
        }
        int32_t code = 0;
        if (utf8_read(text + i, end - i, &code) == 0 || !unicode_is_space(code)) {
            break;
        }
        end = i;
    }
    return end;
}

static size_t space_end(const char *text, size_t bytes, size_t from)
{
    int32_t code = 0;
    int size = 0;
    while ((size = utf8_read(text + from, bytes - from, &code)) > 0 && unicode_is_space(code)) {
        from += (size_t)size;
    }
    return from;
}

static enum status encode_sections(struct encode_work *w, int pass, const char *text, size_t bytes,
                                   bool at_start);

/* What lies between two added tokens: normalised after the first pass, cut up after the second. */
static enum status encode_between(struct encode_work *w, int pass, const char *text, size_t bytes,
                                  bool at_start)
{
    struct byte_buffer b = {0};
    if (pass == 1) {
        TRY(encode_plain(w, text, bytes, at_start));
        return ST_OK;
    }
    enum status st = tokenizer_normalise(w->tok, text, bytes, &b);
    if (st == ST_OK) {
        st = encode_sections(w, 1, b.data, b.n, at_start);
    }
    mem_free(b.data);
    TRY(st);
    return ST_OK;
}

static enum status encode_sections(struct encode_work *w, int pass, const char *text, size_t bytes,
                                   bool at_start)
{
    const struct added_set *set = &w->tok->added[pass];
    size_t done = 0;
    for (size_t i = 0; set->n > 0 && i < bytes;) {
        const struct added_token *t = match_added(set, text, bytes, i);
        if (!t) {
            i++;
            continue;
        }
        size_t begin = t->lstrip && i > done ? space_begin(text, done, i) : i;
        size_t end = t->rstrip ? space_end(text, bytes, i + t->bytes) : i + t->bytes;
        if (begin > done) {
            TRY(encode_between(w, pass, text + done, begin - done, at_start && done == 0));
        }
        TRY(encode_work_add(w, t->id));
        i += t->bytes;
        done = end;
    }
    if (done < bytes) {
        TRY(encode_between(w, pass, text + done, bytes - done, at_start && done == 0));
    }
    return ST_OK;
}

enum status tokenizer_encode(const struct tokenizer *tok, const char *text, size_t bytes,
                             bool add_special, int32_t **ids, int32_t *n_ids)
{
    enum status st = ST_OK;
    struct encode_work w = {.tok = tok};
    *ids = NULL;
    *n_ids = 0;
    if (bytes > TOKENIZER_MAX_TEXT) {
        FAIL(ST_USER, "a text of %zu bytes is refused, at most %d are read at once", bytes,
             TOKENIZER_MAX_TEXT);
    }
    size_t valid = utf8_check(text, bytes);
    if (valid < bytes) {
        FAIL(ST_USER, "byte %zu of the text (0x%02x) is not UTF-8; convert the text to UTF-8",
             valid, (unsigned)(unsigned char)text[valid]);
    }
    if (tok->n_splits > 0) {
        TRY_GOTO(st, regex_scratch_create(&w.scratch), done);
    }
    for (int i = 0; add_special && i < tok->n_first_ids; i++) {
        TRY_GOTO(st, encode_work_add(&w, tok->first_ids[i]), done);
    }
    TRY_GOTO(st,
             tok->spm ? tokenizer_encode_spm(&w, text, bytes)
                      : encode_sections(&w, 0, text, bytes, true),
             done);
    if (!w.ids) {
        TRY_GOTO(st, MEM_NEW(&w.ids, 1), done);
    }
    *ids = w.ids;
    *n_ids = (int32_t)w.n_ids;
    w.ids = NULL;
done:
    regex_scratch_free(&w.scratch);
    mem_free(w.ids);
    mem_free(w.symbol);
    mem_free(w.heap);
    mem_free(w.letters.data);
    return st;
}

int32_t tokenizer_n_vocab(const struct tokenizer *tok)
{
    return tok->n_vocab;
}

int32_t tokenizer_bos(const struct tokenizer *tok)
{
    return tok->n_first_ids > 0 ? tok->first_ids[0] : -1;
}

const char *tokenizer_kind(const struct tokenizer *tok)
{
    if (tok->spm) {
        return tok->spm_is_bpe ? "SentencePiece BPE" : "SentencePiece";
    }
    if (tok->byte_level) {
        return "BPE, byte-level";
    }
    return tok->byte_fallback ? "BPE, metaspace with byte fallback" : "BPE, metaspace";
}
