/* pmpd bench ops: products of one nested matrix, read from memory and not from the caches (copies
 * of it in turn), against the memory bandwidth measured around them and against a dense F16 matrix.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/bench/machine.h"
#include "experiments/bench/random_model.h"
#include "experiments/bench/rig.h"
#include "experiments/bench/shape.h"
#include "experiments/bench/statistics.h"

enum {
    MOST_COPIES = 4096,
    DENSE_BITS = 16,
    LEAST_TURN = 4,
    MOST_CASES = (BITS_MAX + 1) * BENCH_LIST
};

const struct column bench_ops_columns[] = {
    {"rows", "rows", 0},
    {"cols", "cols", 0},
    {"bits", "bits", 0},
    {"tokens", "tokens", 0},
    {"threads", "threads", 0},
    {"us_min", "us min", 1},
    {"us", "median", 1},
    {"us_max", "max", 1},
    {"gb_s", "GB/s", 2},
    {"bandwidth_gb_s", "memory GB/s", 2},
    {"bandwidth_fraction", "fraction", 3},
    {"gmac_s", "GMAC/s", 2},
    {"times_f16", "x F16", 2},
    {NULL, NULL, 0},
};

/* One number of bits (DENSE_BITS: the dense F16 matrix) and of tokens. */
struct op_case {
    int bits;
    int32_t n_tok;
    size_t bytes;            /* of weights that one product reads */
    int n_turn;              /* products that one sample is the mean of */
    struct samples seconds;  /* per product */
    struct samples fraction; /* of the bandwidth around the round */
    struct samples bandwidth;
};

struct op_bench {
    struct rig rig;
    struct nested_matrix *nested; /* (n_copies) */
    struct tensor *dense;         /* (n_dense) F16 */
    int n_copies, n_dense;
    int next_copy, next_dense; /* whose turn it is */
    float *x, *y;              /* backend: (most tokens, n_cols), (most tokens, n_rows) */
    uint8_t *bits;             /* backend: (most tokens) */
    int32_t n_rows, n_cols, most_tok;
    int n_cases;
    struct op_case cases[MOST_CASES];
};

/* ---- making ---- */

static int copies_for(size_t bytes, size_t total)
{
    size_t n = total / bytes + 1;
    return n > MOST_COPIES ? MOST_COPIES : (int)n;
}

static enum status make_copies(struct op_bench *b, const struct bench_options *o)
{
    struct backend *be = &b->rig.be;
    struct random_matrix m;
    uint32_t mask = rig_bits(&o->bits), least = mask & -mask; /* least: its lowest precision */
    int low = 31 - __builtin_clz(least), high = 31 - __builtin_clz(mask);
    struct matrix_range all = {0, b->n_rows, 0, b->n_cols};
    enum level_kind kind = o->free_levels ? LEVEL_FREE : LEVEL_TIED;
    enum status st = ST_OK;
    TRY(random_matrix_create(&m, b->n_rows, b->n_cols, o->group, kind, mask, 1));
    const struct nested_source *s = &m.source;
    size_t read = nested_bytes_read(s->kind, s->n_rows, s->n_cols_padded, o->group, low, least);
    size_t held = nested_bytes_read(s->kind, s->n_rows, s->n_cols_padded, o->group, high, mask);
    size_t dense = (size_t)b->n_rows * (size_t)b->n_cols * 2;
    b->n_copies = copies_for(read, o->probe_bytes / 2);
    b->n_dense = copies_for(dense, o->probe_bytes / 2);
    size_t need = (size_t)b->n_copies * held + (size_t)b->n_dense * dense,
           have = machine_available_bytes();
    if (have > 0 && need > have) {
        FAIL_GOTO(st, ST_USER, done,
                  "copies of a %d x %d matrix that outlast the caches need %.1f GB and %.1f GB are "
                  "free: ask for fewer --bits",
                  b->n_rows, b->n_cols, 1e-9 * (double)need, 1e-9 * (double)have);
    }
    TRY_GOTO(st, MEM_NEW(&b->nested, b->n_copies), done);
    TRY_GOTO(st, MEM_NEW(&b->dense, b->n_dense), done);
    for (int i = 0; i < b->n_copies; i++) {
        TRY_GOTO(st, backend_planes_load(be, &b->nested[i], s, &all, s->n_planes), done);
    }
    for (int i = 0; i < b->n_dense; i++) {
        void *block = NULL;
        TRY_GOTO(st, backend_alloc(be, &block, dense), done);
        b->dense[i] = tensor_2d(block, DT_F16, b->n_rows, b->n_cols);
    }
done:
    random_matrix_free(&m);
    return st;
}

/* Numbers around 0 for x, and for the dense matrices' halves. */
static enum status make_inputs(struct op_bench *b)
{
    struct backend *be = &b->rig.be;
    size_t n_tok = (size_t)b->most_tok, n_x = n_tok * (size_t)b->n_cols,
           n_w = (size_t)b->n_rows * (size_t)b->n_cols;
    size_t n = n_x > n_w ? n_x : n_w;
    float *host = NULL;
    void *block = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&host, n));
    for (size_t i = 0; i < n_x; i++) {
        host[i] = (float)sin(1.0 + 2.3 * (double)i);
    }
    TRY_GOTO(st, backend_alloc(be, &block, n_x * sizeof *host), done);
    b->x = block;
    TRY_GOTO(st, backend_upload(be, b->x, host, n_x * sizeof *host), done);
    TRY_GOTO(st, backend_alloc(be, &block, n_tok * (size_t)b->n_rows * sizeof *host), done);
    b->y = block;
    TRY_GOTO(st, backend_alloc(be, &block, n_tok), done);
    b->bits = block;
    for (size_t i = 0; i < n_w; i++) {
        ((uint16_t *)host)[i] = (uint16_t)(0x2000 + (i * 2654435761u >> 8 & 0x83ff));
    }
    for (int i = 0; i < b->n_dense; i++) {
        TRY_GOTO(st, backend_upload(be, b->dense[i].data, host, n_w * 2), done);
    }
done:
    mem_free(host);
    return st;
}

static enum status make_cases(struct op_bench *b, const struct bench_options *o)
{
    for (int t = 0; t < o->tokens.n; t++) {
        for (int i = 0; i <= o->bits.n; i++) { /* the dense one last */
            struct op_case *c = &b->cases[b->n_cases++];
            *c = (struct op_case){.bits = i < o->bits.n ? o->bits.value[i] : DENSE_BITS,
                                  .n_tok = o->tokens.value[t]};
            const struct nested_matrix *w = &b->nested[0];
            c->bytes = c->bits == DENSE_BITS
                           ? tensor_bytes(&b->dense[0])
                           : nested_bytes_read(w->kind, w->n_rows, w->n_cols_padded, w->group_cols,
                                               c->bits, 1u << c->bits);
            TRY(samples_create(&c->seconds, o->rounds));
            TRY(samples_create(&c->fraction, o->rounds));
            TRY(samples_create(&c->bandwidth, o->rounds));
        }
    }
    return ST_OK;
}

static void op_free(struct op_bench *b)
{
    struct backend *be = &b->rig.be;
    for (int i = 0; b->nested && i < b->n_copies; i++) {
        backend_planes_drop(be, &b->nested[i], 0);
    }
    for (int i = 0; b->dense && i < b->n_dense; i++) {
        backend_release(be, b->dense[i].data);
    }
    if (be->ops) {
        backend_release(be, b->x);
        backend_release(be, b->y);
        backend_release(be, b->bits);
    }
    for (int i = 0; i < b->n_cases; i++) {
        samples_free(&b->cases[i].seconds);
        samples_free(&b->cases[i].fraction);
        samples_free(&b->cases[i].bandwidth);
    }
    mem_free(b->nested);
    mem_free(b->dense);
    rig_close(&b->rig);
}

/* ---- timing ---- */

static enum status multiply(struct op_bench *b, const struct op_case *c)
{
    struct backend *be = &b->rig.be;
    struct how how = {.product = c->n_tok == 1 ? PRODUCT_ONE : PRODUCT_SLOTS,
                      .n_segments = 1,
                      .bits_used = 1u << c->bits};
    struct tensor x = tensor_2d(b->x, DT_F32, c->n_tok, b->n_cols);
    struct tensor y = tensor_2d(b->y, DT_F32, c->n_tok, b->n_rows);
    struct tensor bits = tensor_1d(b->bits, DT_U8, c->n_tok);
    if (c->bits == DENSE_BITS) {
        const struct tensor *w = &b->dense[b->next_dense];
        b->next_dense = (b->next_dense + 1) % b->n_dense;
        how.bits_used = 0;
        return backend_matmul_dense(be, &y, w, &x, NULL, &how);
    }
    const struct nested_matrix *w = &b->nested[b->next_copy];
    b->next_copy = (b->next_copy + 1) % b->n_copies;
    return backend_matmul_nested(be, &y, w, &bits, &x, NULL, &how);
}

/* n products, each of the next copy; seconds per product. */
static enum status one_turn(struct op_bench *b, const struct op_case *c, int n, double *seconds)
{
    uint8_t bits[256];
    memset(bits, c->bits, sizeof bits);
    for (int32_t at = 0; at < c->n_tok; at += (int32_t)sizeof bits) {
        int32_t now = c->n_tok - at < (int32_t)sizeof bits ? c->n_tok - at : (int32_t)sizeof bits;
        TRY(backend_upload(&b->rig.be, b->bits + at, bits, (size_t)now));
    }
    double start = clock_s();
    for (int i = 0; i < n; i++) {
        TRY(multiply(b, c));
    }
    TRY(backend_sync(&b->rig.be));
    *seconds = (clock_s() - start) / n;
    return ST_OK;
}

/* How many products make a sample long enough for the clock and the scheduler. */
static enum status choose_turns(struct op_bench *b)
{
    const double sample_s = 0.02;
    for (int i = 0; i < b->n_cases; i++) {
        struct op_case *c = &b->cases[i];
        int most = c->bits == DENSE_BITS ? b->n_dense : b->n_copies;
        double seconds = 0;
        TRY(one_turn(b, c, LEAST_TURN, &seconds)); /* scratch is made */
        TRY(one_turn(b, c, LEAST_TURN, &seconds));
        double n = sample_s / seconds;
        c->n_turn = n > most ? most : n < LEAST_TURN ? LEAST_TURN : (int)n;
    }
    return ST_OK;
}

static enum status run_rounds(struct op_bench *b, const struct bench_options *o)
{
    struct progress progress;
    double before, after, seconds = 0;
    int done = 0;
    TRY(choose_turns(b));
    progress_begin(&progress, "products", "samples", (double)o->rounds * b->n_cases);
    TRY(bandwidth_measure(&b->rig.bw, 1, &before));
    for (int32_t r = 0; r < o->rounds; r++) {
        for (int i = 0; i < b->n_cases; i++) {
            struct op_case *c = &b->cases[i];
            TRY(one_turn(b, c, c->n_turn, &seconds));
            TRY(bandwidth_measure(&b->rig.bw, 1, &after));
            double paired = (before + after) / 2;
            samples_add(&c->seconds, seconds);
            samples_add(&c->bandwidth, paired);
            samples_add(&c->fraction, 1e-9 * (double)c->bytes / seconds / paired);
            before = after;
            progress_update(&progress, ++done);
        }
    }
    progress_end(&progress);
    return ST_OK;
}

static enum status add_rows(struct op_bench *b, const struct bench_options *o, json_t *root)
{
    double macs = (double)b->n_rows * b->n_cols;
    int per_tok = o->bits.n + 1;
    for (int i = 0; i < b->n_cases; i++) {
        struct op_case *c = &b->cases[i], *dense = &b->cases[i / per_tok * per_tok + per_tok - 1];
        struct spread t = samples_spread(&c->seconds), f = samples_spread(&c->fraction);
        json_t *row = json_pack(
            "{s:i, s:i, s:i, s:i, s:i, s:s, s:i, s:I, s:i, s:f, s:f, s:f, s:f}", "rows",
            (int)b->n_rows, "cols", (int)b->n_cols, "bits", c->bits, "tokens", (int)c->n_tok,
            "threads", b->rig.n_threads, "isa", b->rig.be.ops->arithmetic(&b->rig.be), "group",
            (int)o->group, "bytes", (json_int_t)c->bytes, "copies",
            c->bits == DENSE_BITS ? b->n_dense : b->n_copies, "us_min", 1e6 * t.min, "us",
            1e6 * t.median, "us_max", 1e6 * t.max, "gb_s", 1e-9 * (double)c->bytes / t.median);
        json_t *more =
            json_pack("{s:f, s:f, s:f, s:f, s:f, s:f}", "bandwidth_gb_s",
                      samples_spread(&c->bandwidth).median, "bandwidth_fraction", f.median,
                      "bandwidth_fraction_min", f.min, "bandwidth_fraction_max", f.max, "gmac_s",
                      1e-9 * macs * c->n_tok / t.median, "times_f16",
                      samples_spread(&dense->seconds).median / t.median);
        json_object_update(row, more);
        json_decref(more);
        TRY(report_add(root, "rows", row));
    }
    return ST_OK;
}

static enum status run_shape(struct env *env, const struct bench_options *o, int n_threads,
                             int32_t n_rows, int32_t n_cols, json_t *root)
{
    struct op_bench *b = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&b, 1));
    b->n_rows = n_rows;
    b->n_cols = n_cols;
    for (int i = 0; i < o->tokens.n; i++) {
        b->most_tok = o->tokens.value[i] > b->most_tok ? o->tokens.value[i] : b->most_tok;
    }
    TRY_GOTO(st, rig_open_backend(&b->rig, env, o, n_threads, false), done);
    TRY_GOTO(st, make_copies(b, o), done);
    TRY_GOTO(st, make_inputs(b), done);
    TRY_GOTO(st, make_cases(b, o), done);
    TRY_GOTO(st,
             bandwidth_open(&b->rig.bw, env, n_threads, b->rig.local_rank, b->rig.n_local,
                            o->probe_bytes),
             done);
    TRY_GOTO(st, run_rounds(b, o), done);
    TRY_GOTO(st, add_rows(b, o, root), done);
done:
    op_free(b);
    mem_free(b);
    return st;
}

enum status bench_ops(struct env *env, const struct bench_options *o, json_t *root)
{
    struct shape_matrix shape[BENCH_LIST];
    int n = o->rows.n;
    if (env->size > 1) {
        FAIL(ST_USER,
             "bench ops times one rank's products; found %d ranks: leave mpirun out, or "
             "use bench decode",
             env->size);
    }
    if (o->shape) {
        struct model_config c;
        TRY(shape_get(&c, o->shape));
        n = shape_matrices(shape, &c);
    }
    for (int i = 0; !o->shape && i < n; i++) {
        shape[i] = (struct shape_matrix){o->rows.value[i], o->cols.value[i]};
    }
    for (int t = 0; t < o->threads.n; t++) {
        for (int i = 0; i < n; i++) {
            TRY(run_shape(env, o, o->threads.value[t], shape[i].n_rows, shape[i].n_cols, root));
        }
    }
    return ST_OK;
}
