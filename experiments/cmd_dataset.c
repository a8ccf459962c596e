/* pmpd dataset: training data for learned schedulers. Stage 1 decodes the reference model's texts,
 * stage 2 the high level's and those of every candidate switch, scores them, labels.
 * Source: PMPD (arXiv 2410.13461), learned scheduler.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/rouge.h"
#include "core/tokenizer.h"
#include "experiments/branches.h"
#include "experiments/cmd.h"
#include "experiments/dataset_work.h"
#include "experiments/engine.h"
#include "experiments/provenance.h"

static const char usage[] =
    "usage: [mpirun -n N] pmpd dataset FILE.cfg --out OUT.h5 --high B --low B [options]\n"
    "Makes training data for the learned schedulers: for each prompt of prompts.path the features\n"
    "of its prefill (K and V of the last layer) and the label: the earliest step at which the low\n"
    "level may take over so that the text is as good as the high level's alone.\n"
    "  --high B, --low B    the two levels of model.path, such as 4 and 2\n"
    "  --reference MODEL    whose texts are the aim, best the unquantised model (default:\n"
    "                       model.path)\n"
    "  --reference-level B  its level (default max)\n"
    "  --candidates LIST    fractions of decode.max_new_tokens at which to switch, ascending\n"
    "                       (default \"0 1/3 2/3\"); \"never\" is added\n"
    "  --criterion C        what a text is scored by against the reference's: rouge-l (default),\n"
    "                       agreement (same token at the same place), kl (divergence from the\n"
    "                       reference model's distribution, fed with the reference's tokens)\n"
    "  --tolerance X        a candidate may score X less than the high level (default 0; kl needs\n"
    "                       one, in nats per token)\n"
    "  --prefixes N         instead of the prompts N random prefixes of each prompt with its\n"
    "                       reference answer, at least --prefix-min tokens (default 32)\n"
    "  --heads H            features: mean over the KV heads (default), or all of them (for the\n"
    "                       policy learned-heads)\n"
    "  --seed S             of the prefixes (default 42)\n"
    "  --set key=value      overrides a setting; decode.slots prompts are decoded side by side\n"
    "The replicas share the prompts and keep what is done in OUT.h5.parts (a folder that all "
    "see):\n"
    "the same command does only what is missing. It may be removed once OUT.h5 is there.\n"
    "A prompt's split (train, validation, test) follows from its text alone.\n"
    "Example:\n"
    "  mpirun -n 2 pmpd dataset configs/tiny.cfg --out results/data.h5 --high 4 --low 2 \\\n"
    "      --reference experiments/tiny --set prompts.path=experiments/tasks/tiny_story.jsonl\n";

struct job {
    struct env *env;
    struct settings settings;
    const char *config, *out, *reference, *reference_level;
    enum criterion criterion;
    bool all_heads;
    struct work_options options;
    struct dataset_facts facts;
    struct model_config model;
    int32_t context;
    struct tokenizer *tok;
    struct prompts prompts;
    struct work work;
    char parts[SETTINGS_PATH_BYTES + 16];
    char depends[4 * LEVEL_TEXT_BYTES + 2048];
    struct journal *journal; /* first rank of a replica, while decoding */
};

/* ---- the command ---- */

static enum status parse_number(double *out, const char *name, const char *text, double most)
{
    char *end = NULL;
    double value = strtod(text, &end);
    if (end != text && *end == '/') {
        const char *below = end + 1;
        double divisor = strtod(below, &end);
        value = end != below && divisor > 0 ? value / divisor : -1;
    }
    if (end == text || *end != '\0' || !(value >= 0 && value <= most)) {
        FAIL(ST_USER, "--%s: expected a number from 0 to %g, found \"%s\"", name, most, text);
    }
    *out = value;
    return ST_OK;
}

static enum status parse_candidates(struct dataset_facts *f, const char *text)
{
    char copy[512], *rest = copy, *word = NULL;
    snprintf(copy, sizeof copy, "%s", text);
    while ((word = strsep(&rest, " ,")) != NULL) {
        double at = 0;
        if (*word == '\0') {
            continue;
        }
        TRY(parse_number(&at, "candidates", word, 1));
        if (at == 1 || f->n_candidates == DATASET_MAX_CANDIDATES ||
            (f->n_candidates > 0 && at <= f->class_at[f->n_candidates - 1])) {
            FAIL(
                ST_USER,
                "--candidates: expected up to %d ascending fractions below 1 (\"never\" is added), "
                "found \"%s\"",
                DATASET_MAX_CANDIDATES, text);
        }
        f->class_at[f->n_candidates++] = at;
    }
    if (f->n_candidates == 0) {
        FAIL(ST_USER, "--candidates is empty; expected fractions such as \"0 1/3 2/3\"");
    }
    f->class_at[f->n_candidates] = 1;
    return ST_OK;
}

struct words {
    const char *high, *low, *candidates, *criterion, *tolerance, *prefixes, *prefix_min, *seed,
        *heads;
};

static enum status read_options(struct job *j, const struct words *w)
{
    double tolerance = 0, n = 0, min = 32, seed = 42;
    struct dataset_facts *f = &j->facts;
    if (!j->config || !j->out || !w->high || !w->low) {
        FAIL(ST_USER, "dataset needs FILE.cfg, --out OUT.h5, --high B and --low B; pmpd dataset "
                      "--help explains");
    }
    TRY(criterion_parse(&j->criterion, w->criterion ? w->criterion : "rouge-l"));
    if (j->criterion == CRITERION_KL && !w->tolerance) {
        FAIL(ST_USER, "--criterion kl needs --tolerance: fewer bits always diverge a little more; "
                      "say how many nats per token are allowed, such as 0.02");
    }
    TRY(parse_candidates(f, w->candidates ? w->candidates : "0 1/3 2/3"));
    TRY(w->tolerance ? parse_number(&tolerance, "tolerance", w->tolerance, 100) : ST_OK);
    TRY(w->prefixes ? parse_number(&n, "prefixes", w->prefixes, 10000) : ST_OK);
    TRY(w->prefix_min ? parse_number(&min, "prefix-min", w->prefix_min, 1e6) : ST_OK);
    TRY(w->seed ? parse_number(&seed, "seed", w->seed, 1e15) : ST_OK);
    if (w->heads && strcmp(w->heads, "mean") != 0 && strcmp(w->heads, "all") != 0) {
        FAIL(ST_USER, "--heads: expected mean or all, found \"%s\"", w->heads);
    }
    j->all_heads = w->heads && strcmp(w->heads, "all") == 0;
    f->tolerance = tolerance;
    snprintf(f->criterion, sizeof f->criterion, "%s", criterion_name[j->criterion]);
    snprintf(f->high, sizeof f->high, "%s", w->high);
    snprintf(f->low, sizeof f->low, "%s", w->low);
    snprintf(f->reference, sizeof f->reference, "%s", j->reference_level);
    j->options = (struct work_options){.n_prefixes = (int32_t)n,
                                       .prefix_min = min < 1 ? 1 : (int32_t)min,
                                       .seed = (uint64_t)seed,
                                       .depends = j->depends};
    return ST_OK;
}

static enum status parse_command(struct job *j, int argc, char **argv)
{
    struct words w = {0};
    const struct {
        const char *name, **to;
    } options[] = {
        {"--out", &j->out},
        {"--reference", &j->reference},
        {"--reference-level", &j->reference_level},
        {"--high", &w.high},
        {"--low", &w.low},
        {"--candidates", &w.candidates},
        {"--criterion", &w.criterion},
        {"--tolerance", &w.tolerance},
        {"--prefixes", &w.prefixes},
        {"--prefix-min", &w.prefix_min},
        {"--seed", &w.seed},
        {"--heads", &w.heads},
    };
    for (int i = 1; i < argc; i++) {
        bool known = strcmp(argv[i], "--set") == 0;
        for (size_t o = 0; o < sizeof options / sizeof *options && i + 1 < argc; o++) {
            if (strcmp(argv[i], options[o].name) == 0) {
                *options[o].to = argv[i + 1];
                known = true;
            }
        }
        if (known && i + 1 < argc) {
            i++;
        } else if (known || argv[i][0] == '-') {
            FAIL(ST_USER,
                 "dataset does not know \"%s\" (or it needs a value); pmpd dataset --help explains",
                 argv[i]);
        } else if (j->config) {
            FAIL(ST_USER, "dataset takes one FILE.cfg, found \"%s\" and \"%s\"", j->config,
                 argv[i]);
        } else {
            j->config = argv[i];
        }
    }
    return read_options(j, &w);
}

/* Rank 0 reads; all parse the same text. */
static enum status read_settings(struct job *j, int argc, char **argv)
{
    char *text = NULL;
    enum status st = parse_command(j, argc, argv);
    if (st == ST_OK && j->env->rank == 0) {
        st = settings_read_file(&text, j->config);
    }
    TRY_GOTO(st, env_agree(j->env, st), done);
    TRY_GOTO(st, env_broadcast_text(j->env, &text), done);
    settings_default(&j->settings);
    st = settings_parse(&j->settings, text, j->config);
    for (int i = 1; st == ST_OK && i + 1 < argc; i++) {
        if (strcmp(argv[i], "--set") == 0) {
            st = settings_set(&j->settings, argv[++i]);
        }
    }
    if (st == ST_OK && j->settings.decode.temperature > 0) {
        st = status_raise(ST_USER, __FILE__, __LINE__, __func__,
                          "decode.temperature is %g, but labels compare greedy texts: set it to 0",
                          j->settings.decode.temperature);
    }
    st = env_agree(j->env, st);
done:
    mem_free(text);
    return st;
}

/* ---- before the decoding ---- */

static enum status digest_of(struct job *j, const char *folder, char digest[DIGEST_TEXT])
{
    struct model_source source = {0};
    enum status st = ST_OK;
    if (j->env->rank == 0) {
        TRY(model_source_open(&source, folder));
        st = checkpoint_digest(source.ckpt, folder, digest);
        model_source_close(&source);
    }
    return st;
}

static enum status read_model(struct job *j)
{
    struct model_source source = {0}, reference = {0};
    TRY(model_source_open(&source, j->settings.model.path));
    enum status st = model_source_open(&reference, j->reference);
    j->model = source.config;
    j->context = j->settings.decode.context ? j->settings.decode.context : source.config.context;
    int32_t least = reference.config.context < j->context ? reference.config.context : j->context;
    int32_t vocab = reference.config.vocab;
    model_source_close(&reference);
    model_source_close(&source);
    TRY(st);
    if (vocab != j->model.vocab) {
        FAIL(ST_USER,
             "%s has a vocabulary of %d, the reference %s one of %d: texts of the two "
             "cannot be compared token by token",
             j->settings.model.path, j->model.vocab, j->reference, vocab);
    }
    j->facts.head_dim = j->model.head_dim;
    j->facts.n_kv_heads = j->all_heads ? j->model.n_kv_heads : 1;
    j->facts.max_new_tokens = j->settings.decode.max_new_tokens;
    j->options.most_tok = least - j->facts.max_new_tokens;
    if (j->options.most_tok < 1) {
        FAIL(ST_USER, "decode.max_new_tokens = %d leaves no room for a prompt in a context of %d",
             j->facts.max_new_tokens, least);
    }
    return ST_OK;
}

static enum status read_inputs(struct job *j)
{
    const struct settings *s = &j->settings;
    if (s->prompts.path[0] == '\0' || s->model.path[0] == '\0') {
        FAIL(ST_USER, "model.path or prompts.path is empty; expected a model and a JSONL file");
    }
    j->reference = j->reference ? j->reference : s->model.path;
    TRY(read_model(j));
    TRY(digest_of(j, s->model.path, j->facts.model_digest));
    TRY(digest_of(j, j->reference, j->facts.reference_digest));
    TRY(tokenizer_open(&j->tok, s->model.path, j->model.vocab));
    TRY(prompts_read(&j->prompts, s->prompts.path, s->prompts.split, s->prompts.limit));
    TRY(prompts_encode(&j->prompts, j->tok, j->options.most_tok + j->facts.max_new_tokens,
                       j->facts.max_new_tokens));
    for (int32_t i = 0; i < j->prompts.n; i++) {
        if (j->prompts.prompt[i].n_turns > 1) {
            log_info("only the first turn of each prompt is used");
            break;
        }
    }
    if (snprintf(j->parts, sizeof j->parts, "%s.parts", j->out) >= (int)sizeof j->parts) {
        FAIL(ST_USER, "--out is too long");
    }
    return ST_OK;
}

/* All that a row depends on beside its prompt. */
static void describe(struct job *j)
{
    const struct settings *s = &j->settings;
    const struct dataset_facts *f = &j->facts;
    int n = snprintf(j->depends, sizeof j->depends,
                     "dataset 1\nmodel %s\nreference %s %s\nhigh %s\nlow %s\ncriterion %s %.17g\n"
                     "new %d\neos %d\nheads %d\nbackend %s\nchunk %d\nkv %s\n%s %d\n",
                     f->model_digest, f->reference_digest, f->reference, f->high, f->low,
                     f->criterion, f->tolerance, f->max_new_tokens, s->decode.stop_at_eos,
                     f->n_kv_heads, s->backend.name, s->decode.prefill_chunk, s->kv.format,
                     s->parallel.reproducible ? "segments" : "tensor_ranks",
                     s->parallel.reproducible ? s->parallel.segments : s->parallel.tensor_ranks);
    for (int32_t i = 0; i < f->n_candidates; i++) {
        n += snprintf(j->depends + n, sizeof j->depends - (size_t)n, "at %.17g\n", f->class_at[i]);
    }
    INVARIANT((size_t)n < sizeof j->depends);
}

static enum status prepare(struct job *j)
{
    enum status st = env_agree(j->env, read_inputs(j));
    TRY(st);
    TRY_MPI(MPI_Bcast(j->facts.model_digest, DIGEST_TEXT, MPI_CHAR, 0, j->env->world));
    TRY_MPI(MPI_Bcast(j->facts.reference_digest, DIGEST_TEXT, MPI_CHAR, 0, j->env->world));
    describe(j);
    st = work_create(&j->work, &j->prompts, j->tok, &j->options);
    st = st ? st : work_read(&j->work, j->parts, &j->facts, NULL);
    return env_agree(j->env, st);
}

/* ---- one stage ---- */

/* A stage on one replica: groups of prompts through branches_run. */
struct stage {
    struct job *job;
    struct engine e;
    struct branches_options o;
    struct branches *branches;
    struct branches_prompt *group; /* (n_side) */
    struct work_item **items;      /* (n_side) of the group */
    int32_t n_side;
    int32_t *tokens, *n_new, *forced_tokens, *forced_new;
    float *signals, *features;
    struct top *top;    /* (n_side, T) stage 1 of kl */
    double *divergence; /* (n_side, 1 + n_branches, T) stage 2 of kl */
    bool is_forced;     /* logits are those of forced tokens */
};

static enum status on_reference_logits(void *ctx, int32_t p, int32_t sequence, int32_t t,
                                       const float *logits)
{
    struct stage *s = ctx;
    (void)sequence;
    top_take(&s->top[(size_t)p * (size_t)s->o.max_new_tokens + (size_t)t], logits,
             s->e.source.config.vocab);
    return ST_OK;
}

static enum status on_forced_logits(void *ctx, int32_t p, int32_t sequence, int32_t t,
                                    const float *logits)
{
    struct stage *s = ctx;
    if (s->is_forced && t < s->items[p]->n_reference) {
        size_t at = ((size_t)p * (size_t)(1 + s->o.n_branches) + (size_t)sequence) *
                        (size_t)s->o.max_new_tokens +
                    (size_t)t;
        s->divergence[at] = top_divergence(&s->items[p]->top[t], logits, s->e.source.config.vocab);
    }
    return ST_OK;
}

static void stage_close(struct stage *s)
{
    branches_destroy(&s->branches);
    engine_close(&s->e);
    mem_free(s->group);
    mem_free(s->items);
    mem_free(s->tokens);
    mem_free(s->n_new);
    mem_free(s->forced_tokens);
    mem_free(s->forced_new);
    mem_free(s->signals);
    mem_free(s->features);
    mem_free(s->top);
    mem_free(s->divergence);
    journal_close(&s->job->journal);
}

/* Of a prompt, at most. */
static size_t feature_floats(const struct job *j)
{
    return 2 * (size_t)j->facts.n_kv_heads * (size_t)j->options.most_tok *
           (size_t)j->facts.head_dim;
}

static enum status stage_allocate(struct stage *s)
{
    size_t side = (size_t)s->n_side, sequences = side * (size_t)(1 + s->o.n_branches);
    size_t t = (size_t)s->o.max_new_tokens;
    size_t feature = feature_floats(s->job);
    TRY(MEM_NEW(&s->group, side));
    TRY(MEM_NEW(&s->items, side));
    TRY(MEM_NEW(&s->tokens, sequences * t));
    TRY(MEM_NEW(&s->n_new, sequences));
    TRY(MEM_NEW(&s->forced_tokens, sequences * t));
    TRY(MEM_NEW(&s->forced_new, sequences));
    TRY(MEM_NEW(&s->signals, side * t * DATASET_N_SIGNALS));
    TRY(MEM_NEW(&s->features, side * feature));
    if (s->o.on_logits == on_reference_logits) {
        TRY(MEM_NEW(&s->top, side * t));
    } else if (s->o.on_logits) {
        TRY(MEM_NEW(&s->divergence, sequences * t));
    }
    return branches_create(&s->branches, &s->e, s->n_side, s->job->settings.decode.prefill_chunk,
                           &s->o);
}

static enum status no_records(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    (void)ctx;
    (void)kind;
    (void)payload;
    (void)bytes;
    return ST_OK;
}

static enum status add_levels(struct stage *s, bool is_reference)
{
    const struct dataset_facts *f = &s->job->facts;
    struct level_table *levels = &s->e.levels;
    if (is_reference) {
        TRY(level_table_add(levels, f->reference, &s->o.level));
    } else {
        TRY(level_table_add(levels, f->high, &s->o.level));
        TRY(level_table_add(levels, f->low, &s->o.branch_level));
    }
    s->o.prefill = s->o.level;
    return ST_OK;
}

/* Collective over the world. */
static enum status stage_open(struct stage *s, struct job *j, bool is_reference)
{
    struct settings settings = j->settings;
    const struct dataset_facts *f = &j->facts;
    char dir[sizeof j->parts + 32];
    *s = (struct stage){.job = j, .n_side = settings.decode.slots};
    s->o = (struct branches_options){.n_branches = is_reference ? 0 : f->n_candidates,
                                     .max_new_tokens = f->max_new_tokens,
                                     .stop_at_eos = settings.decode.stop_at_eos,
                                     .all_heads = j->all_heads,
                                     .ctx = s};
    if (j->criterion == CRITERION_KL) {
        s->o.on_logits = is_reference ? on_reference_logits : on_forced_logits;
    }
    for (int32_t i = 0; i < s->o.n_branches; i++) {
        s->o.at[i] = dataset_switch_step(f, i);
    }
    settings.decode.slots *= 1 + s->o.n_branches;
    settings.decode.context = j->options.most_tok + f->max_new_tokens;
    snprintf(settings.model.path, sizeof settings.model.path, "%s",
             is_reference ? j->reference : j->settings.model.path);
    TRY(engine_open(&s->e, j->env, &settings));
    TRY(env_agree(j->env, add_levels(s, is_reference)));
    TRY(engine_load(&s->e, &settings, true));
    enum status st = stage_allocate(s);
    if (st == ST_OK && j->env->tensor_rank == 0) {
        snprintf(dir, sizeof dir, "%s/replica-%04d", j->parts, j->env->replica);
        st = journal_open(&j->journal, dir, no_records, NULL);
    }
    return env_agree(j->env, st);
}

/* The group's prompts, and where what comes out goes. */
static void fill_group(struct stage *s, int32_t n)
{
    size_t t = (size_t)s->o.max_new_tokens, sequences = (size_t)(1 + s->o.n_branches);
    size_t feature = feature_floats(s->job);
    for (int32_t i = 0; i < n; i++) {
        size_t k = (size_t)i;
        s->group[i] = (struct branches_prompt){
            .ids = s->items[i]->ids,
            .n_ids = s->items[i]->n_ids,
            .tokens = s->tokens + k * sequences * t,
            .n_new = s->n_new + k * sequences,
            .signals = s->o.n_branches ? s->signals + k * t * DATASET_N_SIGNALS : NULL,
            .features = s->o.n_branches ? s->features + k * feature : NULL};
    }
}

static enum status finish_references(struct stage *s, int32_t n)
{
    for (int32_t i = 0; i < n && s->job->env->tensor_rank == 0; i++) {
        struct work_item item = *s->items[i]; /* the arrays are the stage's */
        item.reference = s->group[i].tokens;
        item.n_reference = s->group[i].n_new[0];
        item.top = s->top ? s->top + (size_t)i * (size_t)s->o.max_new_tokens : NULL;
        TRY(work_put_reference(s->job->journal, &item));
    }
    return ST_OK;
}

/* ---- stage 2 ---- */

/* Minus the mean divergence of a sequence; before a branch left it is the main sequence's. */
static double minus_divergence(const struct stage *s, int32_t i, int32_t sequence)
{
    size_t t = (size_t)s->o.max_new_tokens;
    const double *main = s->divergence + (size_t)i * (size_t)(1 + s->o.n_branches) * t;
    const double *own = main + (size_t)sequence * t;
    int32_t n = s->items[i]->n_reference, shared = sequence ? s->o.at[sequence - 1] + 1 : 0;
    double sum = 0;
    for (int32_t k = 0; k < n; k++) {
        sum += k < shared ? main[k] : own[k];
    }
    return -sum / n;
}

static enum status score(const struct stage *s, int32_t i, int32_t sequence, const char *text,
                         const char *reference, float *out)
{
    const struct work_item *item = s->items[i];
    const int32_t *tokens = s->group[i].tokens + (size_t)sequence * (size_t)s->o.max_new_tokens;
    double value = 0;
    switch (s->job->criterion) {
    case CRITERION_ROUGE_L:
        TRY(rouge_l(&value, text, reference));
        break;
    case CRITERION_AGREEMENT:
        value = label_agreement(tokens, s->group[i].n_new[sequence], item->reference,
                                item->n_reference);
        break;
    default:
        value = minus_divergence(s, i, sequence);
    }
    *out = (float)value;
    return ST_OK;
}

static enum status fill_row(const struct stage *s, int32_t i, struct dataset_row *row)
{
    const struct work_item *item = s->items[i];
    const struct branches_prompt *p = &s->group[i];
    const struct tokenizer *tok = s->job->tok;
    struct dataset_facts *f = &s->job->facts;
    *row = (struct dataset_row){.key = {item->key[0], item->key[1]},
                                .prompt_hash = item->prompt_hash,
                                .ordinal = item->ordinal,
                                .prefix = item->prefix,
                                .n_tok = p->n_ids,
                                .n_new = p->n_new[0]};
    TRY(mem_strdup(&row->id, item->prompt->id));
    TRY(mem_strdup(&row->task, item->prompt->task));
    TRY(tokenizer_decode(tok, item->ids, item->n_ids, true, &row->prompt));
    TRY(tokenizer_decode(tok, item->reference, item->n_reference, false, &row->reference));
    for (int32_t q = 0; q <= s->o.n_branches; q++) {
        char **text = q ? &row->candidate[q - 1] : &row->high;
        TRY(tokenizer_decode(tok, p->tokens + (size_t)q * (size_t)s->o.max_new_tokens, p->n_new[q],
                             false, text));
        TRY(score(s, i, q, *text, row->reference, q ? &row->scores[q - 1] : &row->high_score));
    }
    row->label = dataset_label(f, row->scores, row->high_score);
    row->features = p->features; /* lent */
    row->signals = p->signals;
    return ST_OK;
}

static enum status finish_rows(struct stage *s, int32_t n)
{
    for (int32_t i = 0; i < n && s->job->env->tensor_rank == 0; i++) {
        struct dataset_row row = {0};
        enum status st = fill_row(s, i, &row);
        st = st ? st : work_put_row(s->job->journal, &row, &s->job->facts);
        row.features = row.signals = NULL;
        dataset_row_free(&row);
        TRY(st);
    }
    return ST_OK;
}

/* The same prompts again, fed with the reference's tokens. */
static enum status force_group(struct stage *s, int32_t n)
{
    size_t t = (size_t)s->o.max_new_tokens, sequences = (size_t)(1 + s->o.n_branches);
    struct branches_prompt *forced = NULL;
    TRY(MEM_NEW(&forced, n));
    for (int32_t i = 0; i < n; i++) {
        forced[i] = (struct branches_prompt){.ids = s->items[i]->ids,
                                             .n_ids = s->items[i]->n_ids,
                                             .forced = s->items[i]->reference,
                                             .n_forced = s->items[i]->n_reference,
                                             .tokens = s->forced_tokens + (size_t)i * sequences * t,
                                             .n_new = s->forced_new + (size_t)i * sequences};
    }
    s->is_forced = true;
    enum status st = branches_run(s->branches, forced, n);
    s->is_forced = false;
    mem_free(forced);
    return st;
}

/* ---- both stages ---- */

static bool is_missing(const struct work_item *item, bool is_reference)
{
    return !item->is_done && (!is_reference || !item->reference);
}

static enum status run_group(struct stage *s, int32_t n, bool is_reference)
{
    fill_group(s, n);
    TRY(branches_run(s->branches, s->group, n));
    if (is_reference) {
        return finish_references(s, n);
    }
    if (s->divergence) {
        TRY(force_group(s, n));
    }
    return finish_rows(s, n);
}

/* This replica's part of what is missing. Collective over the replica. */
static enum status run_items(struct stage *s, bool is_reference, int32_t n_missing)
{
    struct job *j = s->job;
    struct progress progress;
    int32_t n = 0, at = 0, done = 0;
    progress_begin(&progress, is_reference ? "reference texts" : "labels", "prompts", n_missing);
    for (int32_t i = 0; i < j->work.n; i++) {
        struct work_item *item = &j->work.items[i];
        bool last = i + 1 == j->work.n;
        if (is_missing(item, is_reference) && at++ % j->env->n_replicas == j->env->replica) {
            s->items[n++] = item;
        }
        if (n == s->n_side || (last && n > 0)) {
            enum status st = run_group(s, n, is_reference);
            if (st != ST_OK) {
                return status_prefix(st, "prompts %s to %s: ", s->items[0]->prompt->id,
                                     s->items[n - 1]->prompt->id);
            }
            done += n;
            n = 0;
            progress_update(&progress, (double)done * j->env->n_replicas < n_missing
                                           ? done * j->env->n_replicas
                                           : n_missing);
        }
    }
    progress_end(&progress);
    return ST_OK;
}

static enum status run_stage(struct job *j, bool is_reference)
{
    struct stage s;
    int32_t n_missing = 0;
    for (int32_t i = 0; i < j->work.n; i++) {
        n_missing += is_missing(&j->work.items[i], is_reference);
    }
    if (n_missing == 0) {
        return ST_OK;
    }
    enum status st = stage_open(&s, j, is_reference);
    if (st == ST_OK) {
        st = engine_loop_end(j->env, run_items(&s, is_reference, n_missing));
        st = env_agree(j->env, st);
    }
    stage_close(&s);
    TRY(st);
    return env_agree(j->env, work_read(&j->work, j->parts, &j->facts, NULL));
}

/* ---- the end ---- */

static enum status describe_provenance(struct job *j, char **out)
{
    char *config = NULL;
    enum status st = ST_OK;
    TRY(settings_print(&config, &j->settings, false));
    size_t bytes = strlen(config) + strlen(j->depends) + 2 * SETTINGS_PATH_BYTES;
    TRY_GOTO(st, mem_alloc_array((void **)out, bytes, 1), done);
    snprintf(*out, bytes, "program %s\nreference model %s\nprefixes %d min %d seed %llu\n%s\n%s",
             provenance_version(), j->reference, j->options.n_prefixes, j->options.prefix_min,
             (unsigned long long)j->options.seed, j->depends, config);
done:
    mem_free(config);
    return st;
}

static void print_table(const struct dataset *d, const struct work *w)
{
    int32_t count[SPLIT_N][CLASSIFIER_MAX_CLASSES] = {0}, total[SPLIT_N] = {0};
    double high = 0;
    for (int32_t i = 0; i < d->n; i++) {
        enum dataset_split split = dataset_split_of(d->rows[i].prompt_hash);
        count[split][d->rows[i].label]++;
        total[split]++;
        high += (double)d->rows[i].high_score / d->n;
    }
    printf("%d rows; %s of the high level %.4f on average\n\nswitch at  ", d->n, d->facts.criterion,
           high);
    for (int32_t k = 0; k <= d->facts.n_candidates; k++) {
        k < d->facts.n_candidates ? printf("%8.3f", d->facts.class_at[k]) : printf("   never");
    }
    printf("\n");
    for (int s = 0; s < SPLIT_N; s++) {
        printf("%-11s", dataset_split_name[s]);
        for (int32_t k = 0; k <= d->facts.n_candidates; k++) {
            printf("%8d", count[s][k]);
        }
        printf("  of %d\n", total[s]);
    }
    if (w->n_other > 0) {
        log_info("%d rows in the parts are of other settings or prompts and left out", w->n_other);
    }
}

static enum status write_out(struct job *j)
{
    struct dataset d = {.facts = j->facts};
    enum status st = work_read(&j->work, j->parts, &j->facts, &d);
    st = st ? st : describe_provenance(j, &d.provenance);
    if (st == ST_OK && d.n < j->work.n) {
        st = status_raise(ST_IO, __FILE__, __LINE__, __func__,
                          "%s holds %d of %d rows: do all ranks see that folder?", j->parts, d.n,
                          j->work.n);
    }
    st = st ? st : dataset_write(&d, j->out);
    if (st == ST_OK) {
        print_table(&d, &j->work);
    }
    dataset_free(&d);
    return st;
}

static enum status run(struct job *j)
{
    TRY(prepare(j));
    if (j->work.n_done > 0) {
        log_info("%d of %d rows are done already", j->work.n_done, j->work.n);
    }
    TRY(run_stage(j, true));
    TRY(run_stage(j, false));
    return env_agree(j->env, j->env->rank == 0 ? write_out(j) : ST_OK);
}

enum status cmd_dataset(struct env *env, int argc, char **argv)
{
    struct job *j = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(env->rank == 0 ? usage : "", stdout);
            return ST_OK;
        }
    }
    TRY(mem_alloc_array((void **)&j, 1, sizeof *j));
    j->env = env;
    j->reference_level = "max";
    enum status st = read_settings(j, argc, argv);
    st = st ? st : run(j);
    work_free(&j->work);
    prompts_free(&j->prompts);
    tokenizer_close(&j->tok);
    mem_free(j);
    return st;
}
