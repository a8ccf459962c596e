/* pmpd dataset: training data for learned schedulers. Stage 1 decodes the reference model's texts,
 * stage 2 the high level's and those of every candidate switch, scores them, labels.
 * Source: PMPD (arXiv 2410.13461), learned scheduler.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/tokenizer.h"
#include "experiments/args.h"
#include "experiments/cmd.h"
#include "experiments/dataset_stage.h"
#include "experiments/inspect_learn.h"
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

static enum status read_options(struct dataset_job *j, const struct words *w)
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

static enum status parse_command(struct dataset_job *j, int argc, char **argv)
{
    struct words w = {0};
    const struct arg_text options[] = {{"--out", &j->out},
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
                                       {NULL, NULL}};
    TRY(args_config(&j->config, options, "dataset", argc, argv));
    return read_options(j, &w);
}

/* Rank 0 reads; all parse the same text. */
static enum status read_settings(struct dataset_job *j, int argc, char **argv)
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

static enum status digest_of(struct dataset_job *j, const char *folder, char digest[DIGEST_TEXT])
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

static enum status read_model(struct dataset_job *j)
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

static enum status read_inputs(struct dataset_job *j)
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
static void describe(struct dataset_job *j)
{
    const struct settings *s = &j->settings;
    const struct dataset_facts *f = &j->facts;
    int n = snprintf(j->depends, sizeof j->depends,
                     "dataset 1\nmodel %s\nreference %s %s\nhigh %s\nlow %s\ncriterion %s %.17g\n"
                     "new %d\neos %d\nheads %d\nbackend %s %s\nchunk %d\nkv %s\n%s %d\n",
                     f->model_digest, f->reference_digest, f->reference, f->high, f->low,
                     f->criterion, f->tolerance, f->max_new_tokens, s->decode.stop_at_eos,
                     f->n_kv_heads, s->backend.name, s->backend.isa, s->decode.prefill_chunk,
                     s->kv.format, s->parallel.reproducible ? "segments" : "tensor_ranks",
                     s->parallel.reproducible ? s->parallel.segments : s->parallel.tensor_ranks);
    for (int32_t i = 0; i < f->n_candidates; i++) {
        n += snprintf(j->depends + n, sizeof j->depends - (size_t)n, "at %.17g\n", f->class_at[i]);
    }
    INVARIANT((size_t)n < sizeof j->depends);
}

static enum status prepare(struct dataset_job *j)
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

/* ---- the end ---- */

static enum status describe_provenance(struct dataset_job *j, char **out)
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

static enum status write_out(struct dataset_job *j)
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
        struct label_table table = label_table_count(&d);
        label_table_print(&table, &d);
        if (j->work.n_other > 0) {
            log_info("%d rows in the parts are of other settings or prompts and left out",
                     j->work.n_other);
        }
    }
    dataset_free(&d);
    return st;
}

static enum status run(struct dataset_job *j)
{
    TRY(prepare(j));
    if (j->work.n_done > 0) {
        log_info("%d of %d rows are done already", j->work.n_done, j->work.n);
    }
    TRY(dataset_stage_run(j, true));
    TRY(dataset_stage_run(j, false));
    return env_agree(j->env, j->env->rank == 0 ? write_out(j) : ST_OK);
}

enum status cmd_dataset(struct env *env, int argc, char **argv)
{
    struct dataset_job *j = NULL;
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
