/* The registry of backends and the checked doors to them: whatever a header promises about shapes,
 * element types and resident planes is checked here, once for all backends, and only then is the
 * slot called. Knows no backend by name.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/backend.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_BACKENDS = 16, TEXT_BYTES = 160, ANY = -1 };
enum {
    F32_ONLY = 1u << DT_F32,
    I32_ONLY = 1u << DT_I32,
    U8_ONLY = 1u << DT_U8,
    KV_FLOATS = 1u << DT_F32 | 1u << DT_F16,
    FLOATS = 1u << DT_F32 | 1u << DT_F16 | 1u << DT_BF16
};

static const struct backend_ops *registered[MAX_BACKENDS];
static int n_registered;

/* ---- registry ---- */

void backend_register(const struct backend_ops *ops)
{
    /* Every member of the table is a pointer: looking at all of them as such also covers slots that
     * are added later. */
    const unsigned char *slot = (const unsigned char *)ops;
    static const unsigned char null_slot[sizeof(void *)];
    for (size_t at = 0; at < sizeof *ops; at += sizeof null_slot) {
        bool slot_is_filled = memcmp(slot + at, null_slot, sizeof null_slot) != 0;
        INVARIANT(slot_is_filled);
    }
    for (int i = 0; i < n_registered; i++) {
        bool name_is_new = strcmp(registered[i]->name, ops->name) != 0;
        INVARIANT(name_is_new);
    }
    INVARIANT(n_registered < MAX_BACKENDS);
    registered[n_registered++] = ops;
}

const struct backend_ops *backend_registered(int i)
{
    return i >= 0 && i < n_registered ? registered[i] : NULL;
}

enum status backend_open(struct backend *out, const char *name,
                         const struct backend_options *options)
{
    *out = (struct backend){0};
    char known[TEXT_BYTES] = "";
    size_t used = 0;
    for (int i = 0; i < n_registered; i++) {
        if (strcmp(registered[i]->name, name) == 0) {
            struct backend be = {.ops = registered[i]};
            TRY(be.ops->open(&be, options));
            *out = be;
            return ST_OK;
        }
        if (used < sizeof known) {
            int n = snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "",
                             registered[i]->name);
            used += n > 0 ? (size_t)n : 0;
        }
    }
    FAIL(ST_USER, "unknown backend \"%s\": expected one of %s", name, known);
}

void backend_close(struct backend *be)
{
    if (be->ops) {
        be->ops->close(be);
    }
    *be = (struct backend){0};
}

/* ---- memory ---- */

bool backend_is_host(const struct backend *be)
{
    return be->ops->is_host(be);
}

enum status backend_alloc(struct backend *be, void **out, size_t bytes)
{
    TRY(be->ops->alloc(be, out, bytes));
    return ST_OK;
}

void backend_release(struct backend *be, void *ptr)
{
    if (ptr) {
        be->ops->release(be, ptr);
    }
}

static enum status check_copy(const char *op, const void *dst, const void *src, size_t bytes)
{
    if (bytes > 0 && (!dst || !src)) {
        FAIL(ST_SHAPE, "%s: the %s of %zu bytes is NULL, expected memory", op,
             dst ? "source" : "destination", bytes);
    }
    return ST_OK;
}

enum status backend_upload(struct backend *be, void *dst, const void *src_host, size_t bytes)
{
    TRY(check_copy("upload", dst, src_host, bytes));
    if (bytes > 0) {
        TRY(be->ops->upload(be, dst, src_host, bytes));
    }
    return ST_OK;
}

enum status backend_download(struct backend *be, void *dst_host, const void *src, size_t bytes)
{
    TRY(check_copy("download", dst_host, src, bytes));
    if (bytes > 0) {
        TRY(be->ops->download(be, dst_host, src, bytes));
    }
    return ST_OK;
}

enum status backend_zero(struct backend *be, void *dst, size_t bytes)
{
    TRY(check_copy("zero", dst, dst, bytes));
    if (bytes > 0) {
        TRY(be->ops->zero(be, dst, bytes));
    }
    return ST_OK;
}

enum status backend_sync(struct backend *be)
{
    TRY(be->ops->sync(be));
    return ST_OK;
}

/* ---- checks ---- */

/* One tensor against what an operation expects: element types as a mask, dimensions with ANY for
 * "whatever, but at least one". */
static enum status expect(const char *op, const char *name, const struct tensor *t, uint32_t dtypes,
                          int n_dims, const int32_t *dims)
{
    bool good = t->n_dims == n_dims && (unsigned)t->dtype < DT_N && (dtypes >> t->dtype & 1);
    for (int i = 0; i < n_dims && good; i++) {
        good = dims[i] == ANY ? t->dims[i] > 0 : t->dims[i] == dims[i];
    }
    if (good && !t->data) {
        FAIL(ST_SHAPE, "%s: %s has no data (NULL), expected memory of the backend", op, name);
    }
    if (good) {
        return ST_OK;
    }
    char found[TEXT_BYTES], wanted[TEXT_BYTES] = "", part[32];
    for (int d = 0; d < DT_N; d++) {
        if (dtypes >> d & 1) {
            strncat(wanted, wanted[0] ? "/" : "", sizeof wanted - strlen(wanted) - 1);
            strncat(wanted, dtype_name((enum dtype)d), sizeof wanted - strlen(wanted) - 1);
        }
    }
    for (int i = 0; i < n_dims; i++) {
        snprintf(part, sizeof part, dims[i] == ANY ? "%sn" : "%s%d", i ? ", " : " (", dims[i]);
        strncat(wanted, part, sizeof wanted - strlen(wanted) - 1);
    }
    FAIL(ST_SHAPE, "%s: %s is %s, expected %s)", op, name, tensor_describe(t, found, sizeof found),
         wanted);
}

static enum status expect_1d(const char *op, const char *name, const struct tensor *t,
                             uint32_t dtypes, int32_t n)
{
    const int32_t dims[] = {n};
    return expect(op, name, t, dtypes, 1, dims);
}

static enum status expect_2d(const char *op, const char *name, const struct tensor *t,
                             uint32_t dtypes, int32_t n_rows, int32_t n_cols)
{
    const int32_t dims[] = {n_rows, n_cols};
    return expect(op, name, t, dtypes, 2, dims);
}

static enum status expect_3d(const char *op, const char *name, const struct tensor *t,
                             uint32_t dtypes, int32_t d0, int32_t d1, int32_t d2)
{
    const int32_t dims[] = {d0, d1, d2};
    return expect(op, name, t, dtypes, 3, dims);
}

static enum status expect_apart(const char *op, const struct tensor *y, const struct tensor *x)
{
    if (y->data == x->data) {
        FAIL(ST_SHAPE, "%s: input and output are the same memory, expected two blocks", op);
    }
    return ST_OK;
}

/* Cuts of n things into n_parts: 0 = cut[0] < cut[1] < ... = n, inner ones at multiples of unit. */
static enum status check_cuts(const char *op, const int32_t *cut, int32_t n_parts, int32_t n,
                              int32_t unit)
{
    if (n_parts < 1 || n_parts > n) {
        FAIL(ST_SHAPE, "%s: %d parts of %d columns, expected 1..%d", op, n_parts, n, n);
    }
    if (!cut) {
        if (n_parts != 1) {
            FAIL(ST_SHAPE, "%s: %d parts without cuts (NULL), expected %d cuts", op, n_parts,
                 n_parts + 1);
        }
        return ST_OK;
    }
    if (cut[0] != 0 || cut[n_parts] != n) {
        FAIL(ST_SHAPE, "%s: cuts run from %d to %d, expected 0 to %d", op, cut[0], cut[n_parts], n);
    }
    for (int i = 1; i <= n_parts; i++) {
        if (cut[i] <= cut[i - 1]) {
            FAIL(ST_SHAPE, "%s: cut %d is %d after %d, expected ascending cuts", op, i, cut[i],
                 cut[i - 1]);
        }
        if (i < n_parts && cut[i] % unit != 0) {
            FAIL(ST_SHAPE, "%s: cut %d is %d, expected a multiple of the group of %d columns", op,
                 i, cut[i], unit);
        }
    }
    return ST_OK;
}

/* What the two products share: x, y, bias and how. */
static enum status check_product(const char *op, const struct tensor *y, int32_t n_rows,
                                 int32_t n_cols, int32_t unit, const struct tensor *x,
                                 const struct tensor *bias, const struct how *how)
{
    TRY(expect_2d(op, "x", x, F32_ONLY, ANY, n_cols));
    if ((unsigned)how->product > PRODUCT_CHUNK) {
        FAIL(ST_SHAPE, "%s: product %d, expected ONE, SLOTS or CHUNK", op, (int)how->product);
    }
    TRY(check_cuts(op, how->cut, how->n_segments, n_cols, unit));
    int32_t n_parts = how->add_up ? 1 : how->n_segments;
    if (n_parts == 1 && y->n_dims == 2) {
        TRY(expect_2d(op, "y", y, F32_ONLY, x->dims[0], n_rows));
    } else {
        TRY(expect_3d(op, "y", y, F32_ONLY, n_parts, x->dims[0], n_rows));
    }
    TRY(expect_apart(op, y, x));
    if (bias) {
        TRY(expect_1d(op, "bias", bias, F32_ONLY, n_rows));
        if (how->n_segments != 1) {
            FAIL(ST_SHAPE,
                 "%s: a bias with %d segments, expected one segment (add_parts takes "
                 "the bias of several)",
                 op, how->n_segments);
        }
    }
    return ST_OK;
}

/* The places of n_tok tokens whose positions have to lie below max_rows. */
static enum status check_place(const char *op, const struct token_place *place, int32_t n_tok,
                               int32_t max_rows)
{
    TRY(expect_1d(op, "slot", &place->slot, I32_ONLY, n_tok));
    TRY(expect_1d(op, "pos", &place->pos, I32_ONLY, n_tok));
    TRY(expect_1d(op, "kv_row", &place->kv_row, I32_ONLY, n_tok));
    if (place->max_pos < 0 || place->max_pos >= max_rows) {
        FAIL(ST_SHAPE, "%s: the largest position is %d, expected 0..%d", op, place->max_pos,
             max_rows - 1);
    }
    return ST_OK;
}

static enum status check_kv(const char *op, const struct kv_layer *kv, int32_t n_kv_heads,
                            int32_t head_dim)
{
    const int32_t k_dims[] = {ANY, n_kv_heads, ANY, head_dim};
    TRY(expect(op, "the K cache", &kv->k, KV_FLOATS, 4, k_dims));
    TRY(expect(op, "the V cache", &kv->v, KV_FLOATS, 4, kv->k.dims));
    return ST_OK;
}

/* ---- nested weights ---- */

static enum status check_source(const struct nested_source *src)
{
    if (src->n_rows < 1 || src->n_cols < 1 || src->n_cols > src->n_cols_padded) {
        FAIL(ST_SHAPE,
             "planes_load: the source is (%d, %d) padded to %d columns, expected at "
             "least (1, 1) and no fewer padded columns",
             src->n_rows, src->n_cols, src->n_cols_padded);
    }
    if (src->group_cols < 32 || src->group_cols % 32 != 0) {
        FAIL(ST_SHAPE, "planes_load: groups of %d columns, expected a multiple of 32",
             src->group_cols);
    }
    if (src->n_cols_padded % src->group_cols != 0) {
        FAIL(ST_SHAPE, "planes_load: %d padded columns, expected a multiple of the group of %d",
             src->n_cols_padded, src->group_cols);
    }
    if (src->n_planes < 1 || src->n_planes > BITS_MAX || !src->planes) {
        FAIL(ST_SHAPE, "planes_load: the source has %d planes%s, expected 1..%d", src->n_planes,
             src->planes ? "" : " and no plane data (NULL)", BITS_MAX);
    }
    for (int b = 1; b <= BITS_MAX; b++) {
        bool held = true;
        switch (src->kind[b]) {
        case LEVEL_NONE:
            continue;
        case LEVEL_TIED:
            held = src->scale[b] && src->offset[b];
            break;
        case LEVEL_FREE:
            held = src->alpha[b] && src->offset[b];
            break;
        case LEVEL_LUT:
            held = src->lut[b] != NULL;
            break;
        case LEVEL_TAIL:
            held = b == 8 && src->scale[b] && src->offset[b] && src->tail;
            break;
        case LEVEL_N:
        default:
            held = false;
        }
        if (!held || b > src->n_planes) {
            FAIL(ST_SHAPE,
                 "planes_load: levels of %d bits, kind %s, are incomplete or have no "
                 "planes: expected all of their arrays and at least %d planes, found %d planes",
                 b, level_kind_name(src->kind[b]), b, src->n_planes);
        }
    }
    return ST_OK;
}

static enum status check_range(const struct nested_source *src, const struct matrix_range *r)
{
    bool rows = r->row_begin >= 0 && r->row_begin < r->row_end && r->row_end <= src->n_rows;
    bool cols = r->col_begin >= 0 && r->col_begin < r->col_end && r->col_end <= src->n_cols;
    if (!rows || !cols) {
        FAIL(ST_SHAPE,
             "planes_load: rows %d..%d, columns %d..%d, expected a part of (%d, %d) that "
             "is not empty",
             r->row_begin, r->row_end, r->col_begin, r->col_end, src->n_rows, src->n_cols);
    }
    if (r->col_begin % src->group_cols != 0 ||
        (r->col_end != src->n_cols && r->col_end % src->group_cols != 0)) {
        FAIL(ST_SHAPE,
             "planes_load: columns %d..%d, expected multiples of the group of %d columns "
             "(or the end, %d)",
             r->col_begin, r->col_end, src->group_cols, src->n_cols);
    }
    return ST_OK;
}

enum status backend_planes_load(struct backend *be, struct nested_matrix *w,
                                const struct nested_source *src, const struct matrix_range *range,
                                int n_planes)
{
    TRY(check_source(src));
    TRY(check_range(src, range));
    if (n_planes < 1 || n_planes > src->n_planes) {
        FAIL(ST_SHAPE, "planes_load: %d planes asked for, expected 1..%d", n_planes, src->n_planes);
    }
    int32_t n_rows = range->row_end - range->row_begin, n_cols = range->col_end - range->col_begin;
    int32_t group = src->group_cols;
    if (w->n_resident > 0 && (w->n_rows != n_rows || w->n_cols != n_cols ||
                              w->group_cols != group || w->n_planes != src->n_planes)) {
        FAIL(ST_SHAPE,
             "planes_load: the matrix holds (%d, %d) in groups of %d with %d planes, "
             "expected the range it was loaded with; found (%d, %d), %d, %d",
             w->n_rows, w->n_cols, w->group_cols, w->n_planes, n_rows, n_cols, group,
             src->n_planes);
    }
    if (n_planes <= w->n_resident) {
        return ST_OK;
    }
    struct nested_matrix next = *w;
    next.n_rows = n_rows;
    next.n_cols = n_cols;
    next.group_cols = group;
    next.n_cols_padded = (n_cols - 1) / group * group + group; /* <= the source's: no overflow */
    next.n_planes = src->n_planes;
    TRY(be->ops->planes_load(be, &next, src, range, n_planes));
    for (int b = w->n_resident + 1; b <= n_planes; b++) {
        next.kind[b] = src->kind[b];
    }
    next.n_resident = n_planes;
    *w = next;
    return ST_OK;
}

void backend_planes_drop(struct backend *be, struct nested_matrix *w, int keep)
{
    INVARIANT(keep >= 0);
    if (keep >= w->n_resident) {
        return;
    }
    be->ops->planes_drop(be, w, keep);
    if (keep == 0) {
        *w = (struct nested_matrix){0};
        return;
    }
    for (int b = keep + 1; b <= BITS_MAX; b++) {
        w->kind[b] = LEVEL_NONE;
    }
    w->n_resident = keep;
}

static enum status check_bits(const struct nested_matrix *w, uint32_t bits_used)
{
    if (bits_used == 0 || bits_used & ~(uint32_t)((1u << BITS_ALL) - 2)) {
        FAIL(ST_SHAPE, "matmul_nested: bits_used is 0x%x, expected precisions among 1..%d",
             bits_used, BITS_MAX);
    }
    for (int b = 1; b <= BITS_MAX; b++) {
        if (!(bits_used >> b & 1) || (b <= w->n_resident && w->kind[b] != LEVEL_NONE)) {
            continue;
        }
        char held[TEXT_BYTES] = "";
        for (int h = 1; h <= BITS_MAX; h++) {
            if (w->kind[h] != LEVEL_NONE) {
                size_t used = strlen(held);
                snprintf(held + used, sizeof held - used, "%s%d", used ? ", " : "", h);
            }
        }
        FAIL(ST_UNSUPPORTED,
             "matmul_nested: a token asks for %d bits, expected a precision that "
             "this (%d, %d) matrix holds: %s; %d of its %d planes are resident",
             b, w->n_rows, w->n_cols, held[0] ? held : "none", w->n_resident, w->n_planes);
    }
    return ST_OK;
}

/* ---- operations ---- */

enum status backend_matmul_nested(struct backend *be, struct tensor *y,
                                  const struct nested_matrix *w, const struct tensor *bits,
                                  const struct tensor *x, const struct tensor *bias,
                                  const struct how *how)
{
    static const char op[] = "matmul_nested";
    if (w->n_resident < 1) {
        FAIL(ST_UNSUPPORTED, "%s: the matrix has no resident planes, expected planes_load first",
             op);
    }
    TRY(check_product(op, y, w->n_rows, w->n_cols, w->group_cols, x, bias, how));
    TRY(expect_1d(op, "bits", bits, U8_ONLY, x->dims[0]));
    TRY(check_bits(w, how->bits_used));
    TRY(be->ops->matmul_nested(be, y, w, bits, x, bias, how));
    return ST_OK;
}

enum status backend_matmul_dense(struct backend *be, struct tensor *y, const struct tensor *w,
                                 const struct tensor *x, const struct tensor *bias,
                                 const struct how *how)
{
    static const char op[] = "matmul_dense";
    TRY(expect_2d(op, "w", w, FLOATS, ANY, ANY));
    TRY(check_product(op, y, w->dims[0], w->dims[1], 1, x, bias, how));
    TRY(be->ops->matmul_dense(be, y, w, x, bias, how));
    return ST_OK;
}

enum status backend_add_parts(struct backend *be, struct tensor *x, const struct tensor *parts,
                              const struct tensor *bias)
{
    static const char op[] = "add_parts";
    TRY(expect_2d(op, "x", x, F32_ONLY, ANY, ANY));
    if (parts->n_dims == 2) {
        TRY(expect_2d(op, "parts", parts, F32_ONLY, x->dims[0], x->dims[1]));
    } else {
        TRY(expect_3d(op, "parts", parts, F32_ONLY, ANY, x->dims[0], x->dims[1]));
    }
    TRY(expect_apart(op, x, parts));
    if (bias) {
        TRY(expect_1d(op, "bias", bias, F32_ONLY, x->dims[1]));
    }
    TRY(be->ops->add_parts(be, x, parts, bias));
    return ST_OK;
}

enum status backend_embed(struct backend *be, struct tensor *x, const struct tensor *table,
                          const struct tensor *ids)
{
    static const char op[] = "embed";
    TRY(expect_2d(op, "x", x, F32_ONLY, ANY, ANY));
    TRY(expect_2d(op, "the table", table, FLOATS, ANY, x->dims[1]));
    TRY(expect_1d(op, "ids", ids, I32_ONLY, x->dims[0]));
    TRY(be->ops->embed(be, x, table, ids));
    return ST_OK;
}

enum status backend_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                            const struct tensor *gain, float eps)
{
    static const char op[] = "rmsnorm";
    TRY(expect_2d(op, "x", x, F32_ONLY, ANY, ANY));
    TRY(expect_2d(op, "y", y, F32_ONLY, x->dims[0], x->dims[1]));
    TRY(expect_1d(op, "gain", gain, F32_ONLY, x->dims[1]));
    if (!(eps >= 0)) {
        FAIL(ST_SHAPE, "%s: eps is %g, expected 0 or more", op, (double)eps);
    }
    TRY(be->ops->rmsnorm(be, y, x, gain, eps));
    return ST_OK;
}

enum status backend_layernorm(struct backend *be, struct tensor *y, const struct tensor *x,
                              const struct tensor *gain, const struct tensor *bias, float eps)
{
    static const char op[] = "layernorm";
    TRY(expect_2d(op, "x", x, F32_ONLY, ANY, ANY));
    TRY(expect_2d(op, "y", y, F32_ONLY, x->dims[0], x->dims[1]));
    TRY(expect_1d(op, "gain", gain, F32_ONLY, x->dims[1]));
    if (bias) {
        TRY(expect_1d(op, "bias", bias, F32_ONLY, x->dims[1]));
    }
    if (!(eps >= 0)) {
        FAIL(ST_SHAPE, "%s: eps is %g, expected 0 or more", op, (double)eps);
    }
    TRY(be->ops->layernorm(be, y, x, gain, bias, eps));
    return ST_OK;
}

enum status backend_rope(struct backend *be, struct tensor *q, struct tensor *k,
                         const struct token_place *place, const struct rope_table *table)
{
    static const char op[] = "rope";
    TRY(expect_3d(op, "q", q, F32_ONLY, ANY, ANY, ANY));
    TRY(expect_3d(op, "k", k, F32_ONLY, q->dims[0], ANY, q->dims[2]));
    if (table->rot_dim < 2 || table->rot_dim % 2 != 0 || table->rot_dim > q->dims[2]) {
        FAIL(ST_SHAPE, "%s: %d rotated dimensions, expected an even number in 2..%d", op,
             table->rot_dim, q->dims[2]);
    }
    TRY(expect_2d(op, "cos", &table->cos, F32_ONLY, ANY, table->rot_dim / 2));
    TRY(expect_2d(op, "sin", &table->sin, F32_ONLY, table->cos.dims[0], table->rot_dim / 2));
    TRY(check_place(op, place, q->dims[0], table->cos.dims[0]));
    TRY(be->ops->rope(be, q, k, place, table));
    return ST_OK;
}

enum status backend_kv_append(struct backend *be, struct kv_layer *kv, const struct tensor *k,
                              const struct tensor *v, const struct token_place *place)
{
    static const char op[] = "kv_append";
    TRY(expect_3d(op, "k", k, F32_ONLY, ANY, ANY, ANY));
    TRY(expect_3d(op, "v", v, F32_ONLY, k->dims[0], k->dims[1], k->dims[2]));
    TRY(check_kv(op, kv, k->dims[1], k->dims[2]));
    TRY(check_place(op, place, k->dims[0], kv->k.dims[2]));
    TRY(be->ops->kv_append(be, kv, k, v, place));
    return ST_OK;
}

enum status backend_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                              const struct kv_layer *kv, const struct token_place *place,
                              float scale)
{
    static const char op[] = "attention";
    TRY(expect_3d(op, "q", q, F32_ONLY, ANY, ANY, ANY));
    TRY(expect_3d(op, "y", y, F32_ONLY, q->dims[0], q->dims[1], q->dims[2]));
    TRY(expect_apart(op, y, q));
    TRY(check_kv(op, kv, ANY, q->dims[2]));
    int64_t per = kv->heads_per_kv, first = kv->head_in_group;
    if (per < 1 || first < 0 || first >= per ||
        (first + q->dims[1] - 1) / per + 1 != kv->k.dims[1]) {
        FAIL(ST_SHAPE,
             "%s: %d query heads, the first at place %d of %d that share a KV head, do not go with "
             "%d KV heads",
             op, q->dims[1], kv->head_in_group, kv->heads_per_kv, kv->k.dims[1]);
    }
    TRY(check_place(op, place, q->dims[0], kv->k.dims[2]));
    TRY(be->ops->attention(be, y, q, kv, place, scale));
    return ST_OK;
}

enum status backend_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                        const struct tensor *up, enum activation act)
{
    static const char op[] = "glu";
    TRY(expect_2d(op, "gate", gate, F32_ONLY, ANY, ANY));
    TRY(expect_2d(op, "up", up, F32_ONLY, gate->dims[0], gate->dims[1]));
    TRY(expect_2d(op, "y", y, F32_ONLY, gate->dims[0], gate->dims[1]));
    if (act != ACT_SILU) {
        FAIL(ST_UNSUPPORTED, "%s: activation %d, expected ACT_SILU (%d)", op, (int)act, ACT_SILU);
    }
    TRY(be->ops->glu(be, y, gate, up, act));
    return ST_OK;
}

enum status backend_activate(struct backend *be, struct tensor *y, const struct tensor *x,
                             enum activation act)
{
    static const char op[] = "activate";
    TRY(expect_2d(op, "x", x, F32_ONLY, ANY, ANY));
    TRY(expect_2d(op, "y", y, F32_ONLY, x->dims[0], x->dims[1]));
    if (act != ACT_GELU_TANH && act != ACT_GELU_ERF) {
        FAIL(ST_UNSUPPORTED, "%s: activation %d, expected ACT_GELU_TANH (%d) or ACT_GELU_ERF (%d)",
             op, (int)act, ACT_GELU_TANH, ACT_GELU_ERF);
    }
    TRY(be->ops->activate(be, y, x, act));
    return ST_OK;
}

enum status backend_moments(struct backend *be, struct tensor *out, const struct tensor *x,
                            const int32_t *cut_host, int32_t n_cuts)
{
    static const char op[] = "moments";
    TRY(expect_2d(op, "x", x, F32_ONLY, ANY, ANY));
    TRY(check_cuts(op, cut_host, n_cuts, x->dims[1], 1));
    TRY(expect_3d(op, "out", out, F32_ONLY, x->dims[0], n_cuts, 2));
    TRY(expect_apart(op, out, x));
    TRY(be->ops->moments(be, out, x, cut_host, n_cuts));
    return ST_OK;
}

static enum status check_first_id(const char *op, int32_t first_id, int32_t n_vocab)
{
    if (first_id < 0 || first_id > INT32_MAX - n_vocab) {
        FAIL(ST_SHAPE, "%s: the first id is %d, expected 0..%d", op, first_id, INT32_MAX - n_vocab);
    }
    return ST_OK;
}

enum status backend_logit_stats(struct backend *be, struct logit_stats *out_host,
                                const struct tensor *logits, int32_t first_id,
                                const int32_t *cut_host, int32_t n_cuts,
                                const struct logit_want *want_host)
{
    static const char op[] = "logit_stats";
    TRY(expect_2d(op, "logits", logits, F32_ONLY, ANY, ANY));
    TRY(check_first_id(op, first_id, logits->dims[1]));
    TRY(check_cuts(op, cut_host, n_cuts, logits->dims[1], 1));
    TRY(check_copy(op, out_host, want_host, 1));
    for (int32_t i = 0; i < logits->dims[0]; i++) {
        float t = want_host[i].temperature;
        if (!(t >= 0) || !isfinite(t)) {
            FAIL(ST_SHAPE, "%s: token %d has temperature %g, expected 0 or more", op, i, (double)t);
        }
        if (want_host[i].restricted && t <= 0) {
            FAIL(ST_SHAPE, "%s: token %d is restricted at temperature 0, expected one above 0", op,
                 i);
        }
    }
    TRY(be->ops->logit_stats(be, out_host, logits, first_id, cut_host, n_cuts, want_host));
    return ST_OK;
}

enum status backend_top_k(struct backend *be, struct logit_candidate *out_host,
                          const struct tensor *logits, int32_t first_id, int32_t k)
{
    static const char op[] = "top_k";
    TRY(expect_2d(op, "logits", logits, F32_ONLY, ANY, ANY));
    TRY(check_first_id(op, first_id, logits->dims[1]));
    if (k < 1) {
        FAIL(ST_SHAPE, "%s: %d candidates asked for, expected 1 or more", op, k);
    }
    TRY(check_copy(op, out_host, out_host, 1));
    TRY(be->ops->top_k(be, out_host, logits, first_id, k));
    return ST_OK;
}
