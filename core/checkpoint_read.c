/* SPDX-License-Identifier: Apache-2.0 */
#include "core/checkpoint_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <xxhash.h>

enum { NAME_BYTES = 512 /* a nested tensor's name: NAME.alpha.4 */ };

/* ---- access ---- */

static const unsigned char *entry_data(const struct checkpoint *ckpt, const struct entry *e)
{
    const struct shard *s = &ckpt->shards[e->shard];
    return s->map + s->data_at + e->begin;
}

static bool entry_is_aligned(const struct checkpoint *ckpt, const struct entry *e)
{
    return (uintptr_t)entry_data(ckpt, e) % dtype_bytes(e->dtype) == 0;
}

static struct tensor entry_tensor(const struct checkpoint *ckpt, const struct entry *e)
{
    struct tensor t = {.dtype = e->dtype, .n_dims = e->n_dims ? e->n_dims : 1, .dims = {1}};
    for (int32_t i = 0; i < e->n_dims; i++) {
        t.dims[i] = e->dims[i];
    }
    if (e->dtype != DT_N && entry_is_aligned(ckpt, e)) {
        t.data = (void *)(uintptr_t)entry_data(ckpt, e); // the mapping itself is read-only
    }
    return t;
}

int checkpoint_n_tensors(const struct checkpoint *ckpt)
{
    return ckpt->n_entries;
}

const char *checkpoint_name(const struct checkpoint *ckpt, int i)
{
    INVARIANT(i >= 0 && i < ckpt->n_entries);
    return ckpt->entries[i].name;
}

const char *checkpoint_dtype(const struct checkpoint *ckpt, int i)
{
    INVARIANT(i >= 0 && i < ckpt->n_entries);
    return ckpt->entries[i].dtype_text;
}

struct tensor checkpoint_tensor(const struct checkpoint *ckpt, int i)
{
    INVARIANT(i >= 0 && i < ckpt->n_entries);
    return entry_tensor(ckpt, &ckpt->entries[i]);
}

bool checkpoint_has(const struct checkpoint *ckpt, const char *name)
{
    return checkpoint_find(ckpt, name) != NULL;
}

static enum status fail_unknown(const struct checkpoint *ckpt, const char *name)
{
    int32_t at = 0; // the first name behind this one: its neighbours share the longest beginnings
    while (at < ckpt->n_entries && strcmp(ckpt->entries[at].name, name) < 0) {
        at++;
    }
    const char *before = ckpt->entries[at > 0 ? at - 1 : 0].name;
    const char *after = ckpt->entries[at < ckpt->n_entries ? at : ckpt->n_entries - 1].name;
    FAIL(ST_FORMAT,
         "%s has no tensor \"%s\"; the nearest of its %d names are \"%s\" and \"%s\"; does "
         "config.json belong to these weights?",
         ckpt->path, name, ckpt->n_entries, before, after);
}

enum status checkpoint_get(const struct checkpoint *ckpt, const char *name, struct tensor *out)
{
    *out = (struct tensor){0};
    const struct entry *e = checkpoint_find(ckpt, name);
    if (!e) {
        return fail_unknown(ckpt, name);
    }
    const struct shard *s = &ckpt->shards[e->shard];
    if (e->dtype == DT_N) {
        FAIL(ST_FORMAT,
             "tensor \"%s\" in %s has dtype %s, expected one of F32 F16 BF16 U8 I32 I64; convert "
             "the model to F16",
             name, s->path, e->dtype_text);
    }
    if (!entry_is_aligned(ckpt, e)) {
        FAIL(ST_FORMAT,
             "tensor \"%s\" in %s begins at byte %zu, not a multiple of the %zu bytes of %s; write "
             "the file again with a current safetensors (load_file, save_file)",
             name, s->path, s->data_at + e->begin, dtype_bytes(e->dtype), e->dtype_text);
    }
    *out = entry_tensor(ckpt, e);
    return ST_OK;
}

static void shape_text(char *text, size_t bytes, const int32_t *dims, int32_t n_dims)
{
    size_t used = (size_t)snprintf(text, bytes, "(");
    for (int32_t i = 0; i < n_dims && used < bytes; i++) {
        used += (size_t)snprintf(text + used, bytes - used, "%s%d", i ? ", " : "", dims[i]);
    }
    if (used < bytes) {
        snprintf(text + used, bytes - used, ")");
    }
}

static enum status get_checked(const struct checkpoint *ckpt, const char *name, const int32_t *dims,
                               int32_t n_dims, struct tensor *out)
{
    TRY(checkpoint_get(ckpt, name, out));
    if (out->n_dims == n_dims && memcmp(out->dims, dims, (size_t)n_dims * sizeof dims[0]) == 0) {
        return ST_OK;
    }
    char expected[64], found[64];
    shape_text(expected, sizeof expected, dims, n_dims);
    shape_text(found, sizeof found, out->dims, out->n_dims);
    *out = (struct tensor){0};
    FAIL(ST_SHAPE,
         "tensor \"%s\" in %s: expected %s from config.json, found %s; config.json and the weights "
         "do not belong together",
         name, ckpt->shards[checkpoint_find(ckpt, name)->shard].path, expected, found);
}

enum status checkpoint_get_shape(const struct checkpoint *ckpt, const char *name, int32_t d0,
                                 int32_t d1, struct tensor *out)
{
    const int32_t dims[2] = {d0, d1};
    TRY(get_checked(ckpt, name, dims, d1 ? 2 : 1, out));
    if (out->dtype != DT_F32 && out->dtype != DT_F16 && out->dtype != DT_BF16) {
        const char *found = dtype_name(out->dtype);
        *out = (struct tensor){0};
        FAIL(ST_FORMAT, "tensor \"%s\" in %s: expected weights as F32, F16 or BF16, found %s", name,
             ckpt->shards[checkpoint_find(ckpt, name)->shard].path, found);
    }
    return ST_OK;
}

/* ---- nested matrices ---- */

/* NAME.what or, with bits, NAME.what.bits; of one dtype and shape. */
static enum status get_part(const struct checkpoint *ckpt, const char *name, const char *what,
                            int bits, enum dtype dtype, const int32_t *dims, int32_t n_dims,
                            struct tensor *out)
{
    char full[NAME_BYTES];
    int n = bits ? snprintf(full, sizeof full, "%s.%s.%d", name, what, bits)
                 : snprintf(full, sizeof full, "%s.%s", name, what);
    if (n < 0 || n >= NAME_BYTES) {
        FAIL(ST_FORMAT, "%s: the name of linear \"%.80s...\" is longer than %d bytes", ckpt->path,
             name, (int)NAME_BYTES - 16);
    }
    TRY(get_checked(ckpt, full, dims, n_dims, out));
    if (out->dtype != dtype) {
        FAIL(ST_SHAPE, "tensor \"%s\" in %s: expected dtype %s, found %s; quantise the model again",
             full, ckpt->path, dtype_name(dtype), dtype_name(out->dtype));
    }
    return ST_OK;
}

static enum status get_level(const struct checkpoint *ckpt, const char *name, const char *what,
                             int bits, const int32_t *dims, int32_t n_dims, const uint16_t **out)
{
    struct tensor t;
    TRY(get_part(ckpt, name, what, bits, DT_F16, dims, n_dims, &t));
    *out = t.data;
    return ST_OK;
}

static enum status get_levels(const struct checkpoint *ckpt, const char *name, int bits,
                              struct nested_source *w)
{
    const int32_t grid[3] = {w->n_rows, nested_n_groups(w), bits};
    const int32_t table[2] = {w->n_rows, 1 << bits};
    switch (w->kind[bits]) {
    case LEVEL_TAIL:
        TRY(get_level(ckpt, name, "tail", bits, grid, 2, &w->tail));
        // fall through - a tail stands on a scale and an offset
    case LEVEL_TIED:
        TRY(get_level(ckpt, name, "scale", bits, grid, 2, &w->scale[bits]));
        TRY(get_level(ckpt, name, "offset", bits, grid, 2, &w->offset[bits]));
        break;
    case LEVEL_FREE:
        TRY(get_level(ckpt, name, "alpha", bits, grid, 3, &w->alpha[bits]));
        TRY(get_level(ckpt, name, "offset", bits, grid, 2, &w->offset[bits]));
        break;
    case LEVEL_LUT:
        TRY(get_level(ckpt, name, "lut", bits, table, 2, &w->lut[bits]));
        break;
    case LEVEL_NONE:
    case LEVEL_N:
        break;
    }
    return ST_OK;
}

enum status checkpoint_get_nested(const struct checkpoint *ckpt, const char *name,
                                  const enum level_kind kinds[BITS_ALL], int32_t n_rows,
                                  int32_t n_cols, int32_t group_cols, int32_t n_planes,
                                  struct nested_source *out)
{
    *out = (struct nested_source){0};
    if (n_rows < 1 || n_cols < 1 || group_cols < 8 || group_cols % 8 != 0 ||
        n_cols > INT32_MAX - group_cols || n_planes < 1 || n_planes > BITS_MAX) {
        FAIL(ST_FORMAT, "%s: linear \"%s\": %d rows, %d columns, groups of %d, %d planes cannot be",
             ckpt->path, name, n_rows, n_cols, group_cols, n_planes);
    }
    int32_t n_groups = (n_cols + group_cols - 1) / group_cols;
    struct nested_source w = {.n_rows = n_rows,
                              .n_cols = n_cols,
                              .group_cols = group_cols,
                              .n_cols_padded = n_groups * group_cols,
                              .n_planes = n_planes};
    const int32_t planes[3] = {n_planes, n_rows, w.n_cols_padded / 8};
    struct tensor t;
    TRY(get_part(ckpt, name, "planes", 0, DT_U8, planes, 3, &t));
    w.planes = t.data;
    for (int b = 1; b <= BITS_MAX; b++) {
        w.kind[b] = kinds[b];
        if (kinds[b] == LEVEL_NONE) {
            continue;
        }
        if (b > n_planes || (kinds[b] == LEVEL_TAIL && b != BITS_MAX) || kinds[b] >= LEVEL_N) {
            FAIL(ST_FORMAT,
                 "%s: linear \"%s\" cannot hold %s levels of precision %d with %d planes",
                 ckpt->path, name, level_kind_name(kinds[b]), b, n_planes);
        }
        TRY(get_levels(ckpt, name, b, &w));
    }
    *out = w;
    return ST_OK;
}

/* ---- digest ---- */

static void digest_u64(XXH3_state_t *state, uint64_t value)
{
    unsigned char bytes[8];
    for (int i = 0; i < 8; i++) {
        bytes[i] = (unsigned char)(value >> 8 * i);
    }
    XXH3_128bits_update(state, bytes, sizeof bytes);
}

/* Length first, so that no two sequences of texts read the same. */
static void digest_text(XXH3_state_t *state, const char *text)
{
    digest_u64(state, strlen(text));
    XXH3_128bits_update(state, text, strlen(text));
}

static enum status digest_file(XXH3_state_t *state, const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f) {
        FAIL(ST_IO, "cannot open %s: %s", path, strerror(errno));
    }
    unsigned char block[4096];
    uint64_t total = 0;
    size_t n;
    while ((n = fread(block, 1, sizeof block, f)) > 0) {
        XXH3_128bits_update(state, block, n);
        total += n;
    }
    bool failed = ferror(f) != 0;
    int why = errno;
    fclose(f);
    if (failed) {
        FAIL(ST_IO, "cannot read %s: %s", path, strerror(why));
    }
    digest_u64(state, total);
    return ST_OK;
}

void checkpoint_done_with(const struct checkpoint *ckpt, const char *name)
{
    const struct entry *e = checkpoint_find(ckpt, name);
    if (!e) {
        return;
    }
    const struct shard *s = &ckpt->shards[e->shard];
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)s->map + s->data_at + e->begin;
    uintptr_t first = (begin + page - 1) / page * page, last = (begin + e->bytes) / page * page;
    if (last > first) {
        (void)madvise((void *)first, last - first, MADV_DONTNEED);
    }
}

enum status checkpoint_digest(const struct checkpoint *ckpt, const char *folder,
                              char out[DIGEST_TEXT])
{
    char path[CHECKPOINT_PATH_BYTES];
    TRY(checkpoint_join(path, folder, "config.json"));
    XXH3_state_t *state = XXH3_createState();
    if (!state) {
        FAIL(ST_NOMEM, "out of memory for a digest");
    }
    XXH3_128bits_reset(state);
    enum status st = ST_OK;
    TRY_GOTO(st, digest_file(state, path), done);
    for (int32_t i = 0; i < ckpt->n_entries; i++) {
        const struct entry *e = &ckpt->entries[i];
        digest_text(state, e->name);
        digest_text(state, e->dtype_text);
        digest_u64(state, (uint64_t)e->n_dims);
        for (int32_t d = 0; d < e->n_dims; d++) {
            digest_u64(state, (uint64_t)e->dims[d]);
        }
        digest_u64(state, e->bytes);
        XXH3_128bits_update(state, entry_data(ckpt, e), e->bytes);
    }
    XXH128_hash_t hash = XXH3_128bits_digest(state);
    snprintf(out, DIGEST_TEXT, "%016llx%016llx", (unsigned long long)hash.high64,
             (unsigned long long)hash.low64);
done:
    XXH3_freeState(state);
    return st;
}
