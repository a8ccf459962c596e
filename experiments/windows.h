/* Texts as rows of token ids: what perplexity scores and what the quantiser is calibrated on.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_WINDOWS_H
#define PMPD_EXPERIMENTS_WINDOWS_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

enum { WINDOW_DEFAULT = 2048 }; /* tokens of a window of plain text, where the context allows */

struct windows {
    int32_t *ids;  /* owned: all rows, one after the other */
    size_t *begin; /* owned: (n + 1) */
    int32_t n;
    int32_t first; /* position of the first scored token of a row, >= 1 */
};

/* FILE.json, {"ids": [[...], ...], "first_scored_position": k}: every row is a window as it stands.
 * Any other file is plain text, cut by the tokenizer of the folder `model` into windows of `window`
 * tokens (each with the BOS in front where the tokenizer adds one); the last may be shorter.
 * Errors: ST_IO; ST_FORMAT (not such rows, ids outside the vocabulary); ST_USER (a row longer than
 * the context or not longer than k, a text too short). */
MUST_CHECK enum status windows_read(struct windows *out, const char *path, const char *model,
                                    int32_t vocab, int32_t context, int32_t window);
void windows_free(struct windows *w);
int32_t windows_length(const struct windows *w, int32_t i);
/* 32 hexadecimal digits of XXH3-128 over the rows. */
enum { WINDOWS_DIGEST_TEXT = 33 };
void windows_digest(const struct windows *w, char text[WINDOWS_DIGEST_TEXT]);

#endif
