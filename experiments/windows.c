/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/windows.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "core/json.h"
#include "core/mem.h"
#include "core/settings.h"
#include "core/tokenizer.h"

enum { FILE_LIMIT = 1 << 30 };

void windows_free(struct windows *w)
{
    mem_free(w->ids);
    mem_free(w->begin);
    *w = (struct windows){0};
}

int32_t windows_length(const struct windows *w, int32_t i)
{
    return (int32_t)(w->begin[i + 1] - w->begin[i]);
}

static enum status windows_of_json(struct windows *out, const json_t *root, const char *path,
                                   int32_t vocab, int32_t context)
{
    const json_t *rows = json_member(root, "ids");
    size_t n = json_array_size(rows), total = 0;
    TRY(json_get_i32_or(&out->first, root, "first_scored_position", 1, INT32_MAX, 1, path));
    if (!json_is_array(rows) || n == 0 || n > INT32_MAX) {
        FAIL(ST_FORMAT, "%s: expected \"ids\": a list of rows of token ids", path);
    }
    for (size_t i = 0; i < n; i++) {
        total += json_array_size(json_array_get(rows, i));
    }
    TRY(MEM_NEW(&out->ids, total));
    TRY(MEM_NEW(&out->begin, n + 1));
    for (size_t i = 0, at = 0; i < n; i++) {
        const json_t *row = json_array_get(rows, i);
        size_t length = json_array_size(row);
        if (length <= (size_t)out->first || length > (size_t)context) {
            FAIL(ST_USER,
                 "%s: row %zu has %zu tokens; expected more than first_scored_position = %d "
                 "and at most the context, %d",
                 path, i, length, out->first, context);
        }
        for (size_t j = 0; j < length; j++) {
            const json_t *id = json_array_get(row, j);
            json_int_t v = json_is_integer(id) ? json_integer_value(id) : -1;
            if (v < 0 || v >= vocab) {
                FAIL(ST_FORMAT, "%s: row %zu, position %zu: expected a token id below %d", path, i,
                     j, vocab);
            }
            out->ids[at++] = (int32_t)v;
        }
        out->begin[i + 1] = at;
    }
    out->n = (int32_t)n;
    return ST_OK;
}

static enum status windows_of_text(struct windows *out, const char *text, size_t bytes,
                                   const char *path, const struct tokenizer *tok, int32_t window)
{
    int32_t *ids = NULL, n_ids = 0;
    int32_t bos = tokenizer_bos(tok), step = bos >= 0 ? window - 1 : window;
    enum status st = ST_OK;
    TRY(tokenizer_encode(tok, text, bytes, false, &ids, &n_ids));
    int32_t most = n_ids / step + 1;
    TRY_GOTO(st, MEM_NEW(&out->ids, (size_t)n_ids + (size_t)most), done);
    TRY_GOTO(st, MEM_NEW(&out->begin, most + 1), done);
    out->first = 1;
    size_t used = 0;
    for (int32_t at = 0; at < n_ids; at += step) {
        int32_t n = n_ids - at < step ? n_ids - at : step;
        if (n + (bos >= 0) < 2) {
            break; /* nothing in it would be scored */
        }
        if (bos >= 0) {
            out->ids[used++] = bos;
        }
        memcpy(out->ids + used, ids + at, (size_t)n * sizeof *ids);
        used += (size_t)n;
        out->begin[++out->n] = used;
    }
    if (out->n == 0) {
        st = status_raise(ST_USER, __FILE__, __LINE__, __func__,
                          "%s is too short to be scored: %d tokens", path, n_ids);
    }
done:
    mem_free(ids);
    return st;
}

enum status windows_read(struct windows *out, const char *path, const char *model, int32_t vocab,
                         int32_t context, int32_t window)
{
    struct tokenizer *tok = NULL;
    char *text = NULL;
    json_t *root = NULL;
    enum status st = ST_OK;
    size_t length = strlen(path);
    *out = (struct windows){0};
    if (length > 5 && strcmp(path + length - 5, ".json") == 0) {
        TRY_GOTO(st, json_read_file(&root, path, FILE_LIMIT), done);
        TRY_GOTO(st, windows_of_json(out, root, path, vocab, context), done);
        goto done;
    }
    if (window > context) {
        FAIL(ST_USER, "--window %d is larger than the context of the model, %d", window, context);
    }
    TRY_GOTO(st, tokenizer_open(&tok, model, vocab), done);
    TRY_GOTO(st, settings_read_file(&text, path), done);
    TRY_GOTO(st, windows_of_text(out, text, strlen(text), path, tok, window), done);
done:
    json_release(&root);
    mem_free(text);
    tokenizer_close(&tok);
    if (st != ST_OK) {
        windows_free(out);
    }
    return st;
}

void windows_digest(const struct windows *w, char text[WINDOWS_DIGEST_TEXT])
{
    XXH128_hash_t h = XXH3_128bits_withSeed(w->ids, w->begin[w->n] * sizeof *w->ids, 0);
    h = XXH3_128bits_withSeed(w->begin, ((size_t)w->n + 1) * sizeof *w->begin, h.low64 ^ h.high64);
    snprintf(text, WINDOWS_DIGEST_TEXT, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
}
