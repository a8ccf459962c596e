/* Prompt files: JSONL, one object per line: id (string or number; default the line number), task,
 * split, turns: [text...] (a later turn continues the same KV cache), reference, template ("none",
 * the default: the text as it is). Other members are kept by nobody and allowed.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_PROMPTS_H
#define PMPD_CORE_PROMPTS_H

#include <stdint.h>

#include "core/checkpoint.h"
#include "core/status.h"
#include "core/tokenizer.h"

enum { PROMPT_MAX_TURNS = 16 };

struct prompt {
    char *id, *task, *split, *reference; /* owned; "" where the file has none */
    int32_t n_turns;
    char *turns[PROMPT_MAX_TURNS];  /* owned; UTF-8 */
    int32_t *ids[PROMPT_MAX_TURNS]; /* owned; after prompts_encode; turn 0 with BOS, later
                                       turns without */
    int32_t n_ids[PROMPT_MAX_TURNS];
};

struct prompts {
    int32_t n;
    struct prompt *prompt;    /* (n) owned, in file order; the index is the prompt's ordinal */
    char digest[DIGEST_TEXT]; /* XXH3-128 of the file's bytes */
};

/* Reads a file; split "" takes all lines, else those of that split; limit 0: no limit.
 * Errors: ST_IO; ST_FORMAT with file:line; ST_USER: no prompt is left ("FILE has no prompt of split
 * "test"; it has: validation (60)"), duplicate id, an unknown template, more turns than fit.
 * out->prompt is owned by the caller, back with prompts_free; on failure *out is empty. */
MUST_CHECK enum status prompts_read(struct prompts *out, const char *path, const char *split,
                                    int32_t limit);
/* Fills ids. Errors: ST_USER: a prompt whose turns + n_new tokens per turn exceed the context, by
 * file id with the three numbers and what to change; an empty prompt. */
MUST_CHECK enum status prompts_encode(struct prompts *p, const struct tokenizer *tok,
                                      int32_t context, int32_t n_new);
void prompts_free(struct prompts *p);

#endif
