/* pmpd train: a learned scheduler from a dataset, on any number of ranks.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/cmd.h"
#include "experiments/provenance.h"
#include "experiments/train_job.h"
#include "experiments/train_report.h"
#include "sched/step_window.h"

static const char usage[] =
    "usage: [mpirun -n N] pmpd train DATASET.h5 --out CLASSIFIER.h5 [options]\n"
    "Trains the classifier of a learned scheduler on what pmpd dataset made. The result does not\n"
    "depend on the number of ranks; more than 8 help a search only.\n"
    "  --kind K          kv (default): one look at K and V after prefill, for the policy learned;\n"
    "                    step: looks at the signals of the steps so far, for step-learned\n"
    "  --groups G        kv: pooled vectors (default 4; of a dataset with --heads all: one a "
    "head)\n"
    "  --queries Q       kv: of each pooled vector (default 4)\n"
    "  --hidden H        width of the MLP (default: that of its input)\n"
    "  --epochs N        at most (default 60)                --patience P epochs without a better\n"
    "                    validation loss end it (default 8)\n"
    "  --batch B         samples of an update (default 32)   --lr R       of AdamW (default 1e-3)\n"
    "  --weight-decay W  (default 0.01)                      --dropout D  (default 0.1)\n"
    "  --seed S          (default 1)\n"
    "  --balance         weigh classes so that each counts the same; the probabilities then are\n"
    "                    not those of the data\n"
    "  --allow-empty     train although a class has no sample\n"
    "  --from C.h5       start from this classifier's parameters (its sizes, too)\n"
    "  --trials N        random search with successive halving over groups, queries, hidden, "
    "batch,\n"
    "                    rate, decay and dropout: N trials shared among the ranks, each third "
    "that\n"
    "                    is best goes on with three times the epochs. What is done is kept in\n"
    "                    CLASSIFIER.h5.trials: the same command goes on; trials.h5 there has all\n"
    "  --test            also print the test split: for the one time at the very end\n"
    "  --json            print the result as JSON\n"
    "Examples:\n"
    "  pmpd train results/data.h5 --out results/learned.h5\n"
    "  mpirun -n 8 pmpd train results/data.h5 --out results/learned.h5 --trials 81 --test\n";

int32_t train_job_n_in(const struct train_job *j)
{
    return j->kind == CLASSIFIER_STEP ? STEP_WINDOW_N : 0;
}

int32_t train_job_n_classes(const struct train_job *j)
{
    return j->kind == CLASSIFIER_STEP ? 2 : j->dataset.facts.n_candidates + 1;
}

/* ---- the command ---- */

static enum status parse_f64(double *out, const char *name, const char *text)
{
    char *end = NULL;
    *out = strtod(text, &end);
    if (end == text || *end != '\0') {
        FAIL(ST_USER, "%s: expected a number, found \"%s\"", name, text);
    }
    return ST_OK;
}

static enum status parse_i32(int32_t *out, const char *name, const char *text)
{
    char *end = NULL;
    long v = strtol(text, &end, 10);
    if (end == text || *end != '\0' || v < 0 || v > 1 << 30) {
        FAIL(ST_USER, "%s: expected a whole number, found \"%s\"", name, text);
    }
    *out = (int32_t)v;
    return ST_OK;
}

static enum status parse_command(struct train_job *j, int argc, char **argv)
{
    const char *kind = "kv";
    int32_t seed = 1;
    const struct {
        const char *name;
        const char **text;
        int32_t *whole;
        double *number;
        bool *flag;
    } options[] = {
        {"--out", &j->out, NULL, NULL, NULL},
        {"--from", &j->from, NULL, NULL, NULL},
        {"--kind", &kind, NULL, NULL, NULL},
        {"--groups", NULL, &j->n_groups, NULL, NULL},
        {"--queries", NULL, &j->n_queries, NULL, NULL},
        {"--hidden", NULL, &j->n_hidden, NULL, NULL},
        {"--epochs", NULL, &j->options.max_epochs, NULL, NULL},
        {"--patience", NULL, &j->options.patience, NULL, NULL},
        {"--batch", NULL, &j->options.batch, NULL, NULL},
        {"--trials", NULL, &j->n_trials, NULL, NULL},
        {"--seed", NULL, &seed, NULL, NULL},
        {"--lr", NULL, NULL, &j->options.learning_rate, NULL},
        {"--weight-decay", NULL, NULL, &j->options.weight_decay, NULL},
        {"--dropout", NULL, NULL, &j->options.dropout, NULL},
        {"--balance", NULL, NULL, NULL, &j->options.balance},
        {"--allow-empty", NULL, NULL, NULL, &j->options.allow_empty},
        {"--test", NULL, NULL, NULL, &j->test},
        {"--json", NULL, NULL, NULL, &j->json},
    };
    for (int i = 1; i < argc; i++) {
        size_t o = 0, n = sizeof options / sizeof *options;
        while (o < n && strcmp(argv[i], options[o].name) != 0) {
            o++;
        }
        if (o == n && argv[i][0] != '-' && !j->dataset_path) {
            j->dataset_path = argv[i];
        } else if (o == n || (!options[o].flag && i + 1 == argc)) {
            FAIL(ST_USER,
                 "train does not know \"%s\" (or it needs a value); pmpd train --help "
                 "explains",
                 argv[i]);
        } else if (options[o].flag) {
            *options[o].flag = true;
        } else if (options[o].text) {
            *options[o].text = argv[++i];
        } else if (options[o].whole) {
            TRY(parse_i32(options[o].whole, argv[i], argv[i + 1]));
            i++;
        } else {
            TRY(parse_f64(options[o].number, argv[i], argv[i + 1]));
            i++;
        }
    }
    j->options.seed = (uint64_t)seed;
    j->kind = strcmp(kind, "step") == 0 ? CLASSIFIER_STEP : CLASSIFIER_KV;
    if (!j->dataset_path || !j->out) {
        FAIL(ST_USER, "train needs DATASET.h5 and --out CLASSIFIER.h5; pmpd train --help explains");
    }
    if (strcmp(kind, "kv") != 0 && j->kind == CLASSIFIER_KV) {
        FAIL(ST_USER, "--kind: expected kv or step, found \"%s\"", kind);
    }
    if (j->n_trials > SEARCH_MAX_TRIALS || (j->n_trials > 0 && j->from)) {
        FAIL(ST_USER, "--trials: expected at most %d, and not together with --from",
             SEARCH_MAX_TRIALS);
    }
    return train_options_check(&j->options);
}

/* ---- training ---- */

static void digest_rows(struct train_job *j)
{
    XXH128_hash_t h = XXH3_128bits(&j->dataset.facts.max_new_tokens, sizeof(int32_t));
    for (int32_t i = 0; i < j->dataset.n; i++) {
        const struct dataset_row *r = &j->dataset.rows[i];
        h = XXH3_128bits_withSeed(r->key, sizeof r->key, h.low64 ^ (3 * h.high64));
        h = XXH3_128bits_withSeed(&r->label, sizeof r->label, h.low64 ^ (3 * h.high64));
    }
    snprintf(j->digest, sizeof j->digest, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
}

static enum status read_inputs(struct train_job *j)
{
    TRY(dataset_read(&j->dataset, j->dataset_path));
    for (int s = 0; s < SPLIT_N; s++) {
        TRY(dataset_samples(&j->samples[s], &j->dataset, (enum dataset_split)s, j->kind));
    }
    digest_rows(j);
    return ST_OK;
}

/* The classifier to be trained: that of --from, of the search, or of the options. */
static enum status make_classifier(struct train_job *j, const struct trial *t, struct classifier *c)
{
    const struct dataset_facts *f = &j->dataset.facts;
    if (j->from) {
        TRY(classifier_read(c, j->from));
        const struct classifier_use use = {.kind = j->kind,
                                           .model_digest = f->model_digest,
                                           .high = f->high,
                                           .low = f->low,
                                           .n_kv_heads = f->n_kv_heads,
                                           .head_dim = f->head_dim,
                                           .n_in = train_job_n_in(j)};
        TRY(classifier_check_use(c, j->from, &use));
        if (c->shape.n_classes != train_job_n_classes(j)) {
            FAIL(ST_USER, "%s has %d classes, the dataset %d", j->from, c->shape.n_classes,
                 train_job_n_classes(j));
        }
        j->options.warm = true;
    } else {
        struct classifier_shape s = search_shape(t, j->kind, f->n_kv_heads, f->head_dim,
                                                 train_job_n_in(j), train_job_n_classes(j));
        s.n_hidden = s.n_hidden ? s.n_hidden : s.n_in;
        TRY(classifier_create(c, &s));
    }
    snprintf(c->facts.model_digest, sizeof c->facts.model_digest, "%s", f->model_digest);
    snprintf(c->facts.high, sizeof c->facts.high, "%s", f->high);
    snprintf(c->facts.low, sizeof c->facts.low, "%s", f->low);
    for (int32_t i = 0; i < c->shape.n_classes; i++) {
        c->facts.class_at[i] = j->kind == CLASSIFIER_STEP ? i : f->class_at[i];
    }
    return ST_OK;
}

static json_t *describe(const struct train_job *j, const struct classifier *c,
                        const struct train_history *h)
{
    const struct train_options *o = &j->options;
    const struct classifier_shape *s = &c->shape;
    json_t *epochs = json_array();
    for (int32_t i = 0; i < h->n; i++) {
        const struct train_epoch *e = &h->epochs[i];
        json_array_append_new(epochs, json_pack("[f, f, f]", (double)e->train_loss,
                                                (double)e->validation_loss,
                                                (double)e->validation_accuracy));
    }
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:i, s:i, s:f, s:f, s:f, s:i, s:i, s:i, s:I, s:b, s:b, s:i, s:i, "
        "s:i, s:i, s:o}",
        "program", provenance_version(), "dataset", j->dataset_path, "dataset_rows", j->digest,
        "kind", j->kind == CLASSIFIER_KV ? "kv" : "step", "n_train", (int)j->samples[SPLIT_TRAIN].n,
        "n_validation", (int)j->samples[SPLIT_VALIDATION].n, "learning_rate", o->learning_rate,
        "weight_decay", o->weight_decay, "dropout", o->dropout, "batch", (int)o->batch,
        "max_epochs", (int)o->max_epochs, "patience", (int)o->patience, "seed", (json_int_t)o->seed,
        "balance", o->balance, "from_other", j->from != NULL, "n_groups", (int)s->n_groups,
        "n_queries", (int)s->n_queries, "n_hidden", (int)s->n_hidden, "best_epoch", (int)h->best,
        "epochs", epochs);
}

/* Collective. */
static enum status measure(struct train_job *j, const struct classifier *c,
                           enum dataset_split split, struct collective *coll, struct held_out *out)
{
    const struct dataset_samples *s = &j->samples[split];
    float *probabilities = NULL;
    TRY(MEM_NEW(&probabilities, (size_t)s->n * (size_t)c->shape.n_classes));
    enum status st = train_predict(c, s->sample, s->n, coll, probabilities);
    if (st == ST_OK) {
        held_out_measure(out, probabilities, s->sample, s->n, c->shape.n_classes,
                         j->samples[SPLIT_TRAIN].sample, j->samples[SPLIT_TRAIN].n);
    }
    mem_free(probabilities);
    return st;
}

/* Rank 0. */
static enum status finish(struct train_job *j, struct classifier *c, const struct train_history *h,
                          const struct held_out *validation, const struct held_out *test)
{
    json_t *about = describe(j, c, h);
    char *text = about ? json_dumps(about, JSON_COMPACT) : NULL, *copy = NULL;
    enum status st = ST_OK;
    if (!text) {
        FAIL_GOTO(st, ST_FORMAT, done, "the training cannot be described: a path is not UTF-8");
    }
    TRY_GOTO(st, mem_strdup(&copy, text), done);
    mem_free(c->training);
    c->training = copy;
    TRY_GOTO(st, classifier_write(c, j->out), done);
    if (j->json) {
        json_object_set_new(about, "validation", train_report_json(validation, c));
        if (j->test) {
            json_object_set_new(about, "test", train_report_json(test, c));
        }
        json_dumpf(about, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
        printf("\n");
        goto done;
    }
    const struct train_epoch *best = &h->epochs[h->best];
    printf("%s: %zu parameters, %d training samples, best after %d of %d epochs (training loss "
           "%.4f, validation loss %.4f)\n",
           j->out, c->n_params, j->samples[SPLIT_TRAIN].n, h->best + 1, h->n,
           (double)best->train_loss, (double)best->validation_loss);
    train_report_print(validation, c, "validation");
    if (j->test) {
        train_report_print(test, c, "test");
    }
done:
    free(text);
    json_decref(about);
    return st;
}

static enum status train(struct train_job *j, const struct trial *t, struct collective *coll)
{
    struct classifier c = {0};
    struct train_history history = {0};
    struct held_out validation = {0}, test = {0};
    struct train_data data = {j->samples[SPLIT_TRAIN].sample, j->samples[SPLIT_VALIDATION].sample,
                              j->samples[SPLIT_TRAIN].n, j->samples[SPLIT_VALIDATION].n};
    enum status st = ST_OK;
    TRY_GOTO(st, env_agree(j->env, make_classifier(j, t, &c)), done);
    TRY_GOTO(st, train_run(&c, &data, &j->options, coll, &history), done);
    TRY_GOTO(st, measure(j, &c, SPLIT_VALIDATION, coll, &validation), done);
    if (j->test) {
        TRY_GOTO(st, measure(j, &c, SPLIT_TEST, coll, &test), done);
    }
    st = j->env->rank == 0 ? finish(j, &c, &history, &validation, &test) : ST_OK;
    st = env_agree(j->env, st);
done:
    train_history_free(&history);
    classifier_free(&c);
    return st;
}

static enum status open_group(struct collective *coll, struct env *env)
{
    static const double timeout_s = 86400; /* a batch of large prompts may take a rank long */
    if (env->size == 1) {
        collective_local(coll);
        return ST_OK;
    }
    TRY(env_grid(env, env->size));
    return coll_mpi_open(coll, env, timeout_s, 1 << 20);
}

static enum status run(struct train_job *j)
{
    struct trial t = {.n_groups = j->n_groups ? j->n_groups : 4,
                      .n_queries = j->n_queries ? j->n_queries : 4,
                      .n_hidden = j->n_hidden};
    struct collective coll = {0};
    TRY(env_agree(j->env, read_inputs(j)));
    if (j->n_trials > 0) {
        TRY(train_search(j, &t));
        j->options = search_options(&t, &j->options);
    }
    TRY(env_agree(j->env, open_group(&coll, j->env)));
    enum status st = train(j, &t, &coll);
    collective_close(&coll);
    return st;
}

enum status cmd_train(struct env *env, int argc, char **argv)
{
    struct train_job j = {.env = env, .options = train_options_default()};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(env->rank == 0 ? usage : "", stdout);
            return ST_OK;
        }
    }
    enum status st = env_agree(env, parse_command(&j, argc, argv));
    st = st ? st : run(&j);
    for (int s = 0; s < SPLIT_N; s++) {
        dataset_samples_free(&j.samples[s]);
    }
    dataset_free(&j.dataset);
    return st;
}
