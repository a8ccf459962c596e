/* Ids back to text: a piece to bytes, and bytes to whole characters.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/tokenizer_internal.h"

#include <string.h>

#include "core/mem.h"
#include "core/unicode.h"

#define REPLACEMENT "\xEF\xBF\xBD"

/* What a call has shown so far. Room is left for the closing NUL; a character that does not fit is
 * dropped whole, which TOKENIZER_PIECE_BYTES excludes. */
struct shown {
    char *text;
    size_t n, capacity;
};

static void show(struct token_stream *s, struct shown *out, const void *bytes, size_t n)
{
    if (s->at_start) {
        s->at_start = false;
        if (s->tok->strip == STRIP_ONE_SPACE && n == 1 && *(const char *)bytes == ' ') {
            return;
        }
    }
    if (out->n + n < out->capacity) {
        memcpy(out->text + out->n, bytes, n);
        out->n += n;
    }
}

/* What is held cannot become a character: one U+FFFD for all of it, as Unicode 3.9 (substitution
 * of maximal subparts) has it. */
static void give_up_held(struct token_stream *s, struct shown *out)
{
    if (s->n_held > 0) {
        s->n_held = 0;
        show(s, out, REPLACEMENT, 3);
    }
}

static void feed_byte(struct token_stream *s, struct shown *out, unsigned char byte)
{
    s->held[s->n_held] = byte;
    int expected = utf8_expects(s->held, s->n_held + 1);
    if (expected == 0 && s->n_held > 0) {
        give_up_held(s, out);
        s->held[0] = byte;
        expected = utf8_expects(s->held, 1);
    }
    s->n_held++;
    if (expected == 0) {
        give_up_held(s, out);
    } else if (s->n_held == expected) {
        s->n_held = 0;
        show(s, out, s->held, (size_t)expected);
    }
}

static void feed(struct token_stream *s, struct shown *out, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        feed_byte(s, out, (unsigned char)bytes[i]);
    }
}

/* A byte-level piece is letters that stand for bytes. Text that is not (an added token with a
 * space, say) stands for itself. */
static void feed_letters(struct token_stream *s, struct shown *out, const char *text, size_t n)
{
    char bytes[TOKENIZER_MAX_PIECE];
    size_t n_bytes = 0;
    for (size_t i = 0; i < n;) {
        int32_t code = 0;
        int size = utf8_read(text + i, n - i, &code);
        int byte = size > 0 ? byte_from_letter(code) : -1;
        if (byte < 0) {
            feed(s, out, text, n);
            return;
        }
        bytes[n_bytes++] = (char)byte;
        i += (size_t)size;
    }
    feed(s, out, bytes, n_bytes);
}

static void feed_metaspace(struct token_stream *s, struct shown *out, const struct piece *p,
                           const char *text)
{
    bool drop = s->at_start && s->tok->strip == STRIP_FIRST_PIECE;
    if (s->tok->bytes_decoded && p->byte >= 0) {
        s->at_start = s->at_start && s->tok->strip < STRIP_METASPACE; // a byte shows something
        feed_byte(s, out, (unsigned char)p->byte);
        return;
    }
    if (drop) {
        s->at_start = false; // also where the piece shows nothing: only the first one is stripped
    }
    size_t first = 0;
    if (s->at_start && s->tok->strip >= STRIP_METASPACE) {
        bool begins = p->bytes >= METASPACE_BYTES && memcmp(text, METASPACE, METASPACE_BYTES) == 0;
        first = begins ? METASPACE_BYTES : 0;
        s->at_start = s->tok->strip == STRIP_METASPACES && first == p->bytes;
    }
    for (size_t i = first; i < p->bytes;) {
        if (s->tok->metaspace_to_space && i + METASPACE_BYTES <= p->bytes &&
            memcmp(text + i, METASPACE, METASPACE_BYTES) == 0) {
            if (!drop) {
                feed_byte(s, out, ' ');
            }
            i += METASPACE_BYTES;
        } else {
            feed_byte(s, out, (unsigned char)text[i]);
            i++;
        }
    }
}

void token_stream_begin(struct token_stream *s, const struct tokenizer *tok, bool strip_first)
{
    *s = (struct token_stream){.tok = tok, .at_start = strip_first};
}

static size_t finish(struct shown *out)
{
    if (out->capacity > 0) {
        out->text[out->n] = '\0';
    }
    return out->n;
}

size_t token_stream_next(struct token_stream *s, int32_t id, char *text, size_t capacity)
{
    struct shown out = {.text = text, .capacity = capacity};
    if (id < 0 || id >= s->tok->n_vocab || !s->tok->piece[id].flags) {
        give_up_held(s, &out);
        show(s, &out, REPLACEMENT, 3);
    } else if (!(s->tok->piece[id].flags & PIECE_SPECIAL)) {
        const struct piece *p = &s->tok->piece[id];
        if (s->tok->byte_level) {
            feed_letters(s, &out, s->tok->text + p->offset, p->bytes);
        } else {
            feed_metaspace(s, &out, p, s->tok->text + p->offset);
        }
    }
    return finish(&out);
}

size_t token_stream_end(struct token_stream *s, char *text, size_t capacity)
{
    struct shown out = {.text = text, .capacity = capacity};
    give_up_held(s, &out);
    return finish(&out);
}

enum status tokenizer_decode(const struct tokenizer *tok, const int32_t *ids, int32_t n_ids,
                             bool strip_first, char **text)
{
    enum status st = ST_OK;
    struct byte_buffer b = {0};
    struct token_stream s;
    char shown[TOKENIZER_PIECE_BYTES];
    *text = NULL;
    token_stream_begin(&s, tok, strip_first);
    for (int32_t i = 0; i < n_ids; i++) {
        size_t n = token_stream_next(&s, ids[i], shown, sizeof shown);
        TRY_GOTO(st, byte_buffer_add(&b, shown, n), done);
    }
    size_t n = token_stream_end(&s, shown, sizeof shown);
    TRY_GOTO(st, byte_buffer_add(&b, shown, n), done);
    TRY_GOTO(st, byte_buffer_add(&b, "", 1), done);
    *text = b.data;
    b.data = NULL;
done:
    mem_free(b.data);
    return st;
}
