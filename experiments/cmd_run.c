/* pmpd run: the main job. Prompts in; a journal, run.h5 and answers.jsonl out.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/tokenizer.h"
#include "dist/stop.h"
#include "experiments/cmd.h"
#include "experiments/engine.h"
#include "experiments/replay.h"
#include "experiments/replica.h"
#include "experiments/run_owner.h"
#include "experiments/run_report.h"
#include "sched/registry.h"

static const char usage[] =
    "usage: [mpirun -n N] pmpd run FILE.cfg [--set key=value]... [--json] [--retry-failed]\n"
    "       [mpirun -n N] pmpd run --replay RUN.h5 [--set key=value]... [--json]\n"
    "Decodes every prompt of prompts.path under a precision policy and writes into output.dir:\n"
    "  journal.bin      every finished prompt, durable at once; the same command again resumes\n"
    "  run.h5           provenance, prompts, steps, passes, plans, metrics (HDF5)\n"
    "  answers.jsonl    the answers' text, one line per prompt\n"
    "N ranks are N / parallel.tensor_ranks replicas; each holds the model once. With service.rank\n"
    "= own rank 0 decodes nothing and the others do: start one rank more.\n"
    "  --set key=value  overrides a setting; pmpd help-config lists all keys\n"
    "  --json           print the closing table as JSON\n"
    "  --replay RUN.h5  repeat a recorded run: its settings (paths in them start at the working\n"
    "                   directory), model, prompts and plans, on any ranks; every rank reads the\n"
    "                   file. It decodes anew into \"replay\" in the folder of RUN.h5 (or\n"
    "                   output.dir), compares tokens, levels, log-probabilities, entropies and\n"
    "                   margins with the recorded ones, and says whether and why they differ.\n"
    "                   Exit code 0: equal (where another arithmetic rounds in another way:\n"
    "                   tokens and levels are); 1: they differ\n"
    "  --retry-failed   forget earlier failures: prompts that ended two starts are tried again,\n"
    "                   and so is a run that died silently run.max_deaths times in a row. For\n"
    "                   when the cause is mended, or was none of theirs\n"
    "SIGTERM, SIGINT, SIGUSR1 (mpirun hands on only the last) and run.deadline_s stop it: what is\n"
    "finished is kept. The same signal again ends it at once. A prompt at which two starts end is\n"
    "recorded as failed and left out.\n"
    "Exit codes: 0 done; 1 error; 2 wrong use; 69 a rank died and 75 stopped: the same command\n"
    "resumes.\n"
    "Examples:\n"
    "  pmpd run configs/tiny.cfg\n"
    "  mpirun -n 4 pmpd run configs/tiny.cfg --set parallel.tensor_ranks=2 --set "
    "policy.name=static\n"
    "  pmpd run --replay results/run/run.h5 --set backend.name=cpu_ref\n";

/* Everything of one run on one rank. */
struct run {
    struct env *env;
    struct settings settings;
    bool json, retry;
    struct engine e;
    struct tokenizer *tok;
    struct prompts prompts;
    struct policy policy;
    struct session_options options;
    size_t max_record_bytes;
    struct session *session;
    struct lease_client *client;    /* first rank of a replica ... */
    struct service_client *service; /* ... where the policy is asked at the service */
    struct planner_remote remote;
    struct run_owner owner; /* rank 0 ... */
    struct replay *replay;  /* ... NULL without --replay */
    bool is_told;           /* ... whose journal has been told how this start failed */
};

/* ---- settings ---- */

static enum status parse_command(struct run *r, int argc, char **argv, char **text)
{
    const char *path = NULL, *replay = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--set") == 0 && i + 1 < argc) {
            i++;
        } else if (strcmp(argv[i], "--replay") == 0 && i + 1 < argc) {
            replay = argv[++i];
        } else if (strcmp(argv[i], "--json") == 0) {
            r->json = true;
        } else if (strcmp(argv[i], "--retry-failed") == 0) {
            r->retry = true;
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
    if (replay && path) {
        FAIL(ST_USER, "--replay takes the settings of %s; a FILE.cfg (\"%s\") is not given, too",
             replay, path);
    }
    if (replay && r->env->rank == 0) {
        TRY(replay_open(&r->replay, replay));
        return replay_configuration(r->replay, text);
    }
    if (!path && !replay) {
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
        if (argv[i][0] != '-' && strcmp(argv[i - 1], "--set") != 0) { // --replay's value, too
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
    if (r->replay) {
        TRY_GOTO(st, replay_check_settings(r->replay, &r->settings), done);
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
    TRY(prompts_read(&r->prompts, s->prompts.path, s->prompts.split, s->prompts.limit));
    if (r->env->rank == 0) {
        TRY(checkpoint_digest(r->e.source.ckpt, s->model.path, r->owner.digest));
        r->e.levels.model_digest = r->owner.digest;
    }
    if (r->replay) {
        TRY(replay_check_digests(r->replay, r->owner.digest, r->prompts.digest));
    }
    TRY(tokenizer_open(&r->tok, s->model.path, r->e.source.config.vocab));
    TRY(prompts_encode(&r->prompts, r->tok, r->e.context, s->decode.max_new_tokens));
    if (r->replay) {
        TRY(replay_check_prompts(r->replay, &r->prompts));
    }
    TRY(registry_open_policy(&r->policy, s, &r->e.levels));
    r->e.policy_adds_tokens = r->policy.ops->adds_tokens;
    r->e.policy_signals =
        r->policy.ops->needs | (s->output.signals ? SIGNAL_HIDDEN | SIGNAL_KV_NORMS : 0);
    return ST_OK;
}

static enum status on_finished(void *ctx, const struct finished_record *record)
{
    struct run *r = ctx;
    return r->client ? lease_client_finish(r->client, record) : ST_OK;
}

static enum status set_options(struct run *r)
{
    const struct settings *s = &r->settings;
    r->options = (struct session_options){.n_slots = s->decode.slots,
                                          .prefill_chunk = s->decode.prefill_chunk,
                                          .max_tok = r->e.context,
                                          .max_turns = 1,
                                          .max_new_tokens = s->decode.max_new_tokens,
                                          .stop_at_eos = s->decode.stop_at_eos,
                                          .temperature = (float)s->decode.temperature,
                                          .seed = (uint64_t)s->decode.seed,
                                          .by_level = strcmp(s->decode.cohort, "level") == 0,
                                          .lag = s->service.lag,
                                          .replica = r->env->replica,
                                          .kv_features = s->output.kv_features,
                                          .signals = s->output.signals,
                                          .on_finished = on_finished,
                                          .ctx = r};
    for (int32_t i = 0; i < r->prompts.n; i++) {
        int32_t n = r->prompts.prompt[i].n_turns;
        r->options.max_turns = n > r->options.max_turns ? n : r->options.max_turns;
    }
    return session_max_record_bytes(&r->max_record_bytes, &r->options, r->e.source.config.head_dim);
}

static void on_fault(void *ctx, const struct lifeline_fault *f)
{
    struct run *r = ctx;
    run_owner_take_fault(&r->owner, f);
}

static int32_t suspects(void *ctx, int64_t *ordinals, int32_t capacity)
{
    const struct run *r = ctx;
    return r->session ? session_suspects(r->session, ordinals, capacity) : 0;
}

/* Where no rank decodes: all ranks stop when one was asked to. */
static enum status agree_to_stop(struct run *r)
{
    enum { SIGNALS = 128 };
    int signal = stop_asked(), mine = signal ? r->env->rank * SIGNALS + signal : INT_MAX, first = 0;
    TRY_MPI(MPI_Allreduce(&mine, &first, 1, MPI_INT, MPI_MIN, r->env->world));
    if (first == INT_MAX) {
        return ST_OK;
    }
    stop_ask(first % SIGNALS, first / SIGNALS);
    FAIL(ST_STOPPED, "stopped by %s", stop_reason());
}

/* The journal comes before the weights: what is broken is found before minutes are spent, and a
 * start that dies while it loads has been counted. */
static enum status open_run(struct run *r, int64_t *n_left, bool *needs_costs)
{
    const struct settings *s = &r->settings;
    TRY(engine_open(&r->e, r->env, s));
    enum status st = read_inputs(r);
    if (st == ST_OK) {
        st = set_options(r);
    }
    TRY(env_agree(r->env, st));
    if (r->env->rank == 0) {
        st = run_owner_open(&r->owner, &r->e, s, &r->prompts, &r->policy, r->replay, r->retry);
    }
    TRY(env_agree(r->env, st));
    int64_t news[] = {r->owner.n_left, r->owner.resume.n_epochs,
                      r->owner.has_budget && !r->owner.has_costs};
    TRY_MPI(MPI_Bcast(news, 3, MPI_INT64_T, 0, r->env->world));
    *n_left = news[0];
    *needs_costs = news[2] != 0;
    r->options.epoch = (int32_t)news[1];
    return lifeline_open(r->env, on_fault, suspects, r);
}

static enum status measure_costs(struct run *r)
{
    struct cost_table costs;
    enum status st = ST_OK;
    TRY(cost_table_measure(&costs, &r->e, &r->settings));
    if (r->env->rank == 0) {
        st = run_owner_set_costs(&r->owner, &costs, &r->e, &r->settings, &r->prompts, &r->policy);
    }
    return env_agree(r->env, st);
}

/* What a request of the policy may hold. */
static enum status size_requests(const struct run *r, struct service_options *o)
{
    const struct model_config *c = &r->e.source.config;
    uint32_t needs = r->policy.ops->needs;
    size_t heads = needs & SIGNAL_KV_HEADS      ? (size_t)c->n_kv_heads
                   : needs & SIGNAL_KV_FEATURES ? 1
                                                : 0;
    TRY(mem_mul(&o->max_feature_floats, 2 * heads * (size_t)c->head_dim, (size_t)r->e.context));
    if (needs & SIGNAL_ACTIVATION) {
        o->n_activation_floats = 2 * (size_t)c->n_layers * M_N_ROLES;
    }
    for (int32_t i = 0; i < r->prompts.n; i++) {
        const struct prompt *p = &r->prompts.prompt[i];
        size_t n = (p->task ? strlen(p->task) : 0) + (p->id ? strlen(p->id) : 0);
        o->max_text_bytes = n > o->max_text_bytes ? n : o->max_text_bytes;
    }
    return ST_OK;
}

/* Where the policy's requests are gathered: the service on rank 0, a client in each replica. */
static enum status open_service(struct run *r)
{
    const struct settings *s = &r->settings;
    struct service_options o = {.n_clients = r->env->n_replicas,
                                .n_slots = s->decode.slots,
                                .n_levels = r->e.levels.n,
                                .max_new_tokens = s->decode.max_new_tokens,
                                .lag = s->service.lag,
                                .timeout_s = s->parallel.timeout_s};
    if (!r->policy.ops->answer) {
        return ST_OK;
    }
    TRY(size_requests(r, &o));
    if (r->env->rank == 0) {
        TRY(service_create(&r->owner.service, r->env, &r->policy, &o));
    }
    if (r->env->replica >= 0 && r->env->tensor_rank == 0) {
        TRY(service_client_create(&r->service, r->env, r->owner.service, r->env->replica, &o,
                                  r->policy.ops->state_bytes));
        r->remote = service_client_remote(r->service);
        r->options.remote = &r->remote;
    }
    return ST_OK;
}

static enum status load(struct run *r, bool needs_costs)
{
    const struct settings *s = &r->settings;
    bool decodes = r->env->replica >= 0;
    TRY(engine_load(&r->e, s, r->policy.ops->adds_tokens));
    if (needs_costs) {
        TRY(measure_costs(r));
    }
    enum status st = open_service(r);
    if (st == ST_OK && decodes) {
        st = session_create(&r->session, r->e.dec, &r->e.coll, &r->policy, &r->e.levels,
                            &r->e.source.config, &r->options);
    }
    if (st == ST_OK && r->env->rank == 0) {
        st = run_owner_lease(&r->owner, r->env, s, &r->prompts, r->max_record_bytes);
    }
    if (st == ST_OK && decodes && r->env->tensor_rank == 0) {
        st = lease_client_create(&r->client, r->env, r->owner.leases, r->max_record_bytes,
                                 s->parallel.timeout_s);
    }
    return env_agree(r->env, st);
}

/* ---- the run ---- */

/* Decodes what is left. ST_STOPPED: not all of it. */
static enum status decode(struct run *r)
{
    struct lease_owner *leases = r->owner.leases;
    enum status st = ST_OK;
    if (r->env->replica >= 0) {
        st = replica_run(&r->e, r->session, &r->prompts, r->settings.decode.slots, leases,
                         r->client, r->service);
    }
    if (st == ST_OK && leases) {
        st = lease_owner_serve(leases);
    }
    r->is_told = st != ST_OK;
    TRY(engine_loop_end(r->env, st));
    if (leases) {
        const char *why = lease_owner_stopping(leases);
        (why ? progress_drop : progress_end)(&r->owner.progress);
        if (why) {
            st = status_raise(ST_STOPPED, __FILE__, __LINE__, __func__, "stopped by %s", why);
        }
    }
    return env_agree(r->env, st);
}

static enum status run(struct run *r)
{
    int64_t n_left = 0;
    bool needs_costs = false;
    TRY(open_run(r, &n_left, &needs_costs));
    if (n_left > 0) {
        TRY(agree_to_stop(r));
        TRY(load(r, needs_costs));
        TRY(agree_to_stop(r));
        TRY(decode(r));
    }
    enum status st = ST_OK;
    if (r->env->rank == 0) {
        st = run_report_write(&r->owner, &r->e, &r->settings, &r->prompts, r->tok, r->replay,
                              r->json);
    }
    return env_agree(r->env, st);
}

/* Rank 0: the journal's last word about this start. */
static enum status end_owner(struct run *r, enum status st)
{
    struct run_owner *o = &r->owner;
    char why[256];
    snprintf(why, sizeof why, "%s", status_message());
    if (st == ST_OK || st == ST_DIFFERS) {
        TRY(run_owner_end(o, JOURNAL_DONE, ""));
        return st;
    }
    if (st == ST_STOPPED) {
        TRY(run_owner_end(o, JOURNAL_STOPPED, why));
        FAIL(st, "%s: %lld of %d prompts are done; the same command resumes", why,
             (long long)(o->resume.n_finished + o->n_done), r->prompts.n);
    }
    if (!r->is_told && run_owner_end(o, JOURNAL_ERROR, why) != ST_OK) {
        FAIL(st, "%s", why); // the second error hides nothing
    }
    return st;
}

static void close_run(struct run *r)
{
    lifeline_close();
    lease_client_destroy(&r->client);
    service_client_destroy(&r->service);
    run_owner_close(&r->owner);
    replay_close(&r->replay);
    session_destroy(&r->session);
    policy_close(&r->policy);
    prompts_free(&r->prompts);
    tokenizer_close(&r->tok);
    engine_close(&r->e);
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
    stop_install(env->rank);
    enum status st = read_settings(r, argc, argv);
    if (st == ST_OK) {
        set_log_level(&r->settings);
        st = run(r);
        enum status own = env->rank == 0 ? end_owner(r, st) : ST_OK;
        st = st == ST_OK || st == ST_STOPPED ? env_agree(env, own) : st;
    }
    close_run(r);
    mem_free(r);
    return st;
}
