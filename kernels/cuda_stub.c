/* Stands in for the cuda backend in a build without CUDA kernels: it registers, so that callers and
 * messages know the name, and cannot be opened, so that its other slots are never reached.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/kernels.h"

static enum status absent(void)
{
    FAIL(ST_UNSUPPORTED,
         "this build has no CUDA kernels (there was no nvcc, or PMPD_CUDA is OFF): build "
         "with CUDA, or use backend.name = \"cpu\"");
}

static enum status stub_open(struct backend *be, const struct backend_options *options)
{
    (void)be, (void)options;
    return absent();
}

static void stub_close(struct backend *be)
{
    (void)be;
}

static const char *stub_arithmetic(const struct backend *be)
{
    (void)be;
    return "none";
}

static bool stub_is_host(const struct backend *be)
{
    (void)be;
    return true;
}

static enum status stub_alloc(struct backend *be, void **out, size_t bytes)
{
    (void)be, (void)out, (void)bytes;
    return absent();
}

static void stub_release(struct backend *be, void *ptr)
{
    (void)be, (void)ptr;
}

static enum status stub_copy(struct backend *be, void *dst, const void *src, size_t bytes)
{
    (void)be, (void)dst, (void)src, (void)bytes;
    return absent();
}

static enum status stub_zero(struct backend *be, void *dst, size_t bytes)
{
    (void)be, (void)dst, (void)bytes;
    return absent();
}

static enum status stub_sync(struct backend *be)
{
    (void)be;
    return absent();
}

static enum status stub_planes_load(struct backend *be, struct nested_matrix *w,
                                    const struct nested_source *src,
                                    const struct matrix_range *range, int n_planes)
{
    (void)be, (void)w, (void)src, (void)range, (void)n_planes;
    return absent();
}

static void stub_planes_drop(struct backend *be, struct nested_matrix *w, int keep)
{
    (void)be, (void)w, (void)keep;
}

static enum status stub_matmul_nested(struct backend *be, struct tensor *y,
                                      const struct nested_matrix *w, const struct tensor *bits,
                                      const struct tensor *x, const struct tensor *bias,
                                      const struct how *how)
{
    (void)be, (void)y, (void)w, (void)bits, (void)x, (void)bias, (void)how;
    return absent();
}

static enum status stub_matmul_dense(struct backend *be, struct tensor *y, const struct tensor *w,
                                     const struct tensor *x, const struct tensor *bias,
                                     const struct how *how)
{
    (void)be, (void)y, (void)w, (void)x, (void)bias, (void)how;
    return absent();
}

static enum status stub_two_inputs(struct backend *be, struct tensor *y, const struct tensor *a,
                                   const struct tensor *b)
{
    (void)be, (void)y, (void)a, (void)b;
    return absent();
}

static enum status stub_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                const struct tensor *gain, float eps)
{
    (void)be, (void)y, (void)x, (void)gain, (void)eps;
    return absent();
}

static enum status stub_layernorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                  const struct tensor *gain, const struct tensor *bias, float eps)
{
    (void)be, (void)y, (void)x, (void)gain, (void)bias, (void)eps;
    return absent();
}

static enum status stub_rope(struct backend *be, struct tensor *q, struct tensor *k,
                             const struct token_place *place, const struct rope_table *table)
{
    (void)be, (void)q, (void)k, (void)place, (void)table;
    return absent();
}

static enum status stub_kv_append(struct backend *be, struct kv_layer *kv, const struct tensor *k,
                                  const struct tensor *v, const struct token_place *place)
{
    (void)be, (void)kv, (void)k, (void)v, (void)place;
    return absent();
}

static enum status stub_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                                  const struct kv_layer *kv, const struct token_place *place,
                                  float scale)
{
    (void)be, (void)y, (void)q, (void)kv, (void)place, (void)scale;
    return absent();
}

static enum status stub_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                            const struct tensor *up, enum activation act)
{
    (void)be, (void)y, (void)gate, (void)up, (void)act;
    return absent();
}

static enum status stub_activate(struct backend *be, struct tensor *y, const struct tensor *x,
                                 enum activation act)
{
    (void)be, (void)y, (void)x, (void)act;
    return absent();
}

static enum status stub_moments(struct backend *be, struct tensor *out, const struct tensor *x,
                                const int32_t *cut, int32_t n_cuts)
{
    (void)be, (void)out, (void)x, (void)cut, (void)n_cuts;
    return absent();
}

static enum status stub_logit_stats(struct backend *be, struct logit_stats *out,
                                    const struct tensor *logits, int32_t first_id,
                                    const int32_t *cut, int32_t n_cuts,
                                    const struct logit_want *want)
{
    (void)be, (void)out, (void)logits, (void)first_id, (void)cut, (void)n_cuts, (void)want;
    return absent();
}

static enum status stub_top_k(struct backend *be, struct logit_candidate *out,
                              const struct tensor *logits, int32_t first_id, int32_t k)
{
    (void)be, (void)out, (void)logits, (void)first_id, (void)k;
    return absent();
}

const struct backend_ops cuda_ops = {
    .name = "cuda",
    .help = "NVIDIA GPU (not in this build)",
    .open = stub_open,
    .close = stub_close,
    .arithmetic = stub_arithmetic,
    .is_host = stub_is_host,
    .device = stub_arithmetic,
    .alloc = stub_alloc,
    .release = stub_release,
    .upload = stub_copy,
    .download = stub_copy,
    .zero = stub_zero,
    .sync = stub_sync,
    .planes_load = stub_planes_load,
    .planes_drop = stub_planes_drop,
    .matmul_nested = stub_matmul_nested,
    .matmul_dense = stub_matmul_dense,
    .add_parts = stub_two_inputs,
    .embed = stub_two_inputs,
    .rmsnorm = stub_rmsnorm,
    .layernorm = stub_layernorm,
    .rope = stub_rope,
    .kv_append = stub_kv_append,
    .attention = stub_attention,
    .glu = stub_glu,
    .activate = stub_activate,
    .moments = stub_moments,
    .logit_stats = stub_logit_stats,
    .top_k = stub_top_k,
};
