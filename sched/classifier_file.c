/* Classifiers as HDF5 files. SPDX-License-Identifier: Apache-2.0 */
#include "sched/classifier.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "core/h5.h"
#include "core/mem.h"

static const char *const kind_names[] = {"kv", "step"};

/* The shape as a row of the table "shape". */
static const struct h5_column shape_columns[] = {
    {"head_dim", COL_I32, offsetof(struct classifier_shape, head_dim), 0, "1", "of K and V"},
    {"n_kv_heads", COL_I32, offsetof(struct classifier_shape, n_kv_heads), 0, "1",
     "heads of the features; 1: their mean"},
    {"n_groups", COL_I32, offsetof(struct classifier_shape, n_groups), 0, "1",
     "pooled vectors of head_dim"},
    {"n_queries", COL_I32, offsetof(struct classifier_shape, n_queries), 0, "1",
     "queries averaged in a pooled vector"},
    {"n_in", COL_I32, offsetof(struct classifier_shape, n_in), 0, "1", "width of layer norm"},
    {"n_hidden", COL_I32, offsetof(struct classifier_shape, n_hidden), 0, "1", "width of the MLP"},
    {"n_classes", COL_I32, offsetof(struct classifier_shape, n_classes), 0, "1", "classes"},
};
enum { N_SHAPE_COLUMNS = sizeof shape_columns / sizeof *shape_columns };

/* The arrays of a file and where they live. */
struct part {
    const char *name, *about;
    float *values;
    int rank;
    hsize_t dims[3];
};
enum { MOST_PARTS = 9, DEFLATE_AT_MOST = 1100 /* as in core/h5.c */ };

static int list_parts(struct part parts[MOST_PARTS], const struct classifier *c)
{
    const struct classifier_shape *s = &c->shape;
    struct classifier_view v = classifier_view(s, c->params);
    hsize_t in = (hsize_t)s->n_in, hidden = (hsize_t)s->n_hidden, classes = (hsize_t)s->n_classes;
    int n = 0;
    if (s->kind == CLASSIFIER_KV) {
        parts[n++] =
            (struct part){"query",
                          "(group, query, dimension)",
                          v.query,
                          3,
                          {(hsize_t)s->n_groups, (hsize_t)s->n_queries, (hsize_t)s->head_dim}};
    } else {
        parts[n++] = (struct part){"shift", "subtracted from the signals", c->shift, 1, {in}};
        parts[n++] = (struct part){"scale", "multiplied after that", c->scale, 1, {in}};
    }
    parts[n++] = (struct part){"norm_gain", "of layer norm", v.gain, 1, {in}};
    parts[n++] = (struct part){"norm_bias", "of layer norm", v.bias, 1, {in}};
    parts[n++] = (struct part){"w1", "(hidden, in) first layer", v.w1, 2, {hidden, in}};
    parts[n++] = (struct part){"b1", "(hidden)", v.b1, 1, {hidden}};
    parts[n++] = (struct part){"w2", "(class, hidden) second layer", v.w2, 2, {classes, hidden}};
    parts[n++] = (struct part){"b2", "(class)", v.b2, 1, {classes}};
    return n;
}

static enum status write_array(hid_t file, const char *name, hid_t disk, hid_t memory, int rank,
                               const hsize_t *dims, const char *about, const void *values)
{
    hid_t set = H5I_INVALID_HID;
    TRY(h5_array_create(&set, file, name, disk, rank, dims, "1", about));
    enum status st = h5_array_write(set, memory, 0, dims[0], values);
    H5Dclose(set);
    return st;
}

static enum status fill_file(hid_t file, const struct classifier *c)
{
    enum status st = ST_OK;
    struct h5_table table = {.memory = H5I_INVALID_HID, .set = H5I_INVALID_HID};
    struct part parts[MOST_PARTS];
    hsize_t n_classes = (hsize_t)c->shape.n_classes;
    int n = list_parts(parts, c);
    TRY(h5_attribute(file, "format", CLASSIFIER_FORMAT));
    TRY(h5_attribute(file, "format_version", CLASSIFIER_FORMAT_VERSION));
    TRY(h5_attribute(file, "kind", kind_names[c->shape.kind]));
    TRY(h5_attribute(file, "model_digest", c->facts.model_digest));
    TRY(h5_attribute(file, "high", c->facts.high));
    TRY(h5_attribute(file, "low", c->facts.low));
    TRY(h5_scalar_text(file, "training", c->training ? c->training : "", "how it was made"));
    TRY(h5_table_begin(&table, file, "shape", "sizes", shape_columns, N_SHAPE_COLUMNS,
                       sizeof c->shape, 1));
    TRY_GOTO(st, h5_table_put(&table, &c->shape), done);
    TRY_GOTO(st, h5_table_end(&table), done);
    TRY_GOTO(st,
             write_array(file, "class_at", H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, 1, &n_classes,
                         "fraction of max_new_tokens at which a class switches; 1: never",
                         c->facts.class_at),
             done);
    for (int i = 0; i < n; i++) {
        TRY_GOTO(st,
                 write_array(file, parts[i].name, H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, parts[i].rank,
                             parts[i].dims, parts[i].about, parts[i].values),
                 done);
    }
done:
    h5_table_close(&table);
    return st;
}

enum status classifier_write(const struct classifier *c, const char *path)
{
    hid_t file = H5I_INVALID_HID;
    TRY(h5_create(&file, path));
    enum status st = fill_file(file, c);
    if (st == ST_OK) {
        st = h5_save(file, path);
    }
    H5Fclose(file);
    return st;
}

static enum status read_kind(struct classifier_shape *shape, hid_t file)
{
    char text[64];
    enum status st = h5_copy_attribute(text, sizeof text, file, "format");
    if (st != ST_OK || strcmp(text, CLASSIFIER_FORMAT) != 0) {
        FAIL(ST_FORMAT, "an HDF5 file, but not a classifier; expected the attribute format to be "
                        "\"" CLASSIFIER_FORMAT "\", as pmpd train writes it");
    }
    TRY(h5_copy_attribute(text, sizeof text, file, "format_version"));
    if (strcmp(text, CLASSIFIER_FORMAT_VERSION) != 0) {
        FAIL(ST_FORMAT, "a classifier of format version %s; this program reads version %s", text,
             CLASSIFIER_FORMAT_VERSION);
    }
    TRY(h5_copy_attribute(text, sizeof text, file, "kind"));
    for (int i = 0; i < 2; i++) {
        if (strcmp(text, kind_names[i]) == 0) {
            shape->kind = (enum classifier_kind)i;
            return ST_OK;
        }
    }
    FAIL(ST_FORMAT, "a classifier of kind \"%s\"; expected kv or step", text);
}

static enum status read_shape(struct classifier_shape *shape, hid_t file)
{
    struct h5_rows rows;
    TRY(read_kind(shape, file));
    enum classifier_kind kind = shape->kind;
    TRY(h5_rows_read(&rows, file, "shape", shape_columns, N_SHAPE_COLUMNS, sizeof *shape, 1));
    if (rows.n == 1) {
        memcpy(shape, rows.rows, sizeof *shape);
    }
    bool one = rows.n == 1;
    shape->kind = kind;
    h5_rows_free(&rows);
    if (!one || classifier_shape_check(shape) != ST_OK) {
        FAIL(ST_FORMAT, "its sizes make no classifier: %s", one ? status_message() : "none given");
    }
    return ST_OK;
}

static enum status read_part(hid_t file, const struct part *part)
{
    enum status st = ST_OK;
    hsize_t dims[3] = {0};
    float *values = NULL;
    uint64_t n = 1;
    for (int i = 0; i < part->rank; i++) {
        n *= part->dims[i];
    }
    TRY(h5_array_read((void **)&values, file, part->name, H5T_NATIVE_FLOAT, part->rank, dims, n));
    for (int i = 0; i < part->rank; i++) {
        if (dims[i] != part->dims[i]) {
            FAIL_GOTO(st, ST_FORMAT, done, "/%s has %llu in dimension %d; its sizes say %llu",
                      part->name, (unsigned long long)dims[i], i,
                      (unsigned long long)part->dims[i]);
        }
    }
    for (uint64_t i = 0; i < n; i++) {
        if (!isfinite(values[i])) {
            FAIL_GOTO(st, ST_FORMAT, done, "/%s holds values that are not finite", part->name);
        }
        part->values[i] = values[i];
    }
done:
    mem_free(values);
    return st;
}

static enum status read_classes(struct classifier *c, hid_t file)
{
    enum status st = ST_OK;
    hsize_t n = 0;
    double *at = NULL;
    TRY(h5_array_read((void **)&at, file, "class_at", H5T_NATIVE_DOUBLE, 1, &n,
                      CLASSIFIER_MAX_CLASSES));
    bool good = n == (hsize_t)c->shape.n_classes;
    for (hsize_t i = 0; good && i < n; i++) {
        good = at[i] >= 0 && at[i] <= 1 && (i == 0 || at[i] > at[i - 1]);
    }
    if (!good) {
        FAIL_GOTO(st, ST_FORMAT, done, "/class_at does not hold %d ascending fractions from 0 to 1",
                  c->shape.n_classes);
    }
    memcpy(c->facts.class_at, at, n * sizeof *at);
done:
    mem_free(at);
    return st;
}

static enum status read_file(struct classifier *out, hid_t file)
{
    struct classifier_shape shape = {0};
    struct part parts[MOST_PARTS];
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID;
    char *training = NULL;
    hsize_t bytes = 0;
    TRY(read_shape(&shape, file));
    TRY_H5_PLAIN(H5Fget_filesize(file, &bytes), "file");
    if (classifier_n_params(&shape) / DEFLATE_AT_MOST > bytes / sizeof(float)) {
        FAIL(ST_FORMAT, "its sizes ask for %zu parameters, but the file has only %llu bytes",
             classifier_n_params(&shape), (unsigned long long)bytes);
    }
    TRY(classifier_create(out, &shape));
    TRY(h5_copy_attribute(out->facts.model_digest, sizeof out->facts.model_digest, file,
                          "model_digest"));
    TRY(h5_copy_attribute(out->facts.high, sizeof out->facts.high, file, "high"));
    TRY(h5_copy_attribute(out->facts.low, sizeof out->facts.low, file, "low"));
    TRY(read_classes(out, file));
    int n = list_parts(parts, out);
    for (int i = 0; i < n; i++) {
        TRY(read_part(file, &parts[i]));
    }
    TRY_H5_PLAIN(set = H5Dopen2(file, "training", H5P_DEFAULT), "training");
    st = h5_read_text(&training, set, false, "training");
    H5Dclose(set);
    if (st == ST_OK && training) {
        mem_free(out->training);
        out->training = training;
    }
    return st;
}

enum status classifier_read(struct classifier *out, const char *path)
{
    hid_t file = H5I_INVALID_HID;
    *out = (struct classifier){0};
    h5_quiet();
    TRY(h5_open(&file, path));
    enum status st = read_file(out, file);
    H5Fclose(file);
    if (st != ST_OK) {
        classifier_free(out);
        return status_prefix(st, "%s: ", path);
    }
    return ST_OK;
}

void classifier_digest(const struct classifier *c, char out[DIGEST_TEXT])
{
    /* the shape is int32s without padding; the rest part by part */
    XXH128_hash_t h = XXH3_128bits_withSeed(&c->shape, sizeof c->shape, 0);
    const struct {
        const void *data;
        size_t bytes;
    } parts[] = {
        {c->facts.model_digest, strlen(c->facts.model_digest) + 1},
        {c->facts.high, strlen(c->facts.high) + 1},
        {c->facts.low, strlen(c->facts.low) + 1},
        {c->facts.class_at, (size_t)c->shape.n_classes * sizeof(double)},
        {c->params, c->n_params * sizeof(float)},
        {c->shift, c->shift ? (size_t)c->shape.n_in * sizeof(float) : 0},
        {c->scale, c->scale ? (size_t)c->shape.n_in * sizeof(float) : 0},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        h = XXH3_128bits_withSeed(parts[i].data, parts[i].bytes, h.low64 ^ (h.high64 * 3));
    }
    snprintf(out, DIGEST_TEXT, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
}
