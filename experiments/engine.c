/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/engine.h"

#include <omp.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "dist/lifeline.h"
#include "dist/shard.h"
#include "kernels/kernels.h"

static enum status open_model(struct engine *e, const struct settings *s)
{
    if (s->model.path[0] == '\0') {
        FAIL(ST_USER, "model.path is empty; expected the folder of a model");
    }
    TRY(model_source_open(&e->source, s->model.path));
    const struct model_config *c = &e->source.config;
    level_table_init(&e->levels, c, e->source.held, e->source.head_held, e->source.dense_bits,
                     e->source.head_dense_bits);
    struct shard_options so = {.size = s->parallel.tensor_ranks,
                               .reproducible = s->parallel.reproducible,
                               .segments = s->parallel.segments};
    TRY(shard_model(&e->shard, c, c->nested ? c->group_cols : 1, &so, e->env->tensor_rank));
    e->context = s->decode.context ? s->decode.context : c->context;
    if (e->context > c->context) {
        FAIL(ST_USER, "decode.context = %d, but %s has a context of %d tokens", e->context,
             s->model.path, c->context);
    }
    return ST_OK;
}

static enum status open_backend(struct engine *e, const struct settings *s, int n_threads,
                                int local_rank)
{
    struct backend_options bo = {
        .n_threads = n_threads, .device = local_rank, .isa = s->backend.isa};
    kernels_register_all();
    if (e->env->replica < 0) {
        return ST_OK;
    }
    TRY(backend_open(&e->be, s->backend.name, &bo));
    snprintf(e->backend, sizeof e->backend, "%s", e->be.ops->name);
    snprintf(e->arithmetic, sizeof e->arithmetic, "%s", e->be.ops->arithmetic(&e->be));
    if (strcmp(s->kv.format, "auto") == 0) {
        e->kv_dtype = backend_is_host(&e->be) && !e->source.config.nested ? DT_F32 : DT_F16;
    } else {
        e->kv_dtype = strcmp(s->kv.format, "f32") == 0 ? DT_F32 : DT_F16;
    }
    return ST_OK;
}

/* The ranks that decode must compute in one way; a service learns from the first of them how. */
static enum status agree_arithmetic(struct engine *e)
{
    struct {
        char backend[sizeof e->backend], arithmetic[sizeof e->arithmetic];
        int32_t kv_dtype;
    } first = {.kv_dtype = (int32_t)e->kv_dtype};
    struct env *env = e->env;
    memcpy(first.backend, e->backend, sizeof first.backend);
    memcpy(first.arithmetic, e->arithmetic, sizeof first.arithmetic);
    TRY_MPI(MPI_Bcast(&first, (int)sizeof first, MPI_BYTE, env->n_service, env->world));
    if (env->replica < 0) {
        memcpy(e->backend, first.backend, sizeof e->backend);
        memcpy(e->arithmetic, first.arithmetic, sizeof e->arithmetic);
        e->kv_dtype = (enum dtype)first.kv_dtype;
    }
    char text[sizeof e->backend + sizeof e->arithmetic + 1];
    snprintf(text, sizeof text, "%s %s", e->backend, e->arithmetic);
    TRY(env_agree_text(
        env, "the arithmetic", text,
        "a prompt's answer would depend on who decodes it; use nodes of one kind, or set "
        "backend.isa to what all of them have"));
    return env_agree_distinct(env, "the GPU", e->be.ops ? e->be.ops->device(&e->be) : "",
                              "start one rank per GPU (mpirun --map-by ppr:N:node, or srun "
                              "--ntasks-per-node=N --gpus-per-task=1)");
}

enum status engine_open(struct engine *e, struct env *env, const struct settings *settings)
{
    int n_threads = 0, local_rank = 0;
    *e = (struct engine){.env = env};
    env->n_service = strcmp(settings->service.rank, "own") == 0;
    TRY(env_grid(env, settings->parallel.tensor_ranks));
    TRY(env_default_threads(env, &n_threads));
    n_threads = settings->backend.threads ? settings->backend.threads
                : n_threads               ? n_threads
                                          : omp_get_max_threads();
    TRY(env_local_rank(env, &local_rank));
    enum status st = open_model(e, settings);
    st = st ? st : open_backend(e, settings, n_threads, local_rank);
    TRY(env_agree(env, st));
    bool decodes = env->replica >= 0;
    TRY(env_check_threads(env, !decodes ? 0 : backend_is_host(&e->be) ? n_threads : 1));
    TRY(agree_arithmetic(e));
    size_t hint =
        (size_t)settings->decode.prefill_chunk * (size_t)e->source.config.hidden * sizeof(float);
    return env_agree(env, coll_mpi_open(&e->coll, env, settings->parallel.timeout_s, hint));
}

/* Planes that some level of the run reads; 0: all (a dense model has none). */
static int planes_needed(const struct level_table *levels)
{
    int most = 0;
    for (int i = 0; i < levels->n; i++) {
        int b = levels->level[i].max_bits;
        most = levels->held && b > most ? b : most;
    }
    return most;
}

enum status engine_load(struct engine *e, const struct settings *settings, bool policy_adds_tokens)
{
    bool decodes = e->env->replica >= 0;
    enum status st = ST_OK;
    if (decodes) {
        st = weights_load(&e->weights, &e->be, &e->source, &e->shard, planes_needed(&e->levels));
    }
    if (st == ST_OK && decodes) {
        struct decoder_options o = {.n_slots = settings->decode.slots,
                                    .max_tok = e->context,
                                    .prefill_chunk = settings->decode.prefill_chunk,
                                    .kv_dtype = e->kv_dtype,
                                    .adds_tokens = policy_adds_tokens,
                                    .signals = e->policy_signals,
                                    .filter = {.top_k = settings->decode.top_k,
                                               .top_p = settings->decode.top_p,
                                               .min_p = settings->decode.min_p}};
        st = decoder_create(&e->dec, &e->be, &e->coll, &e->weights, &e->levels, &o);
    }
    return env_agree(e->env, st);
}

void engine_close(struct engine *e)
{
    decoder_destroy(&e->dec);
    weights_free(&e->weights);
    level_table_release(&e->levels);
    model_source_close(&e->source);
    collective_close(&e->coll);
    backend_close(&e->be);
}

/* Errors of files, memory and network come to any prompt. */
static bool is_prompts_doing(enum status st)
{
    return st != ST_IO && st != ST_NOMEM && st != ST_MPI && st != ST_NCCL && st != ST_TIMEOUT &&
           st != ST_STOPPED;
}

enum status engine_loop_end(struct env *env, enum status st)
{
    if (st == ST_OK) {
        return st;
    }
    if (env->size > 1) {
        log_error("%s\n%s", status_message(), status_traceback());
    }
    lifeline_report(status_message(), is_prompts_doing(st));
    if (env->size > 1) {
        env_abort(1);
    }
    return st;
}
