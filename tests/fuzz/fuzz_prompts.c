/* The split that is asked for, then a prompt file.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdlib.h>
#include <string.h>

#include "core/prompts.h"
#include "tests/fuzz/fuzz.h"
#include "tests/gen.h"

enum { CONTEXT = 512, NEW_TOK = 4 };

static const struct tokenizer *byte_tokenizer(void)
{
    static struct tokenizer *tok; // for all inputs; reachable, so no leak
    struct gen_model m = gen_model_default();
    if (!tok) {
        INVARIANT(gen_model_write(fuzz_folder(), &m) == ST_OK);
        INVARIANT(tokenizer_open(&tok, fuzz_folder(), m.vocab) == ST_OK);
    }
    return tok;
}

static void check_prompts(struct prompts *p, const char *split)
{
    INVARIANT(p->n > 0 && strlen(p->digest) == DIGEST_TEXT - 1);
    for (int32_t i = 0; i < p->n; i++) {
        const struct prompt *q = &p->prompt[i];
        INVARIANT(q->id[0] && q->task && q->split && q->reference);
        INVARIANT(!split[0] || strcmp(q->split, split) == 0);
        INVARIANT(q->n_turns >= 1 && q->n_turns <= PROMPT_MAX_TURNS);
        for (int32_t k = 0; k < i && i < 64; k++) {
            INVARIANT(strcmp(p->prompt[k].id, q->id) != 0);
        }
    }
    if (!fuzz_ok(prompts_encode(p, byte_tokenizer(), CONTEXT, NEW_TOK))) {
        return;
    }
    for (int32_t i = 0; i < p->n; i++) {
        const struct prompt *q = &p->prompt[i];
        int64_t n = 0;
        for (int32_t t = 0; t < q->n_turns; t++) {
            INVARIANT(q->n_ids[t] == (int32_t)strlen(q->turns[t]) + (t == 0)); // one id per byte
            n += q->n_ids[t] + NEW_TOK;
        }
        INVARIANT(n <= CONTEXT);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_part part[2];
    struct prompts p;
    fuzz_split(part, 2, data, size);
    (void)byte_tokenizer();
    char *split = fuzz_text(&part[0]);
    fuzz_put("prompts.jsonl", part[1].text ? part[1].text : "", part[1].bytes);
    if (fuzz_ok(prompts_read(&p, fuzz_path("prompts.jsonl"), split, size % 3 ? 0 : 2))) {
        INVARIANT(size % 3 || p.n <= 2);
        check_prompts(&p, split);
    } else {
        INVARIANT(p.n == 0 && p.prompt == NULL);
    }
    prompts_free(&p);
    free(split);
    return 0;
}
