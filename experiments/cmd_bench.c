/* pmpd bench: the command line of the timings in experiments/bench, and what they print.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/args.h"
#include "experiments/bench/bandwidth.h"
#include "experiments/bench/bench.h"
#include "experiments/bench/machine.h"
#include "experiments/bench/shape.h"
#include "experiments/cmd.h"
#include "experiments/provenance.h"

#define COMMON_HELP                                                                                \
    "  --threads T,T     CPU threads per rank, one after the other (default: what the rank may\n"  \
    "                    use)\n"                                                                   \
    "  --group G         columns that share a scale: 32, 64 (default), 128\n"                      \
    "  --levels KIND     tied (default) or free\n"                                                 \
    "  --rounds R        how often everything is repeated, in turn (ops 7, decode 5, prefill 3,\n" \
    "                    switch 25)\n"                                                             \
    "  --probe MB        what the bandwidth probe reads (default: 8 times the last-level cache,\n" \
    "                    64 to 1024); the copies of a matrix (ops) take half of it\n"              \
    "  --backend NAME    cpu (default), cpu_ref (slow, exact), cuda\n"                             \
    "  --isa NAME        auto (default), avx512, avx2, scalar: the cpu backend's instructions\n"   \
    "  --share           ask for a larger share of a busy machine (root; says what came of it)\n"  \
    "  --json            one object: what was asked, the machine, and rows of numbers\n"
#define SHAPE_HELP                                                                       \
    "  --shape NAME      mobilellama-1.4b (default), vicuna-7b, phi-1.5, stablelm-3b,\n" \
    "                    llama-3.1-8b, tiny; or FOLDER: the shape of its config.json\n"  \
    "  --kv FORMAT       KV cache: f16 (default) or f32\n"                               \
    "  --segments S      sum in S parts, as parallel.reproducible has it\n"

static const char usage[] =
    "usage: pmpd bench WORD [options] (pmpd bench WORD --help explains each)\n"
    "Timings of a model that nobody trained: random nested weights of a known shape are made in\n"
    "memory. WORD is one of\n"
    "  ops        one matrix: nested products at several bits and tokens, dense F16 beside them\n"
    "  decode     decode steps at a context: tokens/s and the share of the memory bandwidth used\n"
    "  prefill    reading a prompt\n"
    "  service    plans and leases of many simulated replicas (no model)\n"
    "  switch     the first step after a change of precision against the steps that follow\n"
    "Decoding a token is reading the weights once, so the yardstick is memory: a probe that only\n"
    "reads runs before and after every block of timings (best of 1, 2 and 4 streams per thread),\n"
    "and fraction = bytes that had to be read / time / bandwidth of that pair of probes. Compare\n"
    "fractions and ratios of one command; GB/s and tokens/s of a shared machine change by the\n"
    "minute.\n";

static const char ops_usage[] =
    "usage: pmpd bench ops [--rows R --cols C | --shape-list RxC,RxC | --shape NAME]\n"
    "One matrix at a time, from memory: copies of it, at least four times the last-level cache in\n"
    "all, are multiplied in turn. bits 16 is a dense F16 matrix; GB/s counts the weights once, "
    "for\n"
    "any number of tokens.\n"
    "  --rows R          outputs (default 5632)\n"
    "  --cols C          inputs (default 2048)\n"
    "  --shape-list L    several: 5632x2048,2048x5632\n"
    "  --shape NAME      every different matrix of a model (pmpd bench decode --help lists names)\n"
    "  --bits B,B        planes read (default 2,3,4)\n"
    "  --tokens N,N      tokens that share the product (default 1,2,4,8)\n" COMMON_HELP
    "Examples:\n"
    "  pmpd bench ops --rows 4096 --cols 11008 --bits 2,3,4 --tokens 1 --threads 1,2\n"
    "  pmpd bench ops --shape vicuna-7b --tokens 1,8 --json > ops.json\n";

static const char decode_usage[] =
    "usage: pmpd bench decode [--shape NAME] [--bits 2,3,4] [--context N] [--threads 1,2]\n"
    "Decode steps with N tokens in the KV cache (made up, not prefilled); levels, contexts\n"
    "and slots in turn. "
    "Under\n"
    "mpirun all ranks share the model as one replica. Bytes of a step: planes, scales, head, K, "
    "V.\n" SHAPE_HELP "  --bits B,B        levels, head included (default 2,3,4)\n"
    "  --context N,N     tokens in every slot before a block of steps (default 128)\n"
    "  --slots S,S       sequences that decode together (default 1)\n"
    "  --steps K         steps of a block, between two probes (default 16)\n"
    "  --temperature T   sample; default 0: greedy\n"
    "  --profile         where a step's time goes, by operation and matrix\n" COMMON_HELP
    "Examples:\n"
    "  pmpd bench decode --bits 2,3,4 --threads 1,2\n"
    "  pmpd bench decode --shape vicuna-7b --bits 4 --context 512 --threads 2 --profile\n"
    "  pmpd bench decode --bits 4 --slots 1,8 --threads 2\n"
    "  mpirun -n 2 pmpd bench decode --threads 1     (hold it against --threads 2 without "
    "mpirun)\n";

static const char prefill_usage[] =
    "usage: pmpd bench prefill [--shape NAME] [--tokens 128] [--bits 2,3,4] [--threads 1,2]\n"
    "A prompt from its first token to the logits of its last. GMAC/s counts the linear "
    "layers.\n" SHAPE_HELP "  --bits B,B        levels (default 2,3,4)\n"
    "  --tokens N,N      lengths of the prompt (default 128)\n"
    "  --chunk C         tokens of a pass (default: decode.prefill_chunk's)\n" COMMON_HELP
    "Examples:\n"
    "  pmpd bench prefill --tokens 128 --threads 2\n"
    "  pmpd bench prefill --shape phi-1.5 --bits 4 --tokens 32,128,512 --chunk 128\n";

static const char switch_usage[] =
    "usage: pmpd bench switch [--shape NAME] [--from 4] [--to 2] [--threads 1,2]\n"
    "Two steps at one level, then a change: the first step at the new level against the median of\n"
    "the four that follow, over many repetitions.\n" SHAPE_HELP
    "  --from B          bits before (default 4)\n"
    "  --to B,B          bits after (default 2)\n"
    "  --context N       tokens in every slot (default 128)\n"
    "  --slots S         sequences that decode together (default 1)\n" COMMON_HELP "Examples:\n"
    "  pmpd bench switch --from 4 --to 3,2 --threads 2\n"
    "  pmpd bench switch --from 2 --to 4 --shape llama-3.1-8b --rounds 10\n";

static const char service_usage[] =
    "usage: [mpirun -n N] pmpd bench service [--replicas 64] [--leases 10000] [--pause 0,200]\n"
    "Simulated replicas take leases from the scheduler service (journalled with fdatasync), ask "
    "it\n"
    "for a plan (a classifier over K and V of a prompt, gathered over those who wait) and hand in "
    "a\n"
    "record. Under mpirun rank 0 is the service; else one process plays all. Latency of a plan:\n"
    "from the request until the replica has the answer in hand.\n"
    "  --replicas N      simulated replicas (default 64)\n"
    "  --leases N        leases and plans, all replicas together (default 10000)\n"
    "  --pause MS,MS     mean time between a plan and the replica's next lease (default 0,200: as\n"
    "                    fast as it goes, then as decoding would have it)\n"
    "  --tokens N        tokens of a prompt, which its K and V have (default 64)\n"
    "  --dir FOLDER      where the journal lies for a while (default: TMPDIR, or /tmp)\n"
    "  --share           ask for a larger share of a busy machine (root; says what came of it)\n"
    "  --json            one object: what was asked, the machine, and rows of numbers\n"
    "Examples:\n"
    "  mpirun -n 2 pmpd bench service\n"
    "  mpirun -n 3 pmpd bench service --replicas 256 --pause 1000 --dir /scratch\n";

static const struct word {
    const char *name, *title, *usage; /* title: argv[0] of messages */
    enum status (*run)(struct env *env, const struct bench_options *o, json_t *root);
    const struct column *columns;
    const char *bits, *tokens; /* defaults, of those that take them */
    int rounds;
} words[] = {
    {"ops", "bench ops", ops_usage, bench_ops, bench_ops_columns, "2,3,4", "1,2,4,8", 7},
    {"decode", "bench decode", decode_usage, bench_decode, bench_decode_columns, "2,3,4", "1", 5},
    {"prefill", "bench prefill", prefill_usage, bench_prefill, bench_prefill_columns, "2,3,4",
     "128", 3},
    {"switch", "bench switch", switch_usage, bench_switch, bench_switch_columns, "4", "1", 25},
    {"service", "bench service", service_usage, bench_service, bench_service_columns, "4", "64", 1},
};
enum { N_WORDS = sizeof words / sizeof *words };

/* ---- the command line ---- */

struct texts {
    const char *shape, *bits, *threads, *tokens, *rows, *cols, *shape_list, *group, *levels,
        *context, *slots, *steps, *rounds, *chunk, *temperature, *from, *to, *probe, *replicas,
        *leases, *pause, *dir;
    bool profile, share;
};

/* "2,3,4"; a number that comes twice is an error. */
static enum status parse_list(struct bench_list *out, const char *name, const char *text,
                              long long min, long long max)
{
    char *copy = NULL, *rest, *word;
    enum status st = ST_OK;
    out->n = 0;
    TRY(mem_strdup(&copy, text));
    rest = copy;
    while ((word = strsep(&rest, ",")) != NULL) {
        long long v = 0;
        TRY_GOTO(st, args_number(&v, name, word, min, max), done);
        for (int i = 0; i < out->n; i++) {
            if (out->value[i] == v) {
                FAIL_GOTO(st, ST_USER, done, "%s: %lld comes twice in \"%s\"", name, v, text);
            }
        }
        if (out->n == BENCH_LIST) {
            FAIL_GOTO(st, ST_USER, done, "%s: expected at most %d numbers", name, BENCH_LIST);
        }
        out->value[out->n++] = (int32_t)v;
    }
done:
    mem_free(copy);
    return st;
}

static enum status parse_number(int32_t *out, const char *name, const char *text, int32_t fallback,
                                int32_t min, int32_t max)
{
    long long v = fallback;
    if (text) {
        TRY(args_number(&v, name, text, min, max));
    }
    *out = (int32_t)v;
    return ST_OK;
}

enum {
    ROWS_MAX = 1 << 20,
    CONTEXT_MAX = 1 << 20,
    SLOTS_MAX = 256,
    STEPS_MAX = 1 << 16,
    PROBE_MAX = 1 << 20,
    REPLICAS_MAX = 4096,
    LEASES_MAX = 10000000
};

/* "5632x2048,2048x5632" */
static enum status parse_shapes(struct bench_options *o, const char *text)
{
    for (const char *at = text; at;) {
        int rows = 0, cols = 0, used = 0;
        if (sscanf(at, "%7dx%7d%n", &rows, &cols, &used) != 2 ||
            (at[used] != ',' && at[used] != '\0') || rows < 1 || cols < 1 || rows > ROWS_MAX ||
            cols > ROWS_MAX || o->rows.n == BENCH_LIST) {
            FAIL(ST_USER,
                 "--shape-list: expected at most %d times ROWSxCOLS (each 1 to %d) as in "
                 "5632x2048,2048x5632, found \"%s\"",
                 BENCH_LIST, ROWS_MAX, text);
        }
        o->rows.value[o->rows.n++] = rows;
        o->cols.value[o->cols.n++] = cols;
        at = at[used] == ',' ? at + used + 1 : NULL;
    }
    return ST_OK;
}

static enum status parse_matrices(struct bench_options *o, const struct texts *t)
{
    int n_ways = (t->rows || t->cols) + (t->shape_list != NULL) + (t->shape != NULL);
    if (n_ways > 1) {
        FAIL(ST_USER, "--rows and --cols, --shape-list and --shape exclude each other");
    }
    o->shape = t->shape;
    if (t->shape_list) {
        return parse_shapes(o, t->shape_list);
    }
    o->rows.n = o->cols.n = 1;
    TRY(parse_number(&o->rows.value[0], "--rows", t->rows, 5632, 1, ROWS_MAX));
    return parse_number(&o->cols.value[0], "--cols", t->cols, 2048, 1, ROWS_MAX);
}

static enum status parse_options(struct bench_options *o, const struct word *w,
                                 const struct texts *t, int default_threads)
{
    const struct settings *s = o->settings;
    char threads[16];
    int32_t probe = 0;
    snprintf(threads, sizeof threads, "%d", default_threads);
    TRY(parse_list(&o->bits, "--bits", t->bits ? t->bits : w->bits, 1, BITS_MAX));
    TRY(parse_list(&o->threads, "--threads", t->threads ? t->threads : threads, 1, 1024));
    TRY(parse_list(&o->tokens, "--tokens", t->tokens ? t->tokens : w->tokens, 1, CONTEXT_MAX));
    TRY(parse_list(&o->to, "--to", t->to ? t->to : "2", 1, BITS_MAX));
    TRY(parse_number(&o->from, "--from", t->from, 4, 1, BITS_MAX));
    TRY(parse_list(&o->context, "--context", t->context ? t->context : "128", 0, CONTEXT_MAX));
    TRY(parse_list(&o->slots, "--slots", t->slots ? t->slots : "1", 1, SLOTS_MAX));
    TRY(parse_number(&o->steps, "--steps", t->steps, 16, 1, STEPS_MAX));
    TRY(parse_number(&o->rounds, "--rounds", t->rounds, w->rounds, 1, STEPS_MAX));
    TRY(parse_number(&o->chunk, "--chunk", t->chunk, s->decode.prefill_chunk, 1, CONTEXT_MAX));
    TRY(parse_number(&o->group, "--group", t->group, 64, 32, 128));
    if (o->group != 32 && o->group != 64 && o->group != 128) {
        FAIL(ST_USER, "--group: expected 32, 64 or 128, found %d", o->group);
    }
    if (t->levels && strcmp(t->levels, "tied") != 0 && strcmp(t->levels, "free") != 0) {
        FAIL(ST_USER, "--levels: expected tied or free, found \"%s\"", t->levels);
    }
    o->free_levels = t->levels && strcmp(t->levels, "free") == 0;
    o->profile = t->profile;
    TRY(parse_number(&probe, "--probe", t->probe, (int32_t)(bandwidth_usual_bytes() >> 20), 1,
                     PROBE_MAX));
    o->probe_bytes = (size_t)probe << 20;
    if (t->temperature) {
        char *end = NULL;
        o->temperature = strtod(t->temperature, &end);
        if (end == t->temperature || *end || !(o->temperature >= 0 && o->temperature <= 100)) {
            FAIL(ST_USER, "--temperature: expected a number from 0 to 100, found \"%s\"",
                 t->temperature);
        }
    }
    if (w->run == bench_switch && (o->context.n > 1 || o->slots.n > 1)) {
        FAIL(ST_USER, "%s takes one --context and one --slots", w->title);
    }
    if (w->run == bench_service) {
        const char *tmp = getenv("TMPDIR");
        o->dir = t->dir ? t->dir : tmp && tmp[0] ? tmp : "/tmp";
        TRY(parse_number(&o->replicas, "--replicas", t->replicas, 64, 1, REPLICAS_MAX));
        TRY(parse_number(&o->leases, "--leases", t->leases, 10000, 1, LEASES_MAX));
        return parse_list(&o->pause, "--pause", t->pause ? t->pause : "0,200", 0, STEPS_MAX);
    }
    if (w->run == bench_ops) {
        return parse_matrices(o, t);
    }
    o->shape = t->shape ? t->shape : "mobilellama-1.4b";
    return ST_OK;
}

/* ---- what is printed ---- */

static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value ? value : "not set";
}

/* Facts that the numbers depend on. */
static json_t *describe(const struct word *w, const struct env *env, const struct settings *s,
                        double load, const char *share)
{
    char cpu[MACHINE_TEXT_BYTES];
    machine_cpu(cpu);
    return json_pack("{s:s, s:s, s:s, s:i, s:I, s:s, s:i, s:f, s:s, s:s, s:s}", "bench", w->name,
                     "version", provenance_version(), "cpu", cpu, "cpus", omp_get_num_procs(),
                     "cache_bytes", (json_int_t)machine_cache_bytes(), "backend", s->backend.name,
                     "ranks", env->size, "load_before", load, "share", share, "omp_wait_policy",
                     variable("OMP_WAIT_POLICY"), "omp_proc_bind", variable("OMP_PROC_BIND"));
}

static void print_tables(const struct word *w, const json_t *root)
{
    static const struct {
        const char *key, *title;
        const struct column *columns;
    } more[] = {
        {"memory", "Memory (all ranks, after a pass; highest: while the weights were made)",
         bench_memory_columns},
        {"profile", "Where a step's time goes", bench_profile_columns},
        {"profile_sum", "In all", bench_profile_sum_columns},
    };
    const json_t *row = json_array_get(json_object_get(root, "rows"), 0),
                 *shape = json_object_get(row, "shape");
    printf("%s on %s, %s %s, share %s\n", json_string_value(json_object_get(root, "version")),
           json_string_value(json_object_get(root, "cpu")),
           json_string_value(json_object_get(root, "backend")),
           json_string_value(json_object_get(row, "isa")),
           json_string_value(json_object_get(root, "share")));
    printf("%s%s%s\n", w->name, shape ? " " : "", shape ? json_string_value(shape) : "");
    report_table(root, "rows", w->columns);
    for (size_t i = 0; i < sizeof more / sizeof *more; i++) {
        if (json_object_get(root, more[i].key)) {
            printf("\n%s\n", more[i].title);
            report_table(root, more[i].key, more[i].columns);
        }
    }
}

static const struct word *find(const char *name)
{
    for (int i = 0; i < N_WORDS; i++) {
        if (strcmp(words[i].name, name) == 0) {
            return &words[i];
        }
    }
    return NULL;
}

/* An option that the word's help does not list would do nothing. */
static enum status check_known(const struct word *w, const struct arg_option *options)
{
    for (const struct arg_option *o = options; o->name; o++) {
        char line[32];
        snprintf(line, sizeof line, "\n  --%s ", o->name);
        if ((o->text ? *o->text != NULL : *o->flag) && !strstr(w->usage, line)) {
            FAIL(ST_USER, "%s takes no --%s (pmpd %s --help lists what it takes)", w->title,
                 o->name, w->title);
        }
    }
    return ST_OK;
}

/* Others at work make every number lower: said before, not after. */
static double look_around(const struct env *env)
{
    const double idle = 0.5;
    double load = machine_load();
    if (load > idle && env->rank == 0) {
        log_warn("the load average is %.2f, so others use this machine: trust ratios, not numbers "
                 "(--share asks for more of it)",
                 load);
    }
    return load;
}

static enum status run(struct env *env, const struct word *w, const struct args *a,
                       const struct texts *t)
{
    struct bench_options o = {.settings = &a->settings};
    char share[MACHINE_TEXT_BYTES] = "as it is";
    int n_threads = 0;
    TRY(env_default_threads(env, &n_threads));
    TRY(env_agree(env, parse_options(&o, w, t, n_threads ? n_threads : omp_get_max_threads())));
    double load = look_around(env);
    int before = t->share ? machine_raise_share(share) : 0;
    json_t *root = describe(w, env, &a->settings, load, share);
    enum status st = w->run(env, &o, root);
    if (t->share) {
        machine_lower_share(before);
    }
    if (st == ST_OK && env->rank == 0) {
        if (a->json) {
            json_dumpf(root, stdout, JSON_REAL_PRECISION(12));
            printf("\n");
        } else {
            print_tables(w, root);
        }
    }
    json_decref(root);
    return st;
}

enum status cmd_bench(struct env *env, int argc, char **argv)
{
    struct texts t = {0};
    const struct arg_option own[] = {
        {"shape", &t.shape, NULL},
        {"bits", &t.bits, NULL},
        {"threads", &t.threads, NULL},
        {"tokens", &t.tokens, NULL},
        {"rows", &t.rows, NULL},
        {"cols", &t.cols, NULL},
        {"shape-list", &t.shape_list, NULL},
        {"group", &t.group, NULL},
        {"levels", &t.levels, NULL},
        {"context", &t.context, NULL},
        {"slots", &t.slots, NULL},
        {"steps", &t.steps, NULL},
        {"rounds", &t.rounds, NULL},
        {"chunk", &t.chunk, NULL},
        {"temperature", &t.temperature, NULL},
        {"from", &t.from, NULL},
        {"to", &t.to, NULL},
        {"probe", &t.probe, NULL},
        {"replicas", &t.replicas, NULL},
        {"leases", &t.leases, NULL},
        {"pause", &t.pause, NULL},
        {"dir", &t.dir, NULL},
        {"profile", NULL, &t.profile},
        {"share", NULL, &t.share},
        {NULL, NULL, NULL},
    };
    struct args a;
    if (argc < 2 || strcmp(argv[1], "--help") == 0) {
        fputs(env->rank == 0 ? usage : "", stdout);
        return ST_OK;
    }
    const struct word *w = find(argv[1]);
    if (!w) {
        FAIL(ST_USER,
             "bench does not know \"%s\": expected ops, decode, prefill, switch or service",
             argv[1]);
    }
    char title[32];
    snprintf(title, sizeof title, "%s", w->title);
    argv[1] = title; /* for messages */
    TRY(args_parse(&a, env, argc - 1, argv + 1, own, 0, w->usage));
    if (a.help) {
        fputs(env->rank == 0 ? w->usage : "", stdout);
        return ST_OK;
    }
    TRY(check_known(w, own));
    return run(env, w, &a, &t);
}
