/* A model folder, plain or nested, loaded whole into the oracle and asked for a token: config.json,
 * the header of model.safetensors, the first bytes of its data.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/decoder.h"
#include "dist/shard.h"
#include "kernels/kernels.h"
#include "tests/fuzz/fuzz.h"

enum { TOKENS = 4 };

/* Larger ones are left to checks that need no computing. */
static bool is_tiny(const struct model_config *c)
{
    int64_t width = (int64_t)c->n_heads * c->head_dim;
    return c->hidden <= 128 && c->ffn <= 256 && c->vocab <= 512 && c->n_layers <= 4 && width <= 256;
}

static void decode(struct backend *be, struct weights *w, const struct level_table *levels)
{
    struct decoder_options options = {
        .n_slots = 1, .max_tok = TOKENS, .prefill_chunk = TOKENS, .kv_dtype = DT_F16};
    struct collective coll;
    struct decoder *dec = NULL;
    collective_local(&coll);
    options.max_tok = w->config.context < TOKENS ? w->config.context : TOKENS;
    if (fuzz_ok(decoder_create(&dec, be, &coll, w, levels, &options))) {
        struct logit_want want = {.target = -1};
        struct decode_token token = {
            .id = w->config.vocab - 1, .level = levels->n - 1, .want = want};
        struct token_result result;
        struct pass_record pass;
        int32_t first = 0;
        if (fuzz_ok(decoder_prefill(dec, 0, &first, 1, 0, &want, 1, &result, &pass))) {
            INVARIANT(result.token >= 0 && result.token < w->config.vocab);
            if (options.max_tok > 1 && fuzz_ok(decoder_step(dec, &token, 1, &result, &pass))) {
                INVARIANT(result.token >= 0 && result.token < w->config.vocab);
                INVARIANT(isfinite(result.logprob) && result.logprob <= 0);
            }
        }
    }
    decoder_destroy(&dec);
    collective_close(&coll);
}

static void load(const struct model_source *src)
{
    const struct model_config *c = &src->config;
    struct backend be;
    struct backend_options options = {.n_threads = 1, .device = -1};
    struct weights w;
    struct level_table levels;
    int32_t id;
    int32_t size = c->vocab % 4 ? 1 : 2; // of two ranks the last one
    struct shard_options so = {.size = size};
    struct model_shard shard;
    level_table_init(&levels, c, src->held, src->head_held, src->dense_bits, src->head_dense_bits);
    bool good = fuzz_ok(level_table_add(&levels, "max", &id));
    good = fuzz_ok(level_table_add(&levels, "2", &id)) || good;
    INVARIANT(good == (levels.n > 0));
    if (good && fuzz_ok(shard_model(&shard, c, c->nested ? c->group_cols : 1, &so, size - 1)) &&
        is_tiny(c)) {
        INVARIANT(backend_open(&be, "cpu_ref", &options) == ST_OK);
        if (fuzz_ok(weights_load(&w, &be, src, &shard, 0))) {
            if (size == 1) {
                decode(&be, &w, &levels);
            }
            weights_free(&w);
        }
        backend_close(&be);
    }
    level_table_release(&levels);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_part part[3];
    struct model_source src;
    kernels_register_all();
    fuzz_split(part, 3, data, size);
    fuzz_put_part("config.json", &part[0]);
    if (part[1].text) {
        fuzz_put_safetensors("model.safetensors", &part[1], &part[2]);
    } else {
        fuzz_put("model.safetensors", NULL, 0);
    }
    if (fuzz_ok(model_source_open(&src, fuzz_folder()))) {
        INVARIANT(src.config.nested == (src.index != NULL));
        INVARIANT(src.config.nested || (src.held == 0 && src.dense_bits > 0));
        load(&src);
        model_source_close(&src);
    }
    return 0;
}

/* Half of the time the header's offsets are made to agree with its shapes again. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    size = LLVMFuzzerMutate(data, size, max_size);
    const uint8_t *stop = seed % 2 && size ? memchr(data, 0xFF, size) : NULL;
    if (!stop) {
        return size;
    }
    size_t at = (size_t)(stop - data) + 1;
    const uint8_t *end = memchr(data + at, 0xFF, size - at);
    size_t n = (end ? (size_t)(end - data) : size) - at, n_tail = size - at - n;
    uint8_t *tail = malloc(n_tail + 1);
    INVARIANT(tail != NULL);
    memcpy(tail, data + at + n, n_tail);
    size_t mended = fuzz_mend_header((char *)data + at, n, max_size - at - n_tail);
    n = mended ? mended : n;
    memcpy(data + at + n, tail, n_tail);
    free(tail);
    return at + n + n_tail;
}
