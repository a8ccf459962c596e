/* Datasets as HDF5 files. SPDX-License-Identifier: Apache-2.0 */
#include "sched/dataset.h"

#include <math.h>
#include <string.h>

#include "core/h5.h"
#include "core/mem.h"

static const struct {
    const char *name;
    size_t offset, bytes;
} texts[] = {
#define TEXT(member)                                     \
    {                                                    \
#member, offsetof(struct dataset_facts, member), \
            sizeof(((struct dataset_facts *)0)->member)  \
    }
    TEXT(model_digest), TEXT(reference_digest), TEXT(high),
    TEXT(low),          TEXT(reference),        TEXT(criterion),
#undef TEXT
};
enum { N_TEXTS = sizeof texts / sizeof *texts };

/* A row of the table "rows". */
struct file_row {
    uint64_t key[2], prompt_hash;
    int64_t ordinal;
    int32_t prefix, split, label, n_tok, n_new;
    float high_score;
    const char *id, *task, *prompt, *reference, *high;
};
static const struct h5_column row_columns[] = {
#define COLUMN(name, kind, about)                                   \
    {                                                               \
#name, kind, offsetof(struct file_row, name), 0, "1", about \
    }
    {"key0", COL_U64, offsetof(struct file_row, key), 0, "1", "hash of all the row depends on"},
    {"key1", COL_U64, offsetof(struct file_row, key) + sizeof(uint64_t), 0, "1", "its second half"},
    COLUMN(prompt_hash, COL_U64, "of the whole prompt's text; the split follows from it"),
    COLUMN(ordinal, COL_I64, "of the prompt in its file"),
    COLUMN(prefix, COL_I32, "0: the whole prompt; i: its i-th random prefix"),
    COLUMN(split, COL_I32, "0 train, 1 validation, 2 test"),
    COLUMN(label, COL_I32, "class: index into class_at"),
    COLUMN(n_tok, COL_I32, "prompt tokens"),
    COLUMN(n_new, COL_I32, "tokens of the high level's text"),
    COLUMN(high_score, COL_F32, "of the high level's text against the reference's"),
    COLUMN(id, COL_TEXT, "of the prompt in its file"),
    COLUMN(task, COL_TEXT, "of the prompt in its file"),
    COLUMN(prompt, COL_TEXT, "what was continued"),
    COLUMN(reference, COL_TEXT, "the reference model's text"),
    COLUMN(high, COL_TEXT, "the high level's text"),
#undef COLUMN
};
enum { N_ROW_COLUMNS = sizeof row_columns / sizeof *row_columns };

struct candidate_row {
    int32_t row, candidate;
    const char *text;
};
static const struct h5_column candidate_columns[] = {
    {"row", COL_I32, offsetof(struct candidate_row, row), 0, "1", "of the table rows"},
    {"candidate", COL_I32, offsetof(struct candidate_row, candidate), 0, "1", "class"},
    {"text", COL_TEXT, offsetof(struct candidate_row, text), 0, "text", "under that switch"},
};
enum { N_CANDIDATE_COLUMNS = sizeof candidate_columns / sizeof *candidate_columns };

/* ---- writing ---- */

static enum status write_facts(hid_t file, const struct dataset *d)
{
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID;
    hsize_t n = (hsize_t)d->facts.n_candidates + 1;
    TRY(h5_attribute(file, "format", DATASET_FORMAT));
    TRY(h5_attribute(file, "format_version", DATASET_FORMAT_VERSION));
    for (int i = 0; i < N_TEXTS; i++) {
        TRY(h5_attribute(file, texts[i].name, (const char *)&d->facts + texts[i].offset));
    }
    TRY(h5_scalar_text(file, "provenance", d->provenance ? d->provenance : "", "how it was made"));
    TRY(h5_scalar_i64(file, "max_new_tokens", d->facts.max_new_tokens, "tokens", "T"));
    TRY(h5_scalar_i64(file, "n_kv_heads", d->facts.n_kv_heads, "1", "heads of K and V; 1: mean"));
    TRY(h5_scalar_i64(file, "head_dim", d->facts.head_dim, "1", "width of K and V"));
    TRY(h5_scalar_f64(file, "tolerance", d->facts.tolerance, "1",
                      "by which a score may be below the high level's"));
    TRY(h5_array_create(&set, file, "class_at", H5T_IEEE_F64LE, 1, &n, "1",
                        "fraction of max_new_tokens at which a class switches to the low level; 1: "
                        "never"));
    TRY_GOTO(st, h5_array_write(set, H5T_NATIVE_DOUBLE, 0, n, d->facts.class_at), done);
done:
    H5Dclose(set);
    return st;
}

static enum status write_rows(hid_t file, const struct dataset *d)
{
    enum status st = ST_OK;
    struct h5_table t;
    TRY(h5_table_begin(&t, file, "rows", "one per prompt or prefix", row_columns, N_ROW_COLUMNS,
                       sizeof(struct file_row), (uint64_t)d->n));
    for (int32_t i = 0; i < d->n; i++) {
        const struct dataset_row *r = &d->rows[i];
        struct file_row f = {.key = {r->key[0], r->key[1]},
                             .prompt_hash = r->prompt_hash,
                             .ordinal = r->ordinal,
                             .prefix = r->prefix,
                             .split = (int32_t)dataset_split_of(r->prompt_hash),
                             .label = r->label,
                             .n_tok = r->n_tok,
                             .n_new = r->n_new,
                             .high_score = r->high_score,
                             .id = r->id,
                             .task = r->task,
                             .prompt = r->prompt,
                             .reference = r->reference,
                             .high = r->high};
        TRY_GOTO(st, h5_table_put(&t, &f), done);
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_candidates(hid_t file, const struct dataset *d)
{
    enum status st = ST_OK;
    struct h5_table t;
    int32_t k = d->facts.n_candidates;
    TRY(h5_table_begin(&t, file, "candidates", "texts under each candidate switch",
                       candidate_columns, N_CANDIDATE_COLUMNS, sizeof(struct candidate_row),
                       (uint64_t)d->n * (uint64_t)k));
    for (int32_t i = 0; i < d->n; i++) {
        for (int32_t j = 0; j < k; j++) {
            struct candidate_row f = {i, j, d->rows[i].candidate[j]};
            TRY_GOTO(st, h5_table_put(&t, &f), done);
        }
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

/* An array whose rows are those of each dataset row in turn. what: 0 scores, 1 features (turned to
 * (token, K or V, dimension)), 2 signals. */
enum ragged { SCORES, FEATURES, SIGNALS };

static int64_t ragged_length(const struct dataset_row *r, enum ragged what)
{
    return what == SCORES ? 1 : what == FEATURES ? r->n_tok : r->n_new;
}

/* (2, heads, n, d) to (n, 2, heads, d), or back. */
static void turn(float *out, const float *in, int32_t n, const struct dataset_facts *f, bool back)
{
    size_t d = (size_t)f->head_dim, heads = 2 * (size_t)f->n_kv_heads;
    for (size_t h = 0; h < heads; h++) {
        for (size_t t = 0; t < (size_t)n; t++) {
            size_t apart = (h * (size_t)n + t) * d, together = (heads * t + h) * d;
            memcpy(out + (back ? apart : together), in + (back ? together : apart),
                   d * sizeof *out);
        }
    }
}

static enum status write_ragged(hid_t parent, const struct dataset *d, enum ragged what,
                                const char *name, int rank, const hsize_t *row, const char *about)
{
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID;
    hsize_t dims[3] = {0, row[0], row[1]}, at = 0;
    float *turned = NULL;
    size_t most = 0;
    for (int32_t i = 0; i < d->n; i++) {
        size_t n = (size_t)ragged_length(&d->rows[i], what);
        dims[0] += n;
        most = n > most ? n : most;
    }
    TRY_GOTO(st,
             MEM_NEW(&turned, most * 2 * (size_t)d->facts.n_kv_heads * (size_t)d->facts.head_dim),
             done);
    TRY_GOTO(st, h5_array_create(&set, parent, name, H5T_IEEE_F32LE, rank, dims, "1", about), done);
    for (int32_t i = 0; i < d->n; i++) {
        const struct dataset_row *r = &d->rows[i];
        const float *data = what == SCORES ? r->scores : r->signals;
        if (what == FEATURES) {
            turn(turned, r->features, r->n_tok, &d->facts, false);
            data = turned;
        }
        hsize_t n = (hsize_t)ragged_length(r, what);
        TRY_GOTO(st, h5_array_write(set, H5T_NATIVE_FLOAT, at, n, data), done);
        at += n;
    }
done:
    H5Dclose(set);
    mem_free(turned);
    return st;
}

static enum status write_group(hid_t file, const struct dataset *d, enum ragged what,
                               const char *name, int rank, const hsize_t *row, const char *about)
{
    enum status st = ST_OK;
    hid_t group = H5I_INVALID_HID, set = H5I_INVALID_HID;
    hsize_t n = (hsize_t)d->n + 1;
    int64_t *offset = NULL;
    TRY_GOTO(st, MEM_NEW(&offset, n), done);
    for (int32_t i = 0; i < d->n; i++) {
        offset[i + 1] = offset[i] + ragged_length(&d->rows[i], what);
    }
    TRY_GOTO(st, h5_group(&group, file, name, "row i has offset[i] to offset[i + 1] of values"),
             done);
    TRY_GOTO(st, write_ragged(group, d, what, "values", rank, row, about), done);
    TRY_GOTO(st, h5_array_create(&set, group, "offset", H5T_STD_I64LE, 1, &n, "1", "into values"),
             done);
    TRY_GOTO(st, h5_array_write(set, H5T_NATIVE_INT64, 0, n, offset), done);
done:
    H5Dclose(set);
    H5Gclose(group);
    mem_free(offset);
    return st;
}

enum status dataset_write(const struct dataset *d, const char *path)
{
    hid_t file = H5I_INVALID_HID;
    const hsize_t score[2] = {(hsize_t)d->facts.n_candidates, 0},
                  feature[2] = {2, (hsize_t)d->facts.n_kv_heads * (hsize_t)d->facts.head_dim},
                  signal[2] = {DATASET_N_SIGNALS, 0};
    h5_quiet();
    TRY(h5_create(&file, path));
    enum status st = write_facts(file, d);
    st = st ? st : write_rows(file, d);
    st = st ? st : write_candidates(file, d);
    st = st ? st
            : write_ragged(file, d, SCORES, "scores", 2, score,
                           "(row, candidate): of its text against the reference's");
    st =
        st ? st
           : write_group(file, d, FEATURES, "kv_features", 3, feature,
                         "(token, K or V, heads * dimension): last layer after prefill at the high "
                         "level");
    st = st ? st
            : write_group(file, d, SIGNALS, "signals", 2, signal,
                          "(token, signal): logprob, entropy, margin of the high level's tokens");
    st = st ? st : h5_save(file, path);
    H5Fclose(file);
    return st;
}

/* ---- reading ---- */

static enum status read_number(hid_t file, const char *name, hid_t type, void *out)
{
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID, space = H5I_INVALID_HID, disk = H5I_INVALID_HID;
    TRY_H5(st, set = H5Dopen2(file, name, H5P_DEFAULT), done, name);
    TRY_H5(st, space = H5Dget_space(set), done, name);
    TRY_H5(st, disk = H5Dget_type(set), done, name);
    if (H5Sget_simple_extent_npoints(space) != 1 || H5Tget_class(disk) != H5Tget_class(type)) {
        FAIL_GOTO(st, ST_FORMAT, done, "/%s is not one number", name);
    }
    TRY_H5(st, H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, out), done, name);
done:
    H5Tclose(disk);
    H5Sclose(space);
    H5Dclose(set);
    return st;
}

static enum status read_facts(struct dataset *d, hid_t file)
{
    enum { MOST_NEW = 1 << 24 };
    struct dataset_facts *f = &d->facts;
    char format[64];
    int64_t n_new = 0, head_dim = 0, heads = 0;
    hsize_t n = 0;
    double *at = NULL;
    hid_t set = H5I_INVALID_HID;
    if (h5_copy_attribute(format, sizeof format, file, "format") != ST_OK ||
        strcmp(format, DATASET_FORMAT) != 0) {
        FAIL(ST_FORMAT, "an HDF5 file, but not a dataset; expected the attribute format to be "
                        "\"" DATASET_FORMAT "\", as pmpd dataset writes it");
    }
    TRY(h5_copy_attribute(format, sizeof format, file, "format_version"));
    if (strcmp(format, DATASET_FORMAT_VERSION) != 0) {
        FAIL(ST_FORMAT, "a dataset of format version %s; this program reads version %s", format,
             DATASET_FORMAT_VERSION);
    }
    for (int i = 0; i < N_TEXTS; i++) {
        TRY(h5_copy_attribute((char *)f + texts[i].offset, texts[i].bytes, file, texts[i].name));
    }
    TRY(read_number(file, "max_new_tokens", H5T_NATIVE_INT64, &n_new));
    TRY(read_number(file, "head_dim", H5T_NATIVE_INT64, &head_dim));
    TRY(read_number(file, "n_kv_heads", H5T_NATIVE_INT64, &heads));
    TRY(read_number(file, "tolerance", H5T_NATIVE_DOUBLE, &f->tolerance));
    TRY(h5_array_read((void **)&at, file, "class_at", H5T_NATIVE_DOUBLE, 1, &n,
                      CLASSIFIER_MAX_CLASSES));
    bool good = n >= 2 && at[n - 1] == 1 && n_new >= 1 && n_new <= MOST_NEW && head_dim >= 1 &&
                head_dim <= CLASSIFIER_MAX_WIDTH && heads >= 1 &&
                heads <= CLASSIFIER_MAX_WIDTH / head_dim && f->tolerance >= 0;
    for (hsize_t i = 0; good && i < n; i++) {
        good = at[i] >= 0 && at[i] <= 1 && (i == 0 || at[i] > at[i - 1]);
        f->class_at[i] = at[i];
    }
    mem_free(at);
    if (!good) {
        FAIL(ST_FORMAT,
             "its max_new_tokens, head_dim, n_kv_heads, tolerance or class_at make no dataset");
    }
    f->max_new_tokens = (int32_t)n_new;
    f->head_dim = (int32_t)head_dim;
    f->n_kv_heads = (int32_t)heads;
    f->n_candidates = (int32_t)n - 1;
    TRY_H5_PLAIN(set = H5Dopen2(file, "provenance", H5P_DEFAULT), "provenance");
    enum status st = h5_read_text(&d->provenance, set, false, "provenance");
    H5Dclose(set);
    return st;
}

enum { MOST_ROWS = 1 << 26 };

static enum status take_row(struct dataset *d, const struct file_row *f)
{
    struct dataset_row r = {.key = {f->key[0], f->key[1]},
                            .prompt_hash = f->prompt_hash,
                            .ordinal = f->ordinal,
                            .prefix = f->prefix,
                            .label = f->label,
                            .n_tok = f->n_tok,
                            .n_new = f->n_new,
                            .high_score = f->high_score};
    const char *const from[] = {f->id, f->task, f->prompt, f->reference, f->high};
    char **const to[] = {&r.id, &r.task, &r.prompt, &r.reference, &r.high};
    enum status st = ST_OK;
    if (r.label < 0 || r.label > d->facts.n_candidates || r.n_tok < 1 || r.n_new < 1 ||
        r.n_new > d->facts.max_new_tokens) {
        FAIL(ST_FORMAT, "row %d has class %d and %d and %d tokens", d->n, r.label, r.n_tok,
             r.n_new);
    }
    for (int i = 0; i < 5; i++) {
        TRY_GOTO(st, mem_strdup(to[i], from[i] ? from[i] : ""), fail);
    }
    return dataset_add(d, &r);
fail:
    dataset_row_free(&r);
    return st;
}

static enum status read_rows(struct dataset *d, hid_t file)
{
    enum status st = ST_OK;
    struct h5_rows rows, texts_of = {.type = H5I_INVALID_HID, .space = H5I_INVALID_HID};
    TRY(h5_rows_read(&rows, file, "rows", row_columns, N_ROW_COLUMNS, sizeof(struct file_row),
                     MOST_ROWS));
    for (uint64_t i = 0; i < rows.n; i++) {
        TRY_GOTO(st, take_row(d, (const struct file_row *)rows.rows + i), done);
    }
    TRY_GOTO(st,
             h5_rows_read(&texts_of, file, "candidates", candidate_columns, N_CANDIDATE_COLUMNS,
                          sizeof(struct candidate_row), rows.n * (uint64_t)d->facts.n_candidates),
             done);
    for (uint64_t i = 0; i < texts_of.n; i++) {
        const struct candidate_row *c = (const struct candidate_row *)texts_of.rows + i;
        if (c->row < 0 || c->row >= d->n || c->candidate < 0 ||
            c->candidate >= d->facts.n_candidates || d->rows[c->row].candidate[c->candidate]) {
            FAIL_GOTO(st, ST_FORMAT, done, "/candidates names row %d, candidate %d", c->row,
                      c->candidate);
        }
        TRY_GOTO(st, mem_strdup(&d->rows[c->row].candidate[c->candidate], c->text ? c->text : ""),
                 done);
    }
    if (texts_of.n != rows.n * (uint64_t)d->facts.n_candidates) {
        FAIL_GOTO(st, ST_FORMAT, done, "/candidates lacks texts");
    }
done:
    h5_rows_free(&texts_of);
    h5_rows_free(&rows);
    return st;
}

static enum status read_ragged(struct dataset *d, hid_t parent, enum ragged what, const char *name,
                               int rank, const hsize_t *row)
{
    enum status st = ST_OK;
    hsize_t dims[3] = {0}, total = 0, width = row[0] * (rank == 3 ? row[1] : 1);
    float *values = NULL;
    for (int32_t i = 0; i < d->n; i++) {
        total += (hsize_t)ragged_length(&d->rows[i], what);
    }
    TRY(h5_array_read((void **)&values, parent, name, H5T_NATIVE_FLOAT, rank, dims, total * width));
    if (dims[0] != total || dims[1] != row[0] || (rank == 3 && dims[2] != row[1])) {
        FAIL_GOTO(st, ST_FORMAT, done, "%s has %llu rows of %llu; expected %llu of %llu", name,
                  (unsigned long long)dims[0], (unsigned long long)dims[1],
                  (unsigned long long)total, (unsigned long long)row[0]);
    }
    for (hsize_t i = 0; i < total * width; i++) {
        if (!isfinite(values[i])) {
            FAIL_GOTO(st, ST_FORMAT, done, "%s holds values that are not finite", name);
        }
    }
    const float *at = values;
    for (int32_t i = 0; i < d->n; i++) {
        struct dataset_row *r = &d->rows[i];
        size_t n = (size_t)ragged_length(r, what) * (size_t)width;
        if (what == SCORES) {
            memcpy(r->scores, at, n * sizeof *at);
        } else {
            float **to = what == FEATURES ? &r->features : &r->signals;
            TRY_GOTO(st, MEM_NEW(to, n), done);
            if (what == FEATURES) {
                turn(*to, at, r->n_tok, &d->facts, true);
            } else {
                memcpy(*to, at, n * sizeof *at);
            }
        }
        at += n;
    }
done:
    mem_free(values);
    return st;
}

static enum status read_file(struct dataset *d, hid_t file)
{
    TRY(read_facts(d, file));
    TRY(read_rows(d, file));
    const hsize_t score[2] = {(hsize_t)d->facts.n_candidates, 0},
                  feature[2] = {2, (hsize_t)d->facts.n_kv_heads * (hsize_t)d->facts.head_dim},
                  signal[2] = {DATASET_N_SIGNALS, 0};
    TRY(read_ragged(d, file, SCORES, "scores", 2, score));
    TRY(read_ragged(d, file, FEATURES, "kv_features/values", 3, feature));
    return read_ragged(d, file, SIGNALS, "signals/values", 2, signal);
}

enum status dataset_read(struct dataset *out, const char *path)
{
    hid_t file = H5I_INVALID_HID;
    *out = (struct dataset){0};
    h5_quiet();
    TRY(h5_open(&file, path));
    enum status st = read_file(out, file);
    H5Fclose(file);
    if (st != ST_OK) {
        dataset_free(out);
        return status_prefix(st, "%s: ", path);
    }
    return ST_OK;
}
