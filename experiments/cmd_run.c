/* pmpd run: the main job. Prompts in; a journal, run.h5 and answers.jsonl out.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/replace.h"
#include "core/runfile.h"
#include "core/tokenizer.h"
#include "experiments/cmd.h"
#include "experiments/engine.h"
#include "experiments/provenance.h"
#include "experiments/replica.h"
#include "experiments/resume.h"
#include "sched/registry.h"

static const char usage[] =
    "usage: [mpirun -n N] pmpd run FILE.cfg [--set key=value]... [--json]\n"
    "Decodes every prompt of prompts.path under a precision policy and writes into output.dir:\n"
    "  journal.bin      every finished prompt, durable at once; the same command again resumes\n"
    "  run.h5           provenance, prompts, steps, passes, plans, metrics (HDF5)\n"
    "  answers.jsonl    the answers' text, one line per prompt\n"
    "N ranks are N / parallel.tensor_ranks replicas; each holds the model once.\n"
    "  --set key=value  overrides a setting; pmpd help-config lists all keys\n"
    "  --json           print the closing table as JSON\n"
    "Examples:\n"
    "  pmpd run configs/tiny.cfg\n"
    "  mpirun -n 4 pmpd run configs/tiny.cfg --set parallel.tensor_ranks=2 --set "
    "policy.name=static\n";

static const char RUN_FILE[] = "run.h5", ANSWERS_FILE[] = "answers.jsonl";
enum { RESULT_PATH_BYTES = SETTINGS_PATH_BYTES + 32 };

/* Everything of one run on one rank. */
struct run {
    struct env *env;
    struct settings settings;
    bool json;
    struct engine e;
    struct tokenizer *tok;
    struct prompts prompts;
    struct policy policy;
    int32_t max_turns;
    size_t max_record_bytes;
    struct session_options options;
    struct session *session;
    struct lease_client *client; /* first rank of a replica */
    /* rank 0: */
    char digest[DIGEST_TEXT];
    struct journal *journal;
    struct resume_state resume;
    struct lease_owner *owner;
    struct progress progress;
};

/* ---- settings ---- */

static enum status parse_command(struct run *r, int argc, char **argv, char **text)
{
    const char *path = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--set") == 0 && i + 1 < argc) {
            i++;
        } else if (strcmp(argv[i], "--json") == 0) {
            r->json = true;
        } else if (argv[i][0] == '-') {
            FAIL(ST_USER,
                 "run does not know \"%s\" (or it needs a value); pmpd run --help explains",
                 argv[i]);
        } else if (path) {
            FAIL(ST_USER, "run takes one FILE.cfg, found \"%s\" and \"%s\"", path, argv[i]);
        } else {
            path = argv[i];
        }
    }
    if (!path) {
        FAIL(ST_USER, "run needs a FILE.cfg; pmpd help-config prints one with every key");
    }
    return r->env->rank == 0 ? settings_read_file(text, path) : ST_OK;
}

/* Rank 0 reads; all parse the same text. */
static enum status read_settings(struct run *r, int argc, char **argv)
{
    char *text = NULL;
    const char *path = "the configuration";
    enum status st = env_agree(r->env, parse_command(r, argc, argv, &text));
    if (st != ST_OK) {
        mem_free(text);
        return st;
    }
    TRY_GOTO(st, env_broadcast_text(r->env, &text), done);
    settings_default(&r->settings);
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] != '-' && strcmp(argv[i - 1], "--set") != 0) {
            path = argv[i];
        }
    }
    TRY_GOTO(st, settings_parse(&r->settings, text, path), done);
    for (int i = 1; i + 1 < argc; i++) {
        if (strcmp(argv[i], "--set") == 0) {
            TRY_GOTO(st, settings_set(&r->settings, argv[i + 1]), done);
            i++;
        }
    }
done:
    mem_free(text);
    return env_agree(r->env, st);
}

static void set_log_level(const struct settings *s)
{
    static const char *const words[] = {"error", "warn", "info", "debug"};
    for (int i = 0; i < 4; i++) {
        if (strcmp(s->log.level, words[i]) == 0) {
            log_set_level((enum log_level)i);
        }
    }
}

/* ---- before the loop ---- */

static enum status read_inputs(struct run *r)
{
    const struct settings *s = &r->settings;
    if (s->prompts.path[0] == '\0') {
        FAIL(ST_USER, "prompts.path is empty; expected a JSONL file of prompts");
    }
    TRY(tokenizer_open(&r->tok, s->model.path, r->e.source.config.vocab));
    TRY(prompts_read(&r->prompts, s->prompts.path, s->prompts.split, s->prompts.limit));
    TRY(prompts_encode(&r->prompts, r->tok, r->e.context, s->decode.max_new_tokens));
    for (int32_t i = 0; i < r->prompts.n; i++) {
        int32_t n = r->prompts.prompt[i].n_turns;
        r->max_turns = n > r->max_turns ? n : r->max_turns;
    }
    return registry_open_policy(&r->policy, s, &r->e.levels);
}

static void result_path(char path[RESULT_PATH_BYTES], const struct run *r, const char *name)
{
    snprintf(path, RESULT_PATH_BYTES, "%s/%s", r->settings.output.dir, name);
}

/* What starts that died while they wrote results have left; the journal's lock says that nobody
 * else is writing now. */
static void sweep_results(const struct run *r)
{
    char path[RESULT_PATH_BYTES];
    result_path(path, r, RUN_FILE);
    replace_sweep(path);
    result_path(path, r, ANSWERS_FILE);
    replace_sweep(path);
}

/* Rank 0: the journal, what it says is done, and what is left. */
static enum status open_owner(struct run *r, lease_done_fn *done)
{
    const struct settings *s = &r->settings;
    struct lease_item *items = NULL;
    int64_t n = 0;
    enum status st = ST_OK;
    TRY(checkpoint_digest(r->e.source.ckpt, s->model.path, r->digest));
    TRY(resume_create(&r->resume, r->prompts.n, false));
    for (int32_t i = 0; i < r->prompts.n; i++) {
        resume_key(r->resume.prompts[i].key, &r->prompts.prompt[i], i, r->digest, s, &r->e,
                   r->policy.ops->adds_tokens);
    }
    TRY(journal_open(&r->journal, s->output.dir, resume_visit, &r->resume));
    TRY(journal_reserve(r->journal, r->max_record_bytes));
    sweep_results(r);
    if (r->resume.n_other > 0) {
        log_warn(
            "%s holds %lld finished prompts of other settings; they are kept in the journal and "
            "not used here",
            s->output.dir, (long long)r->resume.n_other);
    }
    TRY(MEM_NEW(&items, r->prompts.n));
    for (int32_t i = 0; i < r->prompts.n; i++) {
        const struct resume_prompt *p = &r->resume.prompts[i];
        if (!p->finished && !p->failed) {
            struct lease_item *item = &items[n++];
            *item = (struct lease_item){.ordinal = i, .attempt = p->attempts + 1};
            memcpy(item->key, p->key, sizeof item->key);
            for (int32_t t = 0; t < r->prompts.prompt[i].n_turns; t++) {
                item->cost += r->prompts.prompt[i].n_ids[t] + s->decode.max_new_tokens;
            }
        }
    }
    if (r->resume.n_epochs > 0) {
        log_info("resuming: %lld of %d prompts are done, %lld left",
                 (long long)r->resume.n_finished, r->prompts.n, (long long)n);
    }
    char run[JOURNAL_SMALL_BYTES];
    struct journal_run start = {.epoch = r->resume.n_epochs, .unix_s = (double)time(NULL)};
    size_t bytes = journal_pack_run(run, &start);
    TRY_GOTO(st, journal_append(r->journal, JOURNAL_RUN, run, bytes, true), done);
    TRY_GOTO(st,
             lease_owner_create(&r->owner, r->env, r->journal, items, n, r->resume.n_epochs,
                                r->max_record_bytes, done, r),
             done);
    progress_begin(&r->progress, "prompts", "prompts", (double)n);
done:
    mem_free(items);
    return st;
}

static void on_done(void *ctx, int64_t n_done, int64_t n_total)
{
    struct run *r = ctx;
    (void)n_total;
    progress_update(&r->progress, (double)n_done);
}

static enum status on_finished(void *ctx, const struct finished_record *record)
{
    struct run *r = ctx;
    return r->client ? lease_client_finish(r->client, record) : ST_OK;
}

static enum status prepare(struct run *r)
{
    const struct settings *s = &r->settings;
    TRY(engine_open(&r->e, r->env, s));
    TRY(env_agree(r->env, read_inputs(r)));
    TRY(engine_load(&r->e, s, r->policy.ops->adds_tokens));
    r->options = (struct session_options){.n_slots = s->decode.slots,
                                          .prefill_chunk = s->decode.prefill_chunk,
                                          .max_tok = r->e.context,
                                          .max_turns = r->max_turns,
                                          .max_new_tokens = s->decode.max_new_tokens,
                                          .stop_at_eos = s->decode.stop_at_eos,
                                          .temperature = (float)s->decode.temperature,
                                          .seed = (uint64_t)s->decode.seed,
                                          .replica = r->env->replica,
                                          .kv_features = s->output.kv_features,
                                          .on_finished = on_finished,
                                          .ctx = r};
    enum status st =
        session_max_record_bytes(&r->max_record_bytes, &r->options, r->e.source.config.head_dim);
    if (st == ST_OK && r->env->rank == 0) {
        st = open_owner(r, on_done);
    }
    TRY(env_agree(r->env, st));
    int epoch = r->resume.n_epochs;
    TRY_MPI(MPI_Bcast(&epoch, 1, MPI_INT, 0, r->env->world));
    r->options.epoch = epoch;
    st = session_create(&r->session, r->e.dec, &r->e.coll, &r->policy, &r->e.levels,
                        &r->e.source.config, &r->options);
    if (st == ST_OK && r->env->tensor_rank == 0) {
        st = lease_client_create(&r->client, r->env, r->owner, r->max_record_bytes,
                                 s->parallel.timeout_s);
    }
    return env_agree(r->env, st);
}

/* ---- after the loop: rank 0 writes the run file from the journal ---- */

static void print_table(const struct run *r, const struct run_metrics *m, const char *path)
{
    if (r->json) {
        json_t *j =
            json_pack("{s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:s}", "prompts",
                      (json_int_t)m->n_prompts, "finished", (json_int_t)m->n_finished, "failed",
                      (json_int_t)m->n_failed, "new_tokens", (json_int_t)m->n_new_tok, "steps",
                      (json_int_t)m->n_steps, "average_decode_bits", m->avg_decode_bits,
                      "average_prefill_bits", m->avg_prefill_bits, "decode_tokens_per_s",
                      m->decode_tok_s, "bytes_per_token", m->bytes_per_token, "mean_logprob",
                      m->mean_logprob, "run_file", path);
        json_dumpf(j, stdout, JSON_REAL_PRECISION(9));
        json_decref(j);
        printf("\n");
        return;
    }
    printf("prompts finished     %lld of %lld%s\n", (long long)m->n_finished,
           (long long)m->n_prompts, m->n_failed ? " (some failed: see /failed in run.h5)" : "");
    printf("tokens               %lld prompt, %lld new, %lld decode steps\n",
           (long long)m->n_prompt_tok, (long long)m->n_new_tok, (long long)m->n_steps);
    printf("average decode bits  %.3f (first step included)\n", m->avg_decode_bits);
    printf("prefill bits         %.3f\n", m->avg_prefill_bits);
    printf("decode tokens/s      %.1f\n", m->decode_tok_s);
    printf("bytes per token      %.0f\n", m->bytes_per_token);
    printf("mean log-probability %.4f nats\n", m->mean_logprob);
    printf("run file             %s\n", path);
}

static enum status gather_contents(struct run *r, struct resume_state *kept,
                                   struct finished_record *finished, struct failed_prompt *failed,
                                   struct run_contents *out)
{
    for (int64_t i = 0; i < kept->n; i++) {
        memcpy(kept->prompts[i].key, r->resume.prompts[i].key, sizeof kept->prompts[i].key);
    }
    TRY(journal_read(r->settings.output.dir, resume_visit, kept, NULL));
    for (int64_t i = 0; i < kept->n; i++) {
        if (kept->prompts[i].finished) {
            finished[out->n_finished++] = kept->prompts[i].record;
        } else if (kept->prompts[i].failed) {
            failed[out->n_failed++] = kept->prompts[i].failure;
        }
    }
    return ST_OK;
}

static enum status write_results(struct run *r)
{
    char path[RESULT_PATH_BYTES], answers[RESULT_PATH_BYTES];
    struct resume_state kept = {0};
    struct finished_record *finished = NULL;
    struct failed_prompt *failed = NULL;
    struct provenance *facts = NULL;
    char *config = NULL;
    enum status st = ST_OK;
    struct run_contents c = {.prompts = &r->prompts, .levels = &r->e.levels, .tokenizer = r->tok};
    result_path(path, r, RUN_FILE);
    result_path(answers, r, ANSWERS_FILE);
    TRY_GOTO(st, resume_create(&kept, r->prompts.n, true), done);
    TRY_GOTO(st, MEM_NEW(&finished, r->prompts.n), done);
    TRY_GOTO(st, MEM_NEW(&failed, r->prompts.n), done);
    TRY_GOTO(st, mem_alloc_array((void **)&facts, 1, sizeof *facts), done);
    TRY_GOTO(st, gather_contents(r, &kept, finished, failed, &c), done);
    TRY_GOTO(st, settings_print(&config, &r->settings, false), done);
    provenance_fill(facts, &r->e, &r->settings, &r->prompts, r->digest, kept.n_epochs);
    c.model_id = r->settings.run.name[0] ? r->settings.run.name : r->settings.model.path;
    c.finished = finished;
    c.failed = failed;
    c.facts = facts->fact;
    c.n_facts = facts->n;
    c.config_text = config;
    TRY_GOTO(st, runfile_write(path, &c), done);
    TRY_GOTO(st, answers_write(answers, &c), done);
    struct run_metrics m;
    run_metrics_compute(&m, &c);
    print_table(r, &m, path);
done:
    mem_free(config);
    mem_free(facts);
    mem_free(failed);
    mem_free(finished);
    resume_free(&kept);
    return st;
}

static void close_run(struct run *r)
{
    lease_client_destroy(&r->client);
    lease_owner_destroy(&r->owner);
    journal_close(&r->journal);
    resume_free(&r->resume);
    session_destroy(&r->session);
    policy_close(&r->policy);
    prompts_free(&r->prompts);
    tokenizer_close(&r->tok);
    engine_close(&r->e);
}

static enum status run(struct run *r)
{
    TRY(prepare(r));
    enum status st =
        replica_run(&r->e, r->session, &r->prompts, r->settings.decode.slots, r->owner, r->client);
    if (st == ST_OK && r->owner) {
        st = lease_owner_serve(r->owner);
    }
    TRY(engine_loop_end(r->env, st));
    if (r->env->rank == 0) {
        progress_end(&r->progress);
        st = write_results(r);
    }
    return env_agree(r->env, st);
}

enum status cmd_run(struct env *env, int argc, char **argv)
{
    struct run *r = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(env->rank == 0 ? usage : "", stdout);
            return ST_OK;
        }
    }
    TRY(mem_alloc_array((void **)&r, 1, sizeof *r));
    r->env = env;
    enum status st = read_settings(r, argc, argv);
    if (st == ST_OK) {
        set_log_level(&r->settings);
        st = run(r);
    }
    close_run(r);
    mem_free(r);
    return st;
}
