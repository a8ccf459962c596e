/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/bench/profile.h"

#include <string.h>

#include "core/log.h"
#include "core/mem.h"

struct account {
    int n;
    struct profile_entry entry[PROFILE_MOST_ENTRIES];
};

struct profile {
    struct backend inner;   /* owned */
    struct backend_ops ops; /* ours, under the inner backend's name */
    int keep;               /* number of the account; negative: none */
    struct account account[PROFILE_ACCOUNTS];
};

static struct profile *profile_of(const struct backend *be)
{
    return be->impl;
}

/* ---- counting ---- */

static void count(struct profile *p, struct profile_entry what, double seconds)
{
    if (p->keep < 0) {
        return;
    }
    struct account *a = &p->account[p->keep];
    struct profile_entry *e = a->entry, *end = a->entry + a->n;
    while (e < end &&
           (strcmp(e->op, what.op) != 0 || e->n_rows != what.n_rows || e->n_cols != what.n_cols)) {
        e++;
    }
    if (e == end) {
        INVARIANT(a->n < PROFILE_MOST_ENTRIES);
        *e = what;
        e->bytes = 0;
        a->n++;
    }
    e->calls++;
    e->bytes += what.bytes;
    e->seconds += seconds;
}

/* The inner call, and when it is done. */
#define TIMED(what, call)                                        \
    do {                                                         \
        struct profile *p = profile_of(be);                      \
        double start = clock_s();                                \
        enum status st_ = (call);                                \
        if (st_ == ST_OK && !p->inner.ops->is_host(&p->inner)) { \
            st_ = p->inner.ops->sync(&p->inner);                 \
        }                                                        \
        count(p, (what), clock_s() - start);                     \
        return st_;                                              \
    } while (0)
#define INNER(slot, ...) profile_of(be)->inner.ops->slot(&profile_of(be)->inner, __VA_ARGS__)
#define OTHER(name) ((struct profile_entry){.op = (name), .kind = PROFILE_OTHER})

/* ---- products ---- */

static enum status timed_matmul_nested(struct backend *be, struct tensor *y,
                                       const struct nested_matrix *w, const struct tensor *bits,
                                       const struct tensor *x, const struct tensor *bias,
                                       const struct how *how)
{
    int most = how->bits_used ? 31 - __builtin_clz(how->bits_used) : 0;
    struct profile_entry e = {.op = "matmul_nested",
                              .kind = PROFILE_NESTED,
                              .n_rows = w->n_rows,
                              .n_cols = w->n_cols,
                              .bytes = nested_bytes_read(w->kind, w->n_rows, w->n_cols_padded,
                                                         w->group_cols, most, how->bits_used)};
    TIMED(e, INNER(matmul_nested, y, w, bits, x, bias, how));
}

static enum status timed_matmul_dense(struct backend *be, struct tensor *y, const struct tensor *w,
                                      const struct tensor *x, const struct tensor *bias,
                                      const struct how *how)
{
    struct profile_entry e = {.op = "matmul_dense",
                              .kind = PROFILE_OTHER,
                              .n_rows = w->dims[0],
                              .n_cols = w->dims[1],
                              .bytes = tensor_bytes(w)};
    TIMED(e, INNER(matmul_dense, y, w, x, bias, how));
}

static enum status timed_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                                   const struct kv_layer *kv, const struct token_place *place,
                                   float scale)
{
    struct profile_entry e = {.op = "attention", .kind = PROFILE_ATTENTION};
    TIMED(e, INNER(attention, y, q, kv, place, scale));
}

/* ---- everything else ---- */

static enum status timed_upload(struct backend *be, void *dst, const void *src, size_t bytes)
{
    TIMED(OTHER("upload"), INNER(upload, dst, src, bytes));
}

static enum status timed_download(struct backend *be, void *dst, const void *src, size_t bytes)
{
    TIMED(OTHER("download"), INNER(download, dst, src, bytes));
}

static enum status timed_add_parts(struct backend *be, struct tensor *x, const struct tensor *parts,
                                   const struct tensor *bias)
{
    TIMED(OTHER("add_parts"), INNER(add_parts, x, parts, bias));
}

static enum status timed_embed(struct backend *be, struct tensor *x, const struct tensor *table,
                               const struct tensor *ids)
{
    TIMED(OTHER("embed"), INNER(embed, x, table, ids));
}

static enum status timed_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                 const struct tensor *gain, float eps)
{
    TIMED(OTHER("rmsnorm"), INNER(rmsnorm, y, x, gain, eps));
}

static enum status timed_layernorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                   const struct tensor *gain, const struct tensor *bias, float eps)
{
    TIMED(OTHER("layernorm"), INNER(layernorm, y, x, gain, bias, eps));
}

static enum status timed_rope(struct backend *be, struct tensor *q, struct tensor *k,
                              const struct token_place *place, const struct rope_table *table)
{
    TIMED(OTHER("rope"), INNER(rope, q, k, place, table));
}

static enum status timed_kv_append(struct backend *be, struct kv_layer *kv, const struct tensor *k,
                                   const struct tensor *v, const struct token_place *place)
{
    TIMED(OTHER("kv_append"), INNER(kv_append, kv, k, v, place));
}

static enum status timed_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                             const struct tensor *up, enum activation act)
{
    TIMED(OTHER("glu"), INNER(glu, y, gate, up, act));
}

static enum status timed_activate(struct backend *be, struct tensor *y, const struct tensor *x,
                                  enum activation act)
{
    TIMED(OTHER("activate"), INNER(activate, y, x, act));
}

static enum status timed_moments(struct backend *be, struct tensor *out, const struct tensor *x,
                                 const int32_t *cut, int32_t n_cuts)
{
    TIMED(OTHER("moments"), INNER(moments, out, x, cut, n_cuts));
}

static enum status timed_logit_stats(struct backend *be, struct logit_stats *out,
                                     const struct tensor *logits, int32_t first_id,
                                     const int32_t *cut, int32_t n_cuts,
                                     const struct logit_want *want)
{
    TIMED(OTHER("logit_stats"), INNER(logit_stats, out, logits, first_id, cut, n_cuts, want));
}

static enum status timed_top_k(struct backend *be, struct logit_candidate *out,
                               const struct tensor *logits, int32_t first_id, int32_t k)
{
    TIMED(OTHER("top_k"), INNER(top_k, out, logits, first_id, k));
}

/* ---- what is not timed ---- */

static enum status pass_open(struct backend *be, const struct backend_options *options)
{
    (void)be;
    (void)options;
    FAIL(ST_UNSUPPORTED, "a profile is made by profile_wrap");
}

static void pass_close(struct backend *be)
{
    struct profile *p = profile_of(be);
    backend_close(&p->inner);
    mem_free(p);
}

static const char *pass_arithmetic(const struct backend *be)
{
    return profile_of(be)->inner.ops->arithmetic(&profile_of(be)->inner);
}

static bool pass_is_host(const struct backend *be)
{
    return profile_of(be)->inner.ops->is_host(&profile_of(be)->inner);
}

static const char *pass_device(const struct backend *be)
{
    return profile_of(be)->inner.ops->device(&profile_of(be)->inner);
}

static enum status pass_alloc(struct backend *be, void **out, size_t bytes)
{
    return INNER(alloc, out, bytes);
}

static void pass_release(struct backend *be, void *ptr)
{
    INNER(release, ptr);
}

static enum status pass_zero(struct backend *be, void *dst, size_t bytes)
{
    return INNER(zero, dst, bytes);
}

static enum status pass_sync(struct backend *be)
{
    return profile_of(be)->inner.ops->sync(&profile_of(be)->inner);
}

static enum status pass_planes_load(struct backend *be, struct nested_matrix *w,
                                    const struct nested_source *src,
                                    const struct matrix_range *range, int n_planes)
{
    return INNER(planes_load, w, src, range, n_planes);
}

static void pass_planes_drop(struct backend *be, struct nested_matrix *w, int keep)
{
    INNER(planes_drop, w, keep);
}

static const struct backend_ops table = {
    .name = "profile",
    .help = "times another backend",
    .open = pass_open,
    .close = pass_close,
    .arithmetic = pass_arithmetic,
    .is_host = pass_is_host,
    .device = pass_device,
    .alloc = pass_alloc,
    .release = pass_release,
    .upload = timed_upload,
    .download = timed_download,
    .zero = pass_zero,
    .sync = pass_sync,
    .planes_load = pass_planes_load,
    .planes_drop = pass_planes_drop,
    .matmul_nested = timed_matmul_nested,
    .matmul_dense = timed_matmul_dense,
    .add_parts = timed_add_parts,
    .embed = timed_embed,
    .rmsnorm = timed_rmsnorm,
    .layernorm = timed_layernorm,
    .rope = timed_rope,
    .kv_append = timed_kv_append,
    .attention = timed_attention,
    .glu = timed_glu,
    .activate = timed_activate,
    .moments = timed_moments,
    .logit_stats = timed_logit_stats,
    .top_k = timed_top_k,
};

/* ---- the profile ---- */

enum status profile_wrap(struct backend *be)
{
    static const unsigned char null_slot[sizeof(void *)];
    for (size_t at = 0; at < sizeof table; at += sizeof null_slot) { /* a slot that came later */
        bool slot_is_filled =
            memcmp((const unsigned char *)&table + at, null_slot, sizeof null_slot) != 0;
        INVARIANT(slot_is_filled);
    }
    struct profile *p = NULL;
    TRY(MEM_NEW(&p, 1));
    p->inner = *be;
    p->ops = table;
    p->ops.name = be->ops->name;
    p->keep = -1;
    *be = (struct backend){.ops = &p->ops, .impl = p};
    return ST_OK;
}

void profile_keep(struct backend *be, int account)
{
    INVARIANT(account < PROFILE_ACCOUNTS);
    if (be->ops->open == pass_open) {
        profile_of(be)->keep = account;
    }
}

const struct profile_entry *profile_entries(const struct backend *be, int account, int *n)
{
    INVARIANT(be->ops->open == pass_open);
    const struct account *a = &profile_of(be)->account[account];
    *n = a->n;
    return a->entry;
}
