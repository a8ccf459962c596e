/* Faults inside the program's own calls: loading, passes, leases. The linker sends every call of
 * these functions from another object here. SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/backend.h"
#include "core/decoder.h"
#include "core/session.h"
#include "core/weights.h"
#include "dist/env.h"
#include "dist/lease.h"
#include "tests/faults/fault.h"

enum { MAX_SLOTS = 64 };

#define WRAP(result, name, ...)        \
    result __real_##name(__VA_ARGS__); \
    result __wrap_##name(__VA_ARGS__); \
    result __wrap_##name(__VA_ARGS__)

static bool loading;
static int64_t starting = -1;      /* the prompt that is being put into a slot */
static int64_t in_slot[MAX_SLOTS]; /* its prompt */
static enum fault_action in_pass;  /* is due in the pass under way ... */
static int32_t bad_row = -1;       /* ... in this row; -1: in all */

/* ---- where this process is ---- */

WRAP(enum status, env_start, struct env *env, int *argc, char ***argv)
{
    enum status st = __real_env_start(env, argc, argv);
    fault_set_rank(env->rank);
    return st;
}

WRAP(enum status, env_grid, struct env *env, int tensor_ranks)
{
    enum status st = __real_env_grid(env, tensor_ranks);
    fault_set_grid(env->tensor_rank, env->replica);
    return st;
}

/* ---- loading ---- */

/* Of a prompt's own doing, or (ST_IO) one that any prompt may meet. */
static enum status raise_fault(enum status st, const char *where)
{
    FAIL(st, "an error that the test makes, at %s", where);
}

WRAP(enum status, weights_load, struct weights *out, struct backend *be,
     const struct model_source *src, const struct model_shard *shard, int n_planes)
{
    loading = true;
    enum status st = __real_weights_load(out, be, src, shard, n_planes);
    loading = false;
    return st;
}

WRAP(enum status, backend_upload, struct backend *be, void *dst, const void *src_host, size_t bytes)
{
    if (loading && fault_at("load", NULL, 0, NULL) != FAULT_NONE) {
        return raise_fault(ST_IO, "load");
    }
    return __real_backend_upload(be, dst, src_host, bytes);
}

WRAP(enum status, backend_planes_load, struct backend *be, struct nested_matrix *w,
     const struct nested_source *src, const struct matrix_range *range, int n_planes)
{
    if (loading && fault_at("load", NULL, 0, NULL) != FAULT_NONE) {
        return raise_fault(ST_IO, "load");
    }
    return __real_backend_planes_load(be, w, src, range, n_planes);
}

/* ---- prompts and slots ---- */

WRAP(enum status, session_start, struct session *s, const struct prompt *prompt, int64_t ordinal,
     const uint64_t key[2], int32_t attempt, float dial)
{
    fault_log("start %d %lld\n", fault_rank(), (long long)ordinal);
    if (fault_at("start", &ordinal, 1, NULL) != FAULT_NONE) {
        return raise_fault(ST_SHAPE, "start");
    }
    starting = ordinal;
    enum status st = __real_session_start(s, prompt, ordinal, key, attempt, dial);
    starting = -1;
    return st;
}

WRAP(void, decoder_clear_slot, struct decoder *dec, int32_t slot)
{
    if (slot < MAX_SLOTS) {
        in_slot[slot] = starting;
    }
    __real_decoder_clear_slot(dec, slot);
}

/* ---- passes ---- */

WRAP(enum status, decoder_prefill, struct decoder *dec, int32_t slot, const int32_t *ids, int32_t n,
     int32_t level, const struct logit_want *wants, int32_t n_results, struct token_result *results,
     struct pass_record *pass)
{
    int64_t ordinal = in_slot[slot % MAX_SLOTS];
    in_pass = fault_due("prefill", &ordinal, 1, NULL);
    bad_row = -1;
    return __real_decoder_prefill(dec, slot, ids, n, level, wants, n_results, results, pass);
}

WRAP(enum status, decoder_step, struct decoder *dec, const struct decode_token *tokens, int32_t n,
     struct token_result *results, struct pass_record *pass)
{
    int64_t ordinals[MAX_SLOTS] = {0};
    int which = 0;
    for (int32_t i = 0; i < n && i < MAX_SLOTS; i++) {
        ordinals[i] = in_slot[tokens[i].slot % MAX_SLOTS];
    }
    in_pass = fault_due("decode", ordinals, n < MAX_SLOTS ? n : MAX_SLOTS, &which);
    bad_row = which;
    return __real_decoder_step(dec, tokens, n, results, pass);
}

/* y: (n_tok, heads, head_dim) f32, in host memory: the faulty program runs on CPU backends. */
static void spoil(struct tensor *y, int32_t row)
{
    float *values = y->data;
    size_t width = (size_t)y->dims[1] * (size_t)y->dims[2];
    for (int32_t i = 0; i < y->dims[0]; i++) {
        for (size_t j = 0; (row < 0 || row == i) && j < width; j++) {
            values[(size_t)i * width + j] = NAN;
        }
    }
}

WRAP(enum status, backend_attention, struct backend *be, struct tensor *y, const struct tensor *q,
     const struct kv_layer *kv, const struct token_place *place, float scale)
{
    enum fault_action action = fault_act(in_pass);
    enum status st = __real_backend_attention(be, y, q, kv, place, scale);
    in_pass = FAULT_NONE;
    if (action == FAULT_NAN && st == ST_OK) {
        spoil(y, bad_row);
    } else if (action != FAULT_NONE) {
        return raise_fault(ST_SHAPE, "attention");
    }
    return st;
}

/* ---- leases ---- */

WRAP(enum status, lease_client_finish, struct lease_client *client,
     const struct finished_record *record)
{
    if (fault_at("finish", &record->ordinal, 1, NULL) != FAULT_NONE) {
        return raise_fault(ST_SHAPE, "finish");
    }
    return __real_lease_client_finish(client, record);
}

WRAP(enum status, lease_client_poll, struct lease_client *client, enum lease_state *state,
     struct lease_item *item)
{
    if (fault_is_idle()) {
        *state = LEASE_NONE_LEFT;
        return ST_OK;
    }
    return __real_lease_client_poll(client, state, item);
}
