/* cpu: threads (OpenMP) over rows, heads and tokens, inner loops by instruction set (cpu.h). Owns
 * the backend's life, its table, and the operations that are too cheap for a file of their own.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#include "core/candidates.h"
#include "core/mem.h"
#include "core/sampler.h"
#include "kernels/kernels.h"

enum { MAX_THREADS = 1024, SUM_BLOCK = 128 };

/* The instruction set called name; "auto": the widest that this processor has. */
static enum status choose_isa(const struct cpu_isa **out, const char *name)
{
    const struct cpu_isa *const known[] = {cpu_isa_avx512(), cpu_isa_avx2(), &cpu_isa_scalar};
    char here[64] = "";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!known[i]) {
            continue;
        }
        if (strcmp(name, "auto") == 0 || strcmp(name, known[i]->name) == 0) {
            *out = known[i];
            return ST_OK;
        }
        strcat(here, " ");
        strcat(here, known[i]->name);
    }
    FAIL(ST_UNSUPPORTED,
         "the instruction set \"%s\" is not to be had on this processor: expected auto or one of%s",
         name, here);
}

static enum status cpu_open(struct backend *be, const struct backend_options *options)
{
    int n_threads = options->n_threads;
    if (n_threads < 0 || n_threads > MAX_THREADS) {
        FAIL(ST_USER, "%d CPU threads asked for, expected 0 (all that this process may use) to %d",
             n_threads, MAX_THREADS);
    }
    if (n_threads == 0) {
        n_threads = omp_get_max_threads(); /* knows the affinity mask and OMP_NUM_THREADS */
    }
    const struct cpu_isa *isa = NULL;
    TRY(choose_isa(&isa, options->isa ? options->isa : "auto"));
    struct cpu *cpu = NULL;
    TRY(MEM_NEW(&cpu, 1));
    cpu->isa = isa;
    cpu->n_threads = n_threads > 0 ? n_threads : 1;
    be->impl = cpu;
    return ST_OK;
}

static void cpu_close(struct backend *be)
{
    struct cpu *cpu = be->impl;
    mem_free(cpu->rows.data);
    mem_free(cpu->scores.data);
    mem_free(cpu);
}

static const char *cpu_arithmetic(const struct backend *be)
{
    const struct cpu *cpu = be->impl;
    return cpu->isa->name;
}

int cpu_threads(const struct cpu *cpu, size_t work)
{
    /* Waking a team costs a few microseconds, in which one core does about this much. */
    const size_t worth_a_team = 32768;
    return work < worth_a_team ? 1 : cpu->n_threads;
}

size_t cpu_scratch_width(size_t n_floats)
{
    return (n_floats + 31) / 32 * 32;
}

static void add_floats(float *to, const float *from, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        to[i] += from[i];
    }
}

static enum status cpu_add_parts(struct backend *be, struct tensor *x, const struct tensor *parts,
                                 const struct tensor *bias)
{
    (void)be;
    size_t n_tok = (size_t)x->dims[0], n = (size_t)x->dims[1], all = n_tok * n;
    size_t n_parts = parts->n_dims == 3 ? (size_t)parts->dims[0] : 1;
    const float *part = parts->data, *b = bias ? bias->data : NULL;
    /* The order is fixed to the bit by the header: part by part, then the bias, then x. A block of
     * sums at a time, so that neighbours are added together. */
    for (size_t t = 0; t < n_tok; t++) {
        for (size_t begin = 0; begin < n; begin += SUM_BLOCK) {
            size_t n_now = n - begin < SUM_BLOCK ? n - begin : SUM_BLOCK;
            float *to = (float *)x->data + t * n + begin, sum[SUM_BLOCK];
            memcpy(sum, part + t * n + begin, n_now * sizeof *sum);
            for (size_t p = 1; p < n_parts; p++) {
                add_floats(sum, part + p * all + t * n + begin, n_now);
            }
            if (b) {
                add_floats(sum, b + begin, n_now);
            }
            add_floats(to, sum, n_now);
        }
    }
    return ST_OK;
}

static enum status cpu_embed(struct backend *be, struct tensor *x, const struct tensor *table,
                             const struct tensor *ids)
{
    const struct cpu *cpu = be->impl;
    TRY(host_check_ids(ids, table->dims[0]));
    const int32_t *id = ids->data;
    size_t n = (size_t)x->dims[1], row_bytes = n * dtype_bytes(table->dtype);
    for (int32_t t = 0; t < x->dims[0]; t++) {
        const char *row = (const char *)table->data + (size_t)id[t] * row_bytes;
        cpu->isa->convert((float *)x->data + (size_t)t * n, row, table->dtype, x->dims[1]);
    }
    return ST_OK;
}

static enum status cpu_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                               const struct tensor *gain, float eps)
{
    const struct cpu *cpu = be->impl;
    int32_t n = x->dims[1], n_tok = x->dims[0];
    const float *g = gain->data;
    int n_threads = cpu_threads(cpu, tensor_count(x));
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int32_t t = 0; t < n_tok; t++) {
        const float *from = (const float *)x->data + (size_t)t * (size_t)n;
        float *to = (float *)y->data + (size_t)t * (size_t)n;
        float mean = cpu->isa->dot(from, DT_F32, from, n) / (float)n;
        float inverse = 1.0f / sqrtf(mean + eps);
        for (int32_t i = 0; i < n; i++) {
            to[i] = from[i] * inverse * g[i];
        }
    }
    return ST_OK;
}

static enum status cpu_layernorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                 const struct tensor *gain, const struct tensor *bias, float eps)
{
    const struct cpu *cpu = be->impl;
    int32_t n = x->dims[1], n_tok = x->dims[0];
    const float *g = gain->data, *b = bias ? bias->data : NULL;
    int n_threads = cpu_threads(cpu, tensor_count(x) * 2);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int32_t t = 0; t < n_tok; t++) {
        const float *from = (const float *)x->data + (size_t)t * (size_t)n;
        float *to = (float *)y->data + (size_t)t * (size_t)n;
        double sum = 0; /* a large mean would drown the deviations in f32 */
        for (int32_t i = 0; i < n; i++) {
            sum += (double)from[i];
        }
        double mean = sum / n;
        for (int32_t i = 0; i < n; i++) {
            to[i] = (float)((double)from[i] - mean);
        }
        float variance = cpu->isa->dot(to, DT_F32, to, n) / (float)n;
        float inverse = 1.0f / sqrtf(variance + eps);
        for (int32_t i = 0; i < n; i++) {
            to[i] = to[i] * inverse * g[i] + (b ? b[i] : 0.0f);
        }
    }
    return ST_OK;
}

static void rotate_token(float *head, int32_t n_heads, int32_t head_dim, int32_t half,
                         const float *c, const float *s)
{
    for (int32_t h = 0; h < n_heads; h++, head += head_dim) {
        for (int32_t i = 0; i < half; i++) {
            float a = head[i], b = head[i + half];
            head[i] = a * c[i] - b * s[i];
            head[i + half] = b * c[i] + a * s[i];
        }
    }
}

static enum status cpu_rope(struct backend *be, struct tensor *q, struct tensor *k,
                            const struct token_place *place, const struct rope_table *table)
{
    const struct cpu *cpu = be->impl;
    TRY(host_check_place("rope", place, 0, 0));
    const int32_t *pos = place->pos.data;
    int32_t n_tok = q->dims[0], head_dim = q->dims[2], half = table->rot_dim / 2;
    size_t q_floats = (size_t)q->dims[1] * (size_t)head_dim;
    size_t k_floats = (size_t)k->dims[1] * (size_t)head_dim;
    int n_threads = cpu_threads(cpu, tensor_count(q) + tensor_count(k));
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int32_t t = 0; t < n_tok; t++) {
        size_t angle = (size_t)pos[t] * (size_t)half, at = (size_t)t;
        const float *c = (const float *)table->cos.data + angle;
        const float *s = (const float *)table->sin.data + angle;
        rotate_token((float *)q->data + at * q_floats, q->dims[1], head_dim, half, c, s);
        rotate_token((float *)k->data + at * k_floats, k->dims[1], head_dim, half, c, s);
    }
    return ST_OK;
}

static enum status cpu_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                           const struct tensor *up, enum activation act)
{
    (void)act; /* the wrapper lets only SiLU through */
    const struct cpu *cpu = be->impl;
    const float *g = gate->data, *u = up->data;
    float *to = y->data;
    size_t n = tensor_count(y);
    int n_threads = cpu_threads(cpu, n * 8); /* an exponential costs several multiply-adds */
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (size_t i = 0; i < n; i++) {
        to[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
    }
    return ST_OK;
}

static float gelu_erf(float x)
{
    return 0.5f * x * erfcf(-0.70710678f * x);
}

/* 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), which keeps its digits for negative u */
static float gelu_tanh(float x)
{
    float u = 0.79788456f * (x + 0.044715f * x * x * x);
    return x / (1.0f + expf(-2.0f * u));
}

static enum status cpu_activate(struct backend *be, struct tensor *y, const struct tensor *x,
                                enum activation act)
{
    const struct cpu *cpu = be->impl;
    const float *from = x->data;
    float *to = y->data;
    size_t n = tensor_count(y);
    int n_threads = cpu_threads(cpu, n * 8);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (size_t i = 0; i < n; i++) {
        to[i] = act == ACT_GELU_ERF ? gelu_erf(from[i]) : gelu_tanh(from[i]);
    }
    return ST_OK;
}

/* Lanes, each in f32 in its own order, then the lanes in double in theirs. */
static void part_moments(float out[2], const float *x, int32_t n)
{
    enum { LANES = 16 };
    float sum[LANES] = {0}, squares[LANES] = {0};
    double all = 0, all_squares = 0;
    int32_t whole = n / LANES * LANES;
    for (int32_t i = 0; i < whole; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            float v = x[i + j];
            sum[j] += v;
            squares[j] += v * v;
        }
    }
    for (int32_t i = whole; i < n; i++) {
        sum[i - whole] += x[i];
        squares[i - whole] += x[i] * x[i];
    }
    for (int j = 0; j < LANES; j++) {
        all += (double)sum[j];
        all_squares += (double)squares[j];
    }
    out[0] = (float)all;
    out[1] = (float)all_squares;
}

static enum status cpu_moments(struct backend *be, struct tensor *out, const struct tensor *x,
                               const int32_t *cut, int32_t n_cuts)
{
    (void)be;
    int32_t n_tok = x->dims[0], n = x->dims[1];
    const int32_t whole[] = {0, n};
    float *to = out->data;
    cut = cut ? cut : whole;
    for (int32_t t = 0; t < n_tok; t++) {
        const float *row = (const float *)x->data + (size_t)t * (size_t)n;
        for (int32_t c = 0; c < n_cuts; c++, to += 2) {
            part_moments(to, row + cut[c], cut[c + 1] - cut[c]);
        }
    }
    return ST_OK;
}

static enum status cpu_logit_stats(struct backend *be, struct logit_stats *out,
                                   const struct tensor *logits, int32_t first_id,
                                   const int32_t *cut, int32_t n_cuts,
                                   const struct logit_want *want)
{
    const struct cpu *cpu = be->impl;
    int32_t n_vocab = logits->dims[1], n_tok = logits->dims[0];
    const int32_t whole[] = {0, n_vocab};
    cut = cut ? cut : whole;
    int n_threads = cpu_threads(cpu, tensor_count(logits) * 8);
#pragma omp parallel for collapse(2) schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int32_t t = 0; t < n_tok; t++) {
        for (int32_t c = 0; c < n_cuts; c++) {
            const float *part = (const float *)logits->data + (size_t)t * (size_t)n_vocab + cut[c];
            sampler_part_stats(&out[(size_t)t * (size_t)n_cuts + (size_t)c], part,
                               cut[c + 1] - cut[c], first_id + cut[c], &want[t]);
        }
    }
    return ST_OK;
}

static enum status cpu_top_k(struct backend *be, struct logit_candidate *out,
                             const struct tensor *logits, int32_t first_id, int32_t k)
{
    const struct cpu *cpu = be->impl;
    int32_t n_tok = logits->dims[0], n_vocab = logits->dims[1];
    int n_threads = cpu_threads(cpu, tensor_count(logits));
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int32_t t = 0; t < n_tok; t++) {
        candidates_select(out + (size_t)t * (size_t)k, k,
                          (const float *)logits->data + (size_t)t * (size_t)n_vocab, n_vocab,
                          first_id);
    }
    return ST_OK;
}

const struct backend_ops cpu_ops = {
    .name = "cpu",
    .help = "threads, and AVX2 where the processor has it",
    .open = cpu_open,
    .close = cpu_close,
    .arithmetic = cpu_arithmetic,
    .is_host = host_is_host,
    .device = host_device,
    .alloc = host_alloc,
    .release = host_release,
    .upload = host_upload,
    .download = host_download,
    .zero = host_zero,
    .sync = host_sync,
    .planes_load = cpu_planes_load,
    .planes_drop = cpu_planes_drop,
    .matmul_nested = cpu_matmul_nested,
    .matmul_dense = cpu_matmul_dense,
    .add_parts = cpu_add_parts,
    .embed = cpu_embed,
    .rmsnorm = cpu_rmsnorm,
    .layernorm = cpu_layernorm,
    .rope = cpu_rope,
    .kv_append = cpu_kv_append,
    .attention = cpu_attention,
    .glu = cpu_glu,
    .activate = cpu_activate,
    .moments = cpu_moments,
    .logit_stats = cpu_logit_stats,
    .top_k = cpu_top_k,
};
