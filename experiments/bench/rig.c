/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/bench/rig.h"

#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/shard.h"
#include "experiments/bench/machine.h"
#include "experiments/bench/profile.h"
#include "experiments/bench/random_model.h"
#include "experiments/bench/shape.h"
#include "kernels/kernels.h"

enum { PROBE_PASSES = 3, MOST_SLOTS = 256, SEED = 1 };

uint32_t rig_bits(const struct bench_list *bits)
{
    uint32_t mask = 0;
    for (int i = 0; i < bits->n; i++) {
        mask |= 1u << bits->value[i];
    }
    return mask;
}

int32_t rig_most(const struct bench_list *list)
{
    int32_t most = list->value[0];
    for (int i = 1; i < list->n; i++) {
        most = list->value[i] > most ? list->value[i] : most;
    }
    return most;
}

/* Ranks that share this node's memory. */
static enum status count_local(struct env *env, int *n)
{
    MPI_Comm node;
    TRY_MPI(MPI_Comm_split_type(env->world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node));
    TRY_MPI(MPI_Comm_size(node, n));
    TRY_MPI(MPI_Comm_free(&node));
    return ST_OK;
}

static enum status open_backend(struct rig *rig, const struct bench_options *o, bool profile)
{
    struct backend_options bo = {
        .n_threads = rig->n_threads, .device = rig->local_rank, .isa = o->settings->backend.isa};
    kernels_register_all();
    TRY(backend_open(&rig->be, o->settings->backend.name, &bo));
    return profile ? profile_wrap(&rig->be) : ST_OK;
}

enum status rig_open_backend(struct rig *rig, struct env *env, const struct bench_options *o,
                             int n_threads, bool profile)
{
    *rig = (struct rig){.env = env, .n_threads = n_threads, .probe_bytes = o->probe_bytes};
    machine_forget_highest();
    TRY(env_grid(env, env->size));
    TRY(env_local_rank(env, &rig->local_rank));
    TRY(count_local(env, &rig->n_local));
    return env_agree(env, open_backend(rig, o, profile));
}

/* ---- a model ---- */

/* Of all decoders. */
static size_t kv_bytes(const struct rig *rig)
{
    const struct model_config *c = &rig->config;
    size_t n_slots = 0;
    for (int i = 0; i < rig->slots.n; i++) {
        n_slots += (size_t)rig->slots.value[i];
    }
    return 2 * (size_t)c->n_layers * n_slots * (size_t)c->n_kv_heads * ((size_t)rig->max_tok + 1) *
           (size_t)c->head_dim * dtype_bytes(rig->kv_dtype);
}

static enum status check_memory(const struct rig *rig, const struct bench_options *o, uint32_t bits)
{
    struct model_bytes b;
    size_t making = 0, have = machine_available_bytes(), n = (size_t)rig->n_local;
    enum level_kind kind = o->free_levels ? LEVEL_FREE : LEVEL_TIED;
    random_model_estimate(&b, &making, &rig->config, kind, bits);
    size_t probe = o->probe_bytes / n, logits = (size_t)rig->config.vocab * 4;
    logits *= (size_t)(o->chunk > rig_most(&rig->slots) ? o->chunk : rig_most(&rig->slots));
    size_t whole = b.planes + b.levels + kv_bytes(rig); /* shared among ranks */
    whole = whole / (size_t)rig->env->size * n;
    size_t each = b.embed + (making + b.embed > probe ? making + b.embed : probe) + logits;
    size_t need = whole + n * each;
    if (have > 0 && need > have && backend_is_host(&rig->be)) {
        FAIL(
            ST_USER,
            "the model needs %.1f GB of this node's memory (planes and levels %.1f, KV cache %.1f, "
            "embedding, making and probe %.1f for each of %d ranks) and %.1f GB are free: ask for "
            "fewer "
            "--bits, a smaller --context or --slots, or another --shape",
            1e-9 * (double)need, 1e-9 * (double)(b.planes + b.levels), 1e-9 * (double)kv_bytes(rig),
            1e-9 * (double)each, rig->n_local, 1e-9 * (double)have);
    }
    return ST_OK;
}

static enum status describe_model(struct rig *rig, const struct bench_options *o,
                                  const struct rig_needs *needs)
{
    struct model_config *c = &rig->config;
    const struct settings *s = o->settings;
    TRY(shape_get(c, o->shape));
    random_model_nest(c, o->group, needs->bits);
    c->context = needs->max_tok > c->context ? needs->max_tok : c->context;
    rig->max_tok = needs->max_tok;
    rig->slots = needs->slots;
    rig->kv_dtype = strcmp(s->kv.format, "f32") == 0 ? DT_F32 : DT_F16;
    struct shard_options so = {.size = rig->env->size,
                               .reproducible = s->parallel.reproducible,
                               .segments = s->parallel.segments};
    TRY(shard_model(&rig->shard, c, c->group_cols, &so, rig->env->tensor_rank));
    return check_memory(rig, o, needs->bits);
}

static enum status make_levels(struct rig *rig, uint32_t bits)
{
    level_table_init(&rig->levels, &rig->config, bits, bits, 16, 16);
    for (int b = 1; b <= BITS_MAX; b++) {
        char text[8];
        snprintf(text, sizeof text, "%d", b);
        if (bits >> b & 1) {
            TRY(level_table_add(&rig->levels, text, &rig->level[b]));
        }
    }
    return ST_OK;
}

static enum status make_model(struct rig *rig, const struct bench_options *o,
                              const struct rig_needs *needs)
{
    enum level_kind kind = o->free_levels ? LEVEL_FREE : LEVEL_TIED;
    TRY(random_model_load(&rig->weights, &rig->be, &rig->config, &rig->shard, kind, needs->bits));
    TRY(make_levels(rig, needs->bits));
    for (int i = 0; i < needs->slots.n; i++) {
        struct decoder_options d = {.n_slots = needs->slots.value[i],
                                    .max_tok = needs->max_tok,
                                    .prefill_chunk = needs->chunk,
                                    .kv_dtype = rig->kv_dtype};
        TRY(decoder_create(&rig->decs[i], &rig->be, &rig->coll, &rig->weights, &rig->levels, &d));
    }
    rig_use(rig, 0);
    return ST_OK;
}

void rig_use(struct rig *rig, int i)
{
    INVARIANT(i < rig->slots.n);
    rig->dec = rig->decs[i];
    rig->n_slots = rig->slots.value[i];
}

enum status rig_open(struct rig *rig, struct env *env, const struct bench_options *o,
                     const struct rig_needs *needs)
{
    TRY(rig_open_backend(rig, env, o, needs->n_threads, needs->profile));
    TRY(env_agree(env, describe_model(rig, o, needs)));
    size_t hint = (size_t)needs->chunk * (size_t)rig->config.hidden * sizeof(float);
    TRY(env_agree(env, coll_mpi_open(&rig->coll, env, o->settings->parallel.timeout_s, hint)));
    return env_agree(env, make_model(rig, o, needs));
}

void rig_close(struct rig *rig)
{
    bandwidth_close(&rig->bw);
    for (int i = 0; i < rig->slots.n; i++) {
        decoder_destroy(&rig->decs[i]);
    }
    weights_free(&rig->weights);
    level_table_release(&rig->levels);
    collective_close(&rig->coll);
    backend_close(&rig->be);
    machine_trim();
    *rig = (struct rig){0};
}

/* ---- memory ---- */

const struct column bench_memory_columns[] = {
    {"threads", "threads", 0},         {"ranks", "ranks", 0},
    {"resident_mb", "resident MB", 1}, {"planes_mb", "= planes", 1},
    {"levels_mb", "+ scales", 1},      {"kv_mb", "+ KV", 1},
    {"embed_mb", "+ embedding", 1},    {"other_mb", "+ other", 1},
    {"highest_mb", "highest MB", 1},   {NULL, NULL, 0},
};

enum status rig_memory(struct rig *rig, json_t *root)
{
    enum { RESIDENT, HIGHEST, PLANES, LEVELS, KV, EMBED, N };
    struct model_bytes b;
    size_t now, highest;
    double mine[N], all[N];
    machine_trim();
    machine_resident_bytes(&now, &highest);
    random_model_bytes(&b, &rig->weights);
    mine[RESIDENT] = 1e-6 * (double)now;
    mine[HIGHEST] = 1e-6 * (double)highest;
    mine[PLANES] = 1e-6 * (double)b.planes;
    mine[LEVELS] = 1e-6 * (double)b.levels;
    mine[KV] = 1e-6 * (double)kv_bytes(rig) * (rig->shard.kv_end - rig->shard.kv_begin) /
               rig->config.n_kv_heads;
    mine[EMBED] = 1e-6 * (double)b.embed;
    TRY_MPI(MPI_Allreduce(mine, all, N, MPI_DOUBLE, MPI_SUM, rig->env->world));
    double other = all[RESIDENT] - all[PLANES] - all[LEVELS] - all[KV] - all[EMBED];
    TRY(report_add(root, "memory",
                   json_pack("{s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "threads",
                             rig->n_threads, "ranks", rig->env->size, "resident_mb", all[RESIDENT],
                             "highest_mb", all[HIGHEST], "planes_mb", all[PLANES], "levels_mb",
                             all[LEVELS], "kv_mb", all[KV], "embed_mb", all[EMBED], "other_mb",
                             other)));
    return env_agree(rig->env, bandwidth_open(&rig->bw, rig->env, rig->n_threads, rig->local_rank,
                                              rig->n_local, rig->probe_bytes));
}

enum status rig_probe(struct rig *rig, double *gb_s)
{
    return bandwidth_measure(&rig->bw, PROBE_PASSES, gb_s);
}

/* ---- steps ---- */

enum status rig_fill(struct rig *rig, int32_t n_tok)
{
    for (int32_t s = 0; s < rig->n_slots; s++) {
        TRY(decoder_fill_slot(rig->dec, s, n_tok));
    }
    return ST_OK;
}

enum status rig_step(struct rig *rig, int bits, double temperature, int32_t *tokens,
                     double *seconds, struct pass_record *pass)
{
    struct decode_token in[MOST_SLOTS];
    struct token_result out[MOST_SLOTS];
    int32_t n = rig->n_slots;
    INVARIANT(n >= 1 && n <= MOST_SLOTS);
    double start = clock_s();
    for (int32_t i = 0; i < n; i++) {
        in[i] = (struct decode_token){.slot = i,
                                      .id = tokens[i],
                                      .level = rig->level[bits],
                                      .want = {.target = -1, .temperature = (float)temperature}};
        uint32_t at = (uint32_t)decoder_n_filled(rig->dec, i);
        sampler_key(in[i].want.key, SEED, (uint64_t)i, 0, at);
    }
    TRY(decoder_step(rig->dec, in, n, out, pass));
    *seconds = clock_s() - start;
    for (int32_t i = 0; i < n; i++) {
        tokens[i] = out[i].token;
    }
    return ST_OK;
}
