/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/calibrate.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"

/* Tiles of a product: rows of activations, rows of weights. */
enum { TILE_TOK = 128, TILE_ROWS = 256 };

/* A pass over all windows takes a block as far as it can go with the matrices known so far. */
enum stage {
    STAGE_BEGIN, /* nothing done yet */
    STAGE_QKV,   /* -> input of q, k, v */
    STAGE_O,     /* with q, k, v -> input of o, kept in mid */
    STAGE_MLP,   /* with o: the residual; -> input of gate and up */
    STAGE_DOWN,  /* with gate and up -> input of down, kept in mid */
    STAGE_END,   /* with down: the residual */
    STAGE_HEAD   /* -> input of the head */
};
static const enum stage stage_of_role[M_N_ROLES] = {STAGE_QKV, STAGE_QKV, STAGE_QKV, STAGE_O,
                                                    STAGE_MLP, STAGE_MLP, STAGE_DOWN};

struct calibrator {
    const struct model_config *config; /* borrowed, as the next two */
    const struct checkpoint *ckpt;
    const struct windows *windows;
    struct calibrator_options opt;
    struct backend be;
    int layer;        /* in which the pass before ended */
    enum stage stage; /* that was done last */
    struct hessian moments;
    float *weights[M_N_ROLES];     /* (n_rows, n_cols) owned: of this layer, where put */
    float *bias[M_N_ROLES];        /* (n_rows) owned: NULL where there is none */
    float *norm[MODEL_N_NORMS];    /* (2, hidden) owned: gain and bias, of this layer */
    float *x;                      /* (tokens, hidden) owned */
    float *mid;                    /* (tokens, mid_width) owned */
    int32_t mid_width, longest;    /* of the windows */
    float *h, *q, *k, *v, *up, *y; /* (longest, width of each) cut from block */
    float *block;                  /* owned */
    int32_t *place;                /* (2, longest) owned: slot and position in a window */
    float *scores;                 /* (threads, TILE_TOK, longest) owned */
    struct rope_table rope;
    void *rope_block; /* owned (backend) */
    struct calibrator_times times;
};

/* ---- creation ---- */

static enum status make_rope(struct calibrator *c)
{
    const struct model_config *m = c->config;
    int32_t half = m->rot_dim / 2;
    size_t n = (size_t)c->longest * (size_t)half;
    double *frequency = NULL;
    TRY(backend_alloc(&c->be, &c->rope_block, 2 * n * sizeof(float)));
    TRY(MEM_NEW(&frequency, half));
    rope_frequencies(frequency, m->rope_theta, m->rot_dim, &m->rope_scaling);
    float *cosine = c->rope_block, *sine = cosine + n;
    for (int32_t p = 0; p < c->longest; p++) {
        for (int32_t i = 0; i < half; i++) {
            double angle = p * frequency[i];
            cosine[(size_t)p * (size_t)half + (size_t)i] = (float)cos(angle);
            sine[(size_t)p * (size_t)half + (size_t)i] = (float)sin(angle);
        }
    }
    mem_free(frequency);
    c->rope.cos = tensor_2d(cosine, DT_F32, c->longest, half);
    c->rope.sin = tensor_2d(sine, DT_F32, c->longest, half);
    c->rope.rot_dim = m->rot_dim;
    return ST_OK;
}

static enum status make_places(struct calibrator *c)
{
    size_t scores;
    TRY(MEM_NEW(&c->place, 2 * (size_t)c->longest));
    for (int32_t i = 0; i < c->longest; i++) {
        c->place[c->longest + i] = i;
    }
    TRY(mem_mul(&scores, (size_t)TILE_TOK * (size_t)c->longest, (size_t)c->opt.n_threads));
    return MEM_NEW(&c->scores, scores);
}

static enum status make_scratch(struct calibrator *c)
{
    const struct model_config *m = c->config;
    size_t n = (size_t)c->longest, hidden = (size_t)m->hidden, ffn = (size_t)m->ffn;
    size_t heads = (size_t)m->n_heads * (size_t)m->head_dim;
    size_t kv = (size_t)m->n_kv_heads * (size_t)m->head_dim, total;
    TRY(mem_mul(&total, n, 2 * hidden + heads + 2 * kv + ffn));
    TRY(MEM_NEW(&c->block, total));
    c->h = c->block;
    c->y = c->h + n * hidden;
    c->q = c->y + n * hidden;
    c->k = c->q + n * heads;
    c->v = c->k + n * kv;
    c->up = c->v + n * kv;
    return ST_OK;
}

/* Embeddings as the nested model stores them: F16. */
static enum status embed_all(struct calibrator *c)
{
    const struct model_config *m = c->config;
    struct tensor table;
    TRY(checkpoint_get_shape(c->ckpt, MODEL_EMBED_NAME, m->vocab, m->hidden, &table));
    size_t n = (size_t)m->hidden, row_bytes = n * dtype_bytes(table.dtype);
    for (size_t i = 0; i < c->windows->begin[c->windows->n]; i++) {
        float *x = c->x + i * n;
        floats_from(x, (const char *)table.data + (size_t)c->windows->ids[i] * row_bytes,
                    table.dtype, n);
        for (size_t j = 0; j < n; j++) {
            x[j] = f16_to_f32(f32_to_f16(x[j]));
        }
    }
    return ST_OK;
}

static enum status create(struct calibrator *c)
{
    const struct model_config *m = c->config;
    size_t tokens = c->windows->begin[c->windows->n], n_x, n_mid;
    int32_t heads = m->n_heads * m->head_dim;
    c->mid_width = heads > m->ffn ? heads : m->ffn;
    for (int32_t i = 0; i < c->windows->n; i++) {
        int32_t n = windows_length(c->windows, i);
        c->longest = n > c->longest ? n : c->longest;
    }
    TRY(mem_mul(&n_x, tokens, (size_t)m->hidden));
    TRY(mem_mul(&n_mid, tokens, (size_t)c->mid_width));
    enum status st = MEM_NEW(&c->x, n_x);
    st = st ? st : MEM_NEW(&c->mid, n_mid);
    if (st != ST_OK) {
        return status_prefix(st, "activations of %zu calibration tokens, %.1f GB: ", tokens,
                             4e-9 * ((double)n_x + (double)n_mid));
    }
    for (int norm = 0; norm < MODEL_N_NORMS; norm++) {
        TRY(MEM_NEW(&c->norm[norm], 2 * (size_t)m->hidden));
    }
    TRY(backend_open(&c->be, "cpu", &(struct backend_options){.n_threads = c->opt.n_threads}));
    hessian_blas_begin();
    TRY(make_scratch(c));
    TRY(make_places(c));
    TRY(make_rope(c));
    return embed_all(c);
}

enum status calibrator_create(struct calibrator **out, const struct model_config *config,
                              const struct checkpoint *ckpt, const struct windows *windows,
                              const struct calibrator_options *options)
{
    struct calibrator *c;
    *out = NULL;
    TRY(mem_alloc_array((void **)&c, 1, sizeof *c));
    *c = (struct calibrator){.config = config,
                             .ckpt = ckpt,
                             .windows = windows,
                             .opt = *options,
                             .layer = -1,
                             .stage = STAGE_END};
    enum status st = create(c);
    if (st != ST_OK) {
        calibrator_destroy(&c);
        return st;
    }
    *out = c;
    return ST_OK;
}

void calibrator_destroy(struct calibrator **cal)
{
    struct calibrator *c = *cal;
    if (!c) {
        return;
    }
    if (c->be.ops) {
        backend_release(&c->be, c->rope_block);
    }
    backend_close(&c->be);
    hessian_free(&c->moments);
    for (int role = 0; role < M_N_ROLES; role++) {
        mem_free(c->weights[role]);
        mem_free(c->bias[role]);
    }
    for (int norm = 0; norm < MODEL_N_NORMS; norm++) {
        mem_free(c->norm[norm]);
    }
    mem_free(c->x);
    mem_free(c->mid);
    mem_free(c->block);
    mem_free(c->place);
    mem_free(c->scores);
    mem_free(c);
    *cal = NULL;
}

/* ---- the forward of a block ---- */

/* y (n_tok, rows) = x (n_tok, cols) W^T + bias with the matrix of `role`; tiles do not know of
 * threads. */
static void multiply(struct calibrator *c, enum matrix_role role, float *y, const float *x,
                     int32_t n_tok)
{
    int32_t rows, cols;
    model_matrix_shape(c->config, role, &rows, &cols);
    const float *w = c->weights[role], *bias = c->bias[role];
    INVARIANT(w);
#pragma omp parallel for collapse(2) num_threads(c->opt.n_threads) schedule(dynamic, 1)
    for (int32_t t = 0; t < n_tok; t += TILE_TOK) {
        for (int32_t r = 0; r < rows; r += TILE_ROWS) {
            int32_t n = n_tok - t < TILE_TOK ? n_tok - t : TILE_TOK;
            int32_t m = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            float *to = y + (size_t)t * (size_t)rows + r;
            blas_gemm_bt(n, m, cols, 1.0f, x + (size_t)t * (size_t)cols, cols,
                         w + (size_t)r * (size_t)cols, cols, 0.0f, to, rows);
            for (int32_t i = 0; bias && i < n; i++) {
                for (int32_t j = 0; j < m; j++) {
                    to[(size_t)i * (size_t)rows + (size_t)j] += bias[r + j];
                }
            }
        }
    }
    c->times.forward_flop += 2.0 * n_tok * (double)rows * cols;
}

static void add_moments(struct calibrator *c, const float *x, int32_t n_tok)
{
    double begin = clock_s(), n = c->moments.n;
    if (!c->moments.h) {
        return; /* a pass on the way to another */
    }
    hessian_add(&c->moments, x, n_tok, c->opt.n_threads);
    double spent = clock_s() - begin;
    c->times.moments_s += spent;
    c->times.forward_s -= spent;
    c->times.moments_flop += n * n * n_tok; /* half of the products: the upper triangle */
}

static enum status normalise(struct calibrator *c, float *y, float *x, enum model_norm norm,
                             int32_t n_tok)
{
    const struct model_config *m = c->config;
    struct tensor from = tensor_2d(x, DT_F32, n_tok, m->hidden), to = from;
    struct tensor gain = tensor_1d(c->norm[norm], DT_F32, m->hidden), bias = gain;
    to.data = y;
    bias.data = c->norm[norm] + m->hidden;
    if (m->norm == NORM_LAYER) {
        return backend_layernorm(&c->be, &to, &from, &gain, &bias, m->norm_eps);
    }
    return backend_rmsnorm(&c->be, &to, &from, &gain, m->norm_eps);
}

/* The rows [begin, end) of a block of scores become softmax over what they may see. */
static void softmax_rows(float *scores, int32_t begin, int32_t end)
{
    for (int32_t i = begin; i < end; i++) {
        float *s = scores + (size_t)(i - begin) * (size_t)end, max = s[0], sum = 0;
        for (int32_t j = 1; j <= i; j++) {
            max = s[j] > max ? s[j] : max;
        }
        for (int32_t j = 0; j <= i; j++) {
            s[j] = expf(s[j] - max);
            sum += s[j];
        }
        for (int32_t j = 0; j <= i; j++) {
            s[j] /= sum;
        }
        memset(s + i + 1, 0, (size_t)(end - i - 1) * sizeof *s);
    }
}

/* Query rows [begin, end) of one head of one window. */
static void attend_rows(struct calibrator *c, float *y, float *scores, int32_t head, int32_t begin,
                        int32_t end)
{
    const struct model_config *m = c->config;
    int32_t d = m->head_dim, wide = m->n_heads * d, narrow = m->n_kv_heads * d, n = end - begin;
    int32_t kv = head / (m->n_heads / m->n_kv_heads) * d;
    size_t at = (size_t)begin * (size_t)wide + (size_t)(head * d);
    blas_gemm_bt(n, end, d, (float)(1.0 / sqrt((double)d)), c->q + at, wide, c->k + kv, narrow,
                 0.0f, scores, end);
    softmax_rows(scores, begin, end);
    blas_gemm(n, d, end, 1.0f, scores, end, c->v + kv, narrow, 0.0f, y + at, wide);
}

/* One window alone: its tokens at positions 0..n_tok. */
static enum status attend(struct calibrator *c, float *y, int32_t n_tok)
{
    const struct model_config *m = c->config;
    int32_t *place = c->place;
    struct token_place at = {.slot = tensor_1d(place, DT_I32, n_tok),
                             .pos = tensor_1d(place + c->longest, DT_I32, n_tok),
                             .kv_row = tensor_1d(place + c->longest, DT_I32, n_tok),
                             .max_pos = n_tok - 1};
    struct tensor q = tensor_3d(c->q, DT_F32, n_tok, m->n_heads, m->head_dim);
    struct tensor k = tensor_3d(c->k, DT_F32, n_tok, m->n_kv_heads, m->head_dim);
    TRY(backend_rope(&c->be, &q, &k, &at, &c->rope));
    TRY(backend_sync(&c->be));
    size_t one = (size_t)TILE_TOK * (size_t)c->longest;
#pragma omp parallel for collapse(2) num_threads(c->opt.n_threads) schedule(dynamic, 1)
    for (int32_t head = 0; head < m->n_heads; head++) {
        for (int32_t t = 0; t < n_tok; t += TILE_TOK) {
            attend_rows(c, y, c->scores + (size_t)omp_get_thread_num() * one, head, t,
                        n_tok - t < TILE_TOK ? n_tok : t + TILE_TOK);
        }
    }
    c->times.forward_flop += 2.0 * n_tok * (double)n_tok * m->n_heads * m->head_dim;
    return ST_OK;
}

static enum status add_residual(struct calibrator *c, float *x, float *y, int32_t n_tok)
{
    struct tensor to = tensor_2d(x, DT_F32, n_tok, c->config->hidden), from = to;
    from.data = y;
    return backend_add_parts(&c->be, &to, &from, NULL);
}

/* mid = what down reads: act(gate) up, or act(up) where there is no gate. */
static enum status inner(struct calibrator *c, float *mid, int32_t n_tok)
{
    const struct model_config *m = c->config;
    struct tensor out = tensor_2d(mid, DT_F32, n_tok, m->ffn), up = out;
    up.data = c->up;
    if (!model_has_role(m, M_GATE)) {
        multiply(c, M_UP, mid, c->h, n_tok);
        return backend_activate(&c->be, &out, &out, m->act);
    }
    multiply(c, M_GATE, mid, c->h, n_tok);
    multiply(c, M_UP, c->up, c->h, n_tok);
    return backend_glu(&c->be, &out, &out, &up, m->act);
}

/* One stage of one window: x (n_tok, hidden) is the residual stream, mid (n_tok, ...) what o or
 * down reads. This is the model's block, cut where a matrix must be known. In parallel blocks the
 * MLP reads the norm of what attention read, so o is added only when the MLP has read it. */
static enum status forward(struct calibrator *c, enum stage stage, float *x, float *mid,
                           int32_t n_tok)
{
    bool parallel = c->config->parallel;
    enum model_norm mlp_norm = parallel ? NORM_ATTENTION : NORM_MLP;
    switch (stage) {
    case STAGE_BEGIN:
        return ST_OK;
    case STAGE_QKV:
        TRY(normalise(c, c->h, x, NORM_ATTENTION, n_tok));
        add_moments(c, c->h, n_tok);
        return ST_OK;
    case STAGE_O:
        TRY(normalise(c, c->h, x, NORM_ATTENTION, n_tok));
        multiply(c, M_Q, c->q, c->h, n_tok);
        multiply(c, M_K, c->k, c->h, n_tok);
        multiply(c, M_V, c->v, c->h, n_tok);
        TRY(attend(c, mid, n_tok));
        add_moments(c, mid, n_tok);
        return ST_OK;
    case STAGE_MLP:
        if (!parallel) {
            multiply(c, M_O, c->y, mid, n_tok);
            TRY(add_residual(c, x, c->y, n_tok));
        }
        TRY(normalise(c, c->h, x, mlp_norm, n_tok));
        add_moments(c, c->h, n_tok);
        return ST_OK;
    case STAGE_DOWN:
        TRY(normalise(c, c->h, x, mlp_norm, n_tok));
        if (parallel) {
            multiply(c, M_O, c->y, mid, n_tok);
            TRY(add_residual(c, x, c->y, n_tok));
        }
        TRY(inner(c, mid, n_tok));
        add_moments(c, mid, n_tok);
        return ST_OK;
    case STAGE_END:
        multiply(c, M_DOWN, c->y, mid, n_tok);
        return add_residual(c, x, c->y, n_tok);
    case STAGE_HEAD:
        TRY(normalise(c, c->h, x, NORM_FINAL, n_tok));
        add_moments(c, c->h, n_tok);
        return ST_OK;
    }
    return ST_OK;
}

/* ---- passes ---- */

static enum status read_vector(struct calibrator *c, float *out, const char *name, int32_t n)
{
    struct tensor t;
    TRY(checkpoint_get_shape(c->ckpt, name, n, 0, &t));
    floats_from(out, t.data, t.dtype, (size_t)n);
    return ST_OK;
}

static enum status read_norm(struct calibrator *c, int layer, enum model_norm norm)
{
    char name[MODEL_NAME_BYTES];
    int32_t hidden = c->config->hidden;
    if (!model_has_norm(c->config, norm)) {
        return ST_OK;
    }
    model_norm_name(name, c->config, layer, norm);
    TRY(read_vector(c, c->norm[norm], name, hidden));
    if (c->config->norm == NORM_LAYER) {
        model_norm_bias_name(name, c->config, layer, norm);
        TRY(read_vector(c, c->norm[norm] + hidden, name, hidden));
    }
    return ST_OK;
}

static enum status read_bias(struct calibrator *c, int layer, enum matrix_role role)
{
    char name[MODEL_NAME_BYTES], full[MODEL_NAME_BYTES + 16];
    int32_t rows, cols;
    model_matrix_shape(c->config, role, &rows, &cols);
    model_matrix_name(name, c->config, layer, role);
    snprintf(full, sizeof full, "%s.bias", name);
    TRY(MEM_NEW(&c->bias[role], rows));
    return read_vector(c, c->bias[role], full, rows);
}

static enum status begin_layer(struct calibrator *c, int layer)
{
    c->layer = layer;
    c->stage = STAGE_BEGIN;
    for (int role = 0; role < M_N_ROLES; role++) {
        mem_free(c->weights[role]);
        mem_free(c->bias[role]);
        c->weights[role] = c->bias[role] = NULL;
        if (layer < c->config->n_layers && c->config->biased >> role & 1) {
            TRY(read_bias(c, layer, (enum matrix_role)role));
        }
    }
    if (layer == c->config->n_layers) {
        return read_norm(c, 0, NORM_FINAL);
    }
    TRY(read_norm(c, layer, NORM_ATTENTION));
    return read_norm(c, layer, NORM_MLP);
}

/* Columns of the input whose second moments the stage collects. */
static int32_t moments_width(const struct calibrator *c, enum stage stage)
{
    int32_t rows, cols;
    enum matrix_role role = stage == STAGE_O ? M_O : stage == STAGE_DOWN ? M_DOWN : M_Q;
    model_matrix_shape(c->config, role, &rows, &cols);
    return cols;
}

static enum status run_windows(struct calibrator *c, enum stage stage)
{
    size_t hidden = (size_t)c->config->hidden, width = (size_t)c->mid_width;
    for (int32_t i = 0; i < c->windows->n; i++) {
        size_t at = c->windows->begin[i];
        TRY(forward(c, stage, c->x + at * hidden, c->mid + at * width,
                    windows_length(c->windows, i)));
    }
    return ST_OK;
}

/* collect: with second moments of the input that the stage ends at. */
static enum status run_stage(struct calibrator *c, enum stage stage, bool collect)
{
    double begin = clock_s();
    hessian_free(&c->moments);
    c->stage = stage;
    if (collect) {
        TRY(hessian_create(&c->moments, moments_width(c, stage)));
    } else if (stage == STAGE_QKV) {
        return ST_OK;
    }
    TRY(run_windows(c, stage));
    c->times.forward_s += clock_s() - begin;
    if (!collect) {
        return ST_OK;
    }
    double n = c->moments.n, factor = clock_s();
    TRY(hessian_finish(&c->moments, c->opt.damp));
    c->times.factor_s += clock_s() - factor;
    c->times.factor_flop += 2.0 / 3.0 * n * n * n;
    return ST_OK;
}

/* Runs on to (layer, stage), which alone collects. */
static enum status advance(struct calibrator *c, int layer, enum stage want)
{
    while (c->layer != layer || c->stage != want) {
        INVARIANT(c->layer < layer || (c->layer == layer && c->stage < want));
        if (c->stage == STAGE_END) {
            TRY(begin_layer(c, c->layer + 1));
            continue;
        }
        enum stage next = c->layer == c->config->n_layers ? STAGE_HEAD : c->stage + 1;
        TRY(run_stage(c, next, c->layer == layer && next == want));
    }
    return ST_OK;
}

enum status calibrator_moments(struct calibrator *c, int layer, enum matrix_role role,
                               const struct hessian **out)
{
    *out = &c->moments;
    return advance(c, layer, layer == c->config->n_layers ? STAGE_HEAD : stage_of_role[role]);
}

enum status calibrator_put(struct calibrator *c, int layer, enum matrix_role role,
                           const struct nested_source *w)
{
    if (c->layer != layer) { /* fitted in an earlier run: nobody asked for its moments */
        TRY(advance(c, layer, STAGE_BEGIN));
    }
    int bits = nested_max_bits(w);
    size_t n = (size_t)w->n_cols;
    float *to = NULL;
    TRY(MEM_NEW(&to, (size_t)w->n_rows * n));
#pragma omp parallel for num_threads(c->opt.n_threads)
    for (int32_t row = 0; row < w->n_rows; row++) {
        float table[LEVELS_MAX];
        for (int32_t col = 0; col < w->n_cols; col++) {
            if (col % w->group_cols == 0) {
                bitplane_level_table(table, w, row, col / w->group_cols, bits);
            }
            to[(size_t)row * n + (size_t)col] = table[bitplane_code(w, row, col, bits)];
        }
    }
    mem_free(c->weights[role]);
    c->weights[role] = to;
    return ST_OK;
}

struct calibrator_times calibrator_times(const struct calibrator *c)
{
    return c->times;
}
