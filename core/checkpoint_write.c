/* SPDX-License-Identifier: Apache-2.0 */
#include "core/checkpoint.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "core/mem.h"
#include "core/replace.h"

enum { HEADER_ALIGN = 8, LENGTH_BYTES = 8 };

struct checkpoint_writer {
    char *path, *temporary; /* owned */
    FILE *file;
    json_t *header;   /* name -> {dtype, shape, data_offsets}, in announced order */
    size_t announced; /* bytes of all announced tensors */
    size_t written;   /* bytes of data written so far */
    bool header_written, failed;
};

enum status checkpoint_writer_create(struct checkpoint_writer **out, const char *path)
{
    *out = NULL;
    struct checkpoint_writer *w = NULL;
    TRY(MEM_NEW(&w, 1));
    enum status st = ST_OK;
    TRY_GOTO(st, mem_strdup(&w->path, path), failed);
    TRY_GOTO(st, replace_name(&w->temporary, path), failed);
    w->header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    if (!w->header) {
        FAIL_GOTO(st, ST_NOMEM, failed, "out of memory for the header of %s", path);
    }
    w->file = fopen(w->temporary, "wb");
    if (!w->file) {
        FAIL_GOTO(st, ST_IO, failed, "cannot create %s: %s", w->temporary, strerror(errno));
    }
    *out = w;
    return ST_OK;
failed:
    checkpoint_writer_destroy(&w);
    return st;
}

enum status checkpoint_writer_announce(struct checkpoint_writer *w, const char *name,
                                       const struct tensor *t)
{
    if (w->header_written) {
        FAIL(ST_SHAPE, "%s: tensor \"%s\" is announced after the first bytes were written", w->path,
             name);
    }
    size_t element = dtype_bytes(t->dtype), bytes = element, end = 0;
    if (!element || t->n_dims < 1 || t->n_dims > TENSOR_MAX_DIMS) {
        FAIL(ST_SHAPE, "%s: tensor \"%s\" is announced without a dtype or a shape", w->path, name);
    }
    if (json_object_get(w->header, name)) {
        FAIL(ST_SHAPE, "%s: tensor \"%s\" is announced twice", w->path, name);
    }
    // the format allows no holes, so the order of the tensors is all that keeps data aligned
    if (w->announced % element != 0) {
        FAIL(ST_SHAPE,
             "%s: tensor \"%s\" (%s) would begin at byte %zu and could not be read in place; "
             "announce tensors with larger elements first",
             w->path, name, dtype_name(t->dtype), w->announced);
    }
    json_t *shape = json_array();
    bool good = shape != NULL;
    for (int32_t i = 0; i < t->n_dims; i++) {
        if (t->dims[i] < 0 || __builtin_mul_overflow(bytes, (size_t)t->dims[i], &bytes)) {
            json_decref(shape);
            FAIL(ST_SHAPE, "%s: tensor \"%s\" has an impossible shape", w->path, name);
        }
        good = good && json_array_append_new(shape, json_integer(t->dims[i])) == 0;
    }
    // offsets are JSON integers of 64 bits with a sign
    if (__builtin_add_overflow(w->announced, bytes, &end) || end > INT64_MAX) {
        json_decref(shape);
        FAIL(ST_SHAPE, "%s: the size of the file overflows at tensor \"%s\"", w->path, name);
    }
    json_t *info = good
                       ? json_pack("{s:s, s:O, s:[I, I]}", "dtype", dtype_name(t->dtype), "shape",
                                   shape, "data_offsets", (json_int_t)w->announced, (json_int_t)end)
                       : NULL;
    json_decref(shape);
    if (!info || json_object_set_new(w->header, name, info) != 0) {
        FAIL(ST_FORMAT,
             "%s: cannot announce tensor \"%s\": its name is not UTF-8, or out of memory", w->path,
             name);
    }
    w->announced = end;
    return ST_OK;
}

static enum status put(struct checkpoint_writer *w, const void *data, size_t bytes)
{
    if (bytes && fwrite(data, 1, bytes, w->file) != bytes) {
        w->failed = true;
        FAIL(ST_IO, "cannot write %s: %s", w->temporary, strerror(errno));
    }
    return ST_OK;
}

static enum status write_header(struct checkpoint_writer *w)
{
    char *text = json_dumps(w->header, JSON_COMPACT);
    if (!text) {
        FAIL(ST_NOMEM, "out of memory for the header of %s", w->path);
    }
    static const char spaces[] = "       ";
    size_t bytes = strlen(text);
    size_t padding = (HEADER_ALIGN - bytes % HEADER_ALIGN) % HEADER_ALIGN;
    unsigned char length[LENGTH_BYTES];
    for (int i = 0; i < LENGTH_BYTES; i++) {
        length[i] = (unsigned char)((uint64_t)(bytes + padding) >> 8 * i);
    }
    enum status st = ST_OK;
    TRY_GOTO(st, put(w, length, sizeof length), done);
    TRY_GOTO(st, put(w, text, bytes), done);
    TRY_GOTO(st, put(w, spaces, padding), done);
    w->header_written = true;
done:
    free(text); // jansson allocates with malloc
    return st;
}

enum status checkpoint_writer_bytes(struct checkpoint_writer *w, const void *data, size_t bytes)
{
    if (bytes > w->announced - w->written) {
        FAIL(ST_SHAPE, "%s: %zu bytes are written where the announced tensors have %zu left",
             w->path, bytes, w->announced - w->written);
    }
    if (!w->header_written) {
        TRY(write_header(w));
    }
    TRY(put(w, data, bytes));
    w->written += bytes;
    return ST_OK;
}

enum status checkpoint_writer_finish(struct checkpoint_writer *w)
{
    if (!w->file || w->failed) {
        FAIL(ST_IO, "%s was finished before, or writing it failed", w->path);
    }
    if (w->written != w->announced) {
        FAIL(ST_SHAPE, "%s: %zu bytes were written, the announced tensors have %zu", w->path,
             w->written, w->announced);
    }
    if (!w->header_written) {
        TRY(write_header(w));
    }
    FILE *file = w->file;
    w->file = NULL;
    if (fclose(file) != 0) {
        int why = errno;
        replace_abandon(w->temporary);
        FAIL(ST_IO, "cannot write %s: %s", w->temporary, strerror(why));
    }
    TRY(replace_commit(w->temporary, w->path));
    return ST_OK;
}

void checkpoint_writer_destroy(struct checkpoint_writer **w)
{
    if (!w || !*w) {
        return;
    }
    if ((*w)->file) {
        fclose((*w)->file);
        replace_abandon((*w)->temporary);
    }
    json_decref((*w)->header);
    mem_free((*w)->temporary);
    mem_free((*w)->path);
    mem_free(*w);
    *w = NULL;
}
