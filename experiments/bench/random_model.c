/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/bench/random_model.h"

#include <math.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/bench/machine.h"
#include "experiments/bench/shape.h"

enum { PATTERN = 4093 }; /* values that repeat; a prime, so that rows and groups differ */

/* splitmix64. Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators"
 * (OOPSLA 2014), figure 17. */
static uint64_t next_u64(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* In [-1, 1). */
static double next_number(uint64_t *state)
{
    return (double)(int64_t)next_u64(state) * 0x1p-63;
}

static void fill_bytes(void *out, size_t n_bytes, uint64_t *state)
{
    for (size_t i = 0; i < n_bytes; i += sizeof(uint64_t)) {
        uint64_t v = next_u64(state);
        size_t left = n_bytes - i;
        memcpy((char *)out + i, &v, left < sizeof v ? left : sizeof v);
    }
}

/* n F16 values centre * (1 + spread * u), u in [-1, 1); centre 0: spread * u. */
static void fill_halves(uint16_t *out, size_t n, double centre, double spread, uint64_t *state)
{
    size_t first = n < PATTERN ? n : PATTERN;
    for (size_t i = 0; i < first; i++) {
        double u = spread * next_number(state);
        out[i] = f32_to_f16((float)(centre != 0 ? centre * (1 + u) : u));
    }
    for (size_t done = first; done < n;) { /* doubles, in whole patterns */
        size_t more = n - done < done ? n - done : done;
        memcpy(out + done, out, more * sizeof *out);
        done += more;
    }
}

static int highest(uint32_t bits)
{
    return 31 - __builtin_clz(bits);
}

static int32_t padded(int32_t n_cols, int32_t group)
{
    return (n_cols + group - 1) / group * group;
}

/* ---- one matrix ---- */

static size_t plane_bytes(int32_t n_rows, int32_t n_cols, int32_t group, uint32_t bits)
{
    return (size_t)n_rows * (size_t)padded(n_cols, group) / 8 * (size_t)highest(bits);
}

static size_t level_bytes(int32_t n_rows, int32_t n_cols, int32_t group, enum level_kind kind,
                          uint32_t bits)
{
    size_t values = 0;
    for (int b = 1; b <= BITS_MAX; b++) {
        if (bits >> b & 1) {
            values += level_values_per_row(kind, b, padded(n_cols, group) / group);
        }
    }
    return sizeof(uint16_t) * values * (size_t)n_rows;
}

enum status random_matrix_create(struct random_matrix *out, int32_t n_rows, int32_t n_cols,
                                 int32_t group, enum level_kind kind, uint32_t bits, uint64_t seed)
{
    INVARIANT(kind == LEVEL_TIED || kind == LEVEL_FREE);
    size_t planes = plane_bytes(n_rows, n_cols, group, bits);
    size_t levels = level_bytes(n_rows, n_cols, group, kind, bits);
    size_t groups = (size_t)n_rows * (size_t)(padded(n_cols, group) / group);
    *out = (struct random_matrix){.source = {.n_rows = n_rows,
                                             .n_cols = n_cols,
                                             .n_cols_padded = padded(n_cols, group),
                                             .group_cols = group,
                                             .n_planes = highest(bits)}};
    TRY(mem_alloc_array(&out->block, planes + levels, 1));
    out->source.planes = out->block;
    fill_bytes(out->block, planes, &seed);
    uint16_t *at = (uint16_t *)((char *)out->block + planes);
    double deviation = 1 / sqrt((double)n_cols);
    for (int b = 1; b <= BITS_MAX; b++) {
        if (!(bits >> b & 1)) {
            continue;
        }
        /* codes of b fair bits, 0..2^b - 1, have variance (4^b - 1) / 12 */
        double scale = deviation / sqrt((pow(4, b) - 1) / 12);
        out->source.kind[b] = kind;
        if (kind == LEVEL_TIED) {
            out->source.scale[b] = at;
            fill_halves(at, groups, scale, 0.1, &seed);
            at += groups;
        } else {
            out->source.alpha[b] = at;
            fill_halves(at, groups * (size_t)b, scale, 0.1, &seed);
            for (size_t i = 0; i < groups * (size_t)b; i++) { /* plane p weighs 2^(b - 1 - p) / 2 */
                float v = f16_to_f32(at[i]);
                at[i] = f32_to_f16(ldexpf(v, b - 2 - (int)(i % (size_t)b)));
            }
            at += groups * (size_t)b;
        }
        out->source.offset[b] = at;
        fill_halves(at, groups, 0, 0.1 * deviation, &seed);
        at += groups;
    }
    return ST_OK;
}

void random_matrix_free(struct random_matrix *m)
{
    mem_free(m->block);
    *m = (struct random_matrix){0};
}

/* ---- a model ---- */

void random_model_nest(struct model_config *config, int32_t group, uint32_t bits)
{
    config->nested = config->nested_head = true;
    config->tied_head = false;
    config->group_cols = group;
    config->n_planes = highest(bits);
}

/* Random sources, one of each shape. */
struct sources {
    enum level_kind kind;
    uint32_t bits;
    int n;
    struct random_matrix matrix[SHAPE_MATRICES_MAX];
};

static enum status get_source(struct sources *s, const struct nested_source **out, int32_t n_rows,
                              int32_t n_cols, int32_t group)
{
    for (int i = 0; i < s->n; i++) {
        *out = &s->matrix[i].source;
        if ((*out)->n_rows == n_rows && (*out)->n_cols == n_cols) {
            return ST_OK;
        }
    }
    INVARIANT(s->n < SHAPE_MATRICES_MAX);
    TRY(random_matrix_create(&s->matrix[s->n], n_rows, n_cols, group, s->kind, s->bits,
                             (uint64_t)s->n));
    *out = &s->matrix[s->n++].source;
    return ST_OK;
}

/* n numbers around centre in the backend's memory. */
static enum status make_vector(struct weights *w, struct tensor *out, int32_t n, float centre)
{
    void *block = NULL;
    float *host = NULL;
    uint64_t seed = (uint64_t)n;
    enum status st = ST_OK;
    TRY(MEM_NEW(&host, n));
    for (int32_t i = 0; i < n; i++) {
        host[i] = centre + 0.02f * (float)next_number(&seed);
    }
    TRY_GOTO(st, weights_new_block(w, &block, (size_t)n * sizeof *host), done);
    TRY_GOTO(st, backend_upload(w->be, block, host, (size_t)n * sizeof *host), done);
    *out = tensor_1d(block, DT_F32, n);
done:
    mem_free(host);
    return st;
}

static enum status make_norm(struct weights *w, struct norm_weights *out)
{
    TRY(make_vector(w, &out->gain, w->config.hidden, 1));
    if (w->config.norm == NORM_LAYER) {
        TRY(make_vector(w, &out->bias, w->config.hidden, 0));
    }
    return ST_OK;
}

static enum status make_linear(struct weights *w, struct sources *s, struct linear *out,
                               int32_t n_rows, int32_t n_cols, const struct matrix_range *range,
                               bool biased)
{
    const struct nested_source *source = NULL;
    TRY(get_source(s, &source, n_rows, n_cols, w->config.group_cols));
    out->is_nested = true;
    out->n_rows = n_rows;
    out->n_cols = n_cols;
    out->n_cols_padded = source->n_cols_padded;
    if (biased) {
        TRY(make_vector(w, &out->bias, range->row_end - range->row_begin, 0));
    }
    TRY(backend_planes_load(w->be, &out->nested, source, range, source->n_planes));
    return ST_OK;
}

static enum status make_embedding(struct weights *w)
{
    const struct model_config *c = &w->config;
    size_t n = (size_t)c->vocab * (size_t)c->hidden;
    void *block = NULL;
    uint16_t *host = NULL;
    uint64_t seed = 1;
    enum status st = ST_OK;
    TRY(MEM_NEW(&host, n));
    fill_halves(host, n, 0, 1, &seed);
    TRY_GOTO(st, weights_new_block(w, &block, n * sizeof *host), done);
    TRY_GOTO(st, backend_upload(w->be, block, host, n * sizeof *host), done);
    w->embed = tensor_2d(block, DT_F16, c->vocab, c->hidden);
done:
    mem_free(host);
    return st;
}

static enum status make_layer(struct weights *w, struct sources *s, struct layer_weights *l)
{
    const struct model_config *c = &w->config;
    TRY(make_norm(w, &l->attn_norm));
    if (model_has_norm(c, NORM_MLP)) {
        TRY(make_norm(w, &l->mlp_norm));
    }
    for (int r = 0; r < M_N_ROLES; r++) {
        enum matrix_role role = (enum matrix_role)r;
        int32_t n_rows, n_cols;
        if (!model_has_role(c, role)) {
            continue;
        }
        model_matrix_shape(c, role, &n_rows, &n_cols);
        struct matrix_range range = weights_role_range(c, &w->shard, role);
        TRY(make_linear(w, s, &l->matrix[r], n_rows, n_cols, &range, c->biased >> r & 1));
    }
    return ST_OK;
}

enum status random_model_load(struct weights *out, struct backend *be,
                              const struct model_config *config, const struct model_shard *shard,
                              enum level_kind kind, uint32_t bits)
{
    enum status st = ST_OK;
    struct sources s = {.kind = kind, .bits = bits};
    struct progress progress;
    struct matrix_range rows = {shard->vocab_begin, shard->vocab_end, 0, config->hidden};
    *out = (struct weights){.be = be, .config = *config, .shard = *shard};
    progress_begin(&progress, "making random weights", "layers", config->n_layers);
    TRY_GOTO(st, MEM_NEW(&out->layers, config->n_layers), done);
    TRY_GOTO(st, make_embedding(out), done);
    TRY_GOTO(st, make_norm(out, &out->final_norm), done);
    TRY_GOTO(
        st,
        make_linear(out, &s, &out->head, config->vocab, config->hidden, &rows, config->head_bias),
        done);
    for (int i = 0; i < config->n_layers; i++) {
        TRY_GOTO(st, make_layer(out, &s, &out->layers[i]), done);
        progress_update(&progress, i + 1);
    }
    progress_end(&progress);
done:
    for (int i = 0; i < s.n; i++) {
        random_matrix_free(&s.matrix[i]);
    }
    machine_trim();
    if (st != ST_OK) {
        progress_drop(&progress);
        weights_free(out);
    }
    return st;
}

/* ---- bytes ---- */

static void add_resident(struct model_bytes *out, const struct nested_matrix *w)
{
    size_t planes = (size_t)w->n_rows * (size_t)w->n_cols_padded / 8 * (size_t)w->n_resident;
    uint32_t held = 0;
    for (int b = 1; b <= w->n_resident; b++) {
        held |= (w->kind[b] != LEVEL_NONE ? 1u : 0u) << b;
    }
    out->planes += planes;
    out->levels += nested_bytes_read(w->kind, w->n_rows, w->n_cols_padded, w->group_cols,
                                     w->n_resident, held) -
                   planes;
}

void random_model_bytes(struct model_bytes *out, const struct weights *w)
{
    *out = (struct model_bytes){.embed = tensor_bytes(&w->embed)};
    for (int l = 0; l < w->config.n_layers; l++) {
        for (int r = 0; r < M_N_ROLES; r++) {
            if (w->layers[l].matrix[r].is_nested) {
                add_resident(out, &w->layers[l].matrix[r].nested);
            }
        }
    }
    add_resident(out, &w->head.nested);
}

void random_model_estimate(struct model_bytes *out, size_t *while_making,
                           const struct model_config *c, enum level_kind kind, uint32_t bits)
{
    struct shape_matrix shape[SHAPE_MATRICES_MAX];
    int n = shape_matrices(shape, c);
    *out = (struct model_bytes){.embed = (size_t)c->vocab * (size_t)c->hidden * 2};
    *while_making = 0;
    for (int i = 0; i < n; i++) {
        *while_making += plane_bytes(shape[i].n_rows, shape[i].n_cols, c->group_cols, bits) +
                         level_bytes(shape[i].n_rows, shape[i].n_cols, c->group_cols, kind, bits);
    }
    for (int r = 0; r < M_N_ROLES; r++) {
        int32_t n_rows = 0, n_cols = 0;
        if (model_has_role(c, (enum matrix_role)r)) {
            model_matrix_shape(c, (enum matrix_role)r, &n_rows, &n_cols);
            size_t n_layers = (size_t)c->n_layers;
            out->planes += n_layers * plane_bytes(n_rows, n_cols, c->group_cols, bits);
            out->levels += n_layers * level_bytes(n_rows, n_cols, c->group_cols, kind, bits);
        }
    }
    out->planes += plane_bytes(c->vocab, c->hidden, c->group_cols, bits);
    out->levels += level_bytes(c->vocab, c->hidden, c->group_cols, kind, bits);
}
