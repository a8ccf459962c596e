/* pmpd logits: what the model says after every token of a list, as a NumPy file, so that anyone can
 * compare with another engine.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "core/mem.h"
#include "experiments/args.h"
#include "experiments/cmd.h"
#include "experiments/engine.h"

static const char usage[] =
    "usage: pmpd logits MODEL --ids 1,2,3 --out FILE.npy [--bits B]\n"
    "Writes a float32 NumPy array (number of ids, vocabulary): row i is what follows ids 0..i.\n"
    "  --ids LIST       token ids, comma-separated, as they are (write the BOS yourself)\n"
    "  --out FILE.npy   replaced if it exists\n" ARGS_COMMON_HELP "Example:\n"
    "  pmpd logits ~/models/llama --ids 1,403,407,261,378 --out logits.npy\n";

/* Header of a .npy file, version 1.0: magic, version, length, a Python dictionary padded with
 * blanks to a multiple of 64. Source: NumPy's format specification (numpy.lib.format). */
static size_t npy_header(char *text, size_t bytes, int32_t n_rows, int32_t n_cols)
{
    char dict[128];
    int n =
        snprintf(dict, sizeof dict, "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }",
                 n_rows, n_cols);
    size_t total = (10 + (size_t)n + 1 + 63) / 64 * 64;
    INVARIANT(total <= bytes);
    memset(text, ' ', total);
    memcpy(text, "\x93NUMPY\x01\x00", 8);
    text[8] = (char)((total - 10) & 0xff);
    text[9] = (char)((total - 10) >> 8);
    memcpy(text + 10, dict, (size_t)n);
    text[total - 1] = '\n';
    return total;
}

static enum status write_npy(const char *path, const float *data, int32_t n_rows, int32_t n_cols)
{
    char temporary[SETTINGS_PATH_BYTES], header[256];
    size_t n = (size_t)n_rows * (size_t)n_cols,
           bytes = npy_header(header, sizeof header, n_rows, n_cols);
    snprintf(temporary, sizeof temporary, "%s.tmp.%d", path, (int)getpid());
    FILE *f = fopen(temporary, "wb");
    if (!f) {
        FAIL(ST_IO, "cannot write %s: %m", temporary);
    }
    bool good = fwrite(header, 1, bytes, f) == bytes && fwrite(data, sizeof *data, n, f) == n;
    good = fclose(f) == 0 && good;
    if (!good || rename(temporary, path) != 0) {
        enum status st =
            status_raise(ST_IO, __FILE__, __LINE__, __func__, "cannot write %s: %m", path);
        unlink(temporary);
        return st;
    }
    return ST_OK;
}

static enum status compute(struct engine *e, const struct settings *s, const int32_t *ids,
                           int32_t n, int32_t level, float *out)
{
    struct logit_want *wants = NULL;
    struct token_result *results = NULL;
    struct pass_record pass;
    enum status st = ST_OK;
    size_t vocab = (size_t)e->source.config.vocab;
    TRY_GOTO(st, MEM_NEW(&wants, s->decode.prefill_chunk), done);
    TRY_GOTO(st, MEM_NEW(&results, s->decode.prefill_chunk), done);
    for (int32_t i = 0; i < s->decode.prefill_chunk; i++) {
        wants[i].target = -1;
    }
    for (int32_t at = 0; at < n; at += s->decode.prefill_chunk) {
        int32_t m = n - at < s->decode.prefill_chunk ? n - at : s->decode.prefill_chunk;
        TRY_GOTO(st, decoder_prefill(e->dec, 0, ids + at, m, level, wants, m, results, &pass),
                 done);
        TRY_GOTO(st, decoder_logits(e->dec, out + (size_t)at * vocab), done);
    }
done:
    mem_free(wants);
    mem_free(results);
    return st;
}

static enum status prepare(struct engine *e, const struct settings *s, const char *text,
                           int32_t **ids, int32_t *n, int32_t *level)
{
    TRY(args_ids(ids, n, text, e->source.config.vocab));
    if (*n > e->context) {
        FAIL(ST_USER, "--ids has %d tokens, the context of the model is %d", *n, e->context);
    }
    return level_table_add(&e->levels, s->policy.level, level);
}

static enum status report(const struct args *a, const float *out, int32_t n, int32_t vocab,
                          const char *path)
{
    TRY(write_npy(path, out, n, vocab));
    if (a->json) {
        json_t *j = json_pack("{s:s, s:[i, i], s:s}", "file", path, "shape", n, vocab, "level",
                              a->settings.policy.level);
        json_dumpf(j, stdout, 0);
        json_decref(j);
        printf("\n");
    } else {
        printf("%s: float32 (%d, %d)\n", path, n, vocab);
    }
    return ST_OK;
}

enum status cmd_logits(struct env *env, int argc, char **argv)
{
    const char *ids_text = NULL, *path = NULL;
    const struct arg_option own[] = {
        {"ids", &ids_text, NULL}, {"out", &path, NULL}, {NULL, NULL, NULL}};
    struct args a;
    struct engine e;
    int32_t *ids = NULL, n = 0, level = 0;
    float *out = NULL;
    TRY(args_parse(&a, env, argc, argv, own, 1, usage));
    if (a.help) {
        fputs(env->rank == 0 ? usage : "", stdout);
        return ST_OK;
    }
    if (!ids_text || !path) {
        FAIL(ST_USER, "logits needs --ids LIST and --out FILE.npy");
    }
    enum status st = engine_open(&e, env, &a.settings);
    if (st == ST_OK) {
        st = prepare(&e, &a.settings, ids_text, &ids, &n, &level);
        st = st ? st
                : mem_alloc_array((void **)&out, (size_t)n * (size_t)e.source.config.vocab,
                                  sizeof *out);
        st = env_agree(env, st);
    }
    st = st ? st : engine_load(&e, &a.settings, false);
    if (st == ST_OK) {
        st = engine_loop_end(env, compute(&e, &a.settings, ids, n, level, out));
    }
    if (st == ST_OK) {
        st = env_agree(env,
                       env->rank == 0 ? report(&a, out, n, e.source.config.vocab, path) : ST_OK);
    }
    mem_free(out);
    mem_free(ids);
    engine_close(&e);
    return st;
}
