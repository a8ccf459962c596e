/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/fuzz/fuzz_tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/unicode.h"

/* Streaming gives what decoding at once gives, in pieces of whole characters. (Of a whole text only
 * what stands before its first zero byte can be seen.) */
static void check_decode(const struct tokenizer *tok, const int32_t *ids, int32_t n, bool strip)
{
    struct token_stream s;
    char piece[TOKENIZER_PIECE_BYTES], *whole = NULL;
    size_t at = 0;
    INVARIANT(tokenizer_decode(tok, ids, n, strip, &whole) == ST_OK);
    size_t bytes = strlen(whole);
    INVARIANT(utf8_check(whole, bytes) == bytes);
    token_stream_begin(&s, tok, strip);
    for (int32_t i = 0; i <= n; i++) {
        size_t m = i < n ? token_stream_next(&s, ids[i], piece, sizeof piece)
                         : token_stream_end(&s, piece, sizeof piece);
        INVARIANT(m < sizeof piece && piece[m] == '\0' && utf8_check(piece, m) == m);
        size_t seen = strlen(piece);
        INVARIANT(at + seen <= bytes && memcmp(whole + at, piece, seen) == 0);
        at += seen;
        if (seen < m) {
            break;
        }
    }
    INVARIANT(at == bytes);
    mem_free(whole);
}

static void check_text(const struct tokenizer *tok, const struct fuzz_part *text, bool special)
{
    int32_t *ids = NULL, n = 0;
    bool valid = utf8_check(text->text, text->bytes) == text->bytes;
    bool good = fuzz_ok(tokenizer_encode(tok, text->text, text->bytes, special, &ids, &n));
    INVARIANT(valid || !good);
    INVARIANT(good == (ids != NULL) && n >= 0);
    for (int32_t i = 0; i < n; i++) {
        INVARIANT(ids[i] >= 0 && ids[i] < tokenizer_n_vocab(tok));
    }
    if (good) {
        int32_t bos = tokenizer_bos(tok);
        INVARIANT(!special || bos < 0 || (n > 0 && ids[0] == bos));
        check_decode(tok, ids, n, special);
    }
    mem_free(ids);
}

void fuzz_tokenizer(const struct tokenizer *tok, int32_t n_vocab_model,
                    const struct fuzz_part *text)
{
    const struct fuzz_part empty = {"", 0};
    int32_t n_vocab = tokenizer_n_vocab(tok), bos = tokenizer_bos(tok);
    INVARIANT(n_vocab > 0 && n_vocab <= n_vocab_model && bos >= -1 && bos < n_vocab);
    INVARIANT(tokenizer_kind(tok)[0]);
    check_text(tok, text->text ? text : &empty, false);
    check_text(tok, text->text ? text : &empty, true);
    int32_t *all = malloc(((size_t)n_vocab + 2) * sizeof *all);
    INVARIANT(all != NULL);
    for (int32_t i = 0; i < n_vocab + 2; i++) {
        all[i] = i - 1; // one below, one above
    }
    check_decode(tok, all, n_vocab + 2, true);
    free(all);
}
