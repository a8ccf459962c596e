/* SPDX-License-Identifier: Apache-2.0 */
#include "core/checkpoint_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "core/mem.h"

enum {
    LENGTH_BYTES = 8,       /* the little-endian length in front of the header */
    HEADER_MAX = 100000000, /* the bound of the format's own readers */
    SHARDS_MAX = 4096,
    SHOWN_BYTES = 96
};

#define SINGLE_FILE "model.safetensors"
#define INDEX_FILE "model.safetensors.index.json"
#define DAMAGED "the file is damaged: fetch it again"

/* Every element type the format knows, so that sizes are checked even where we cannot use them. */
static const struct {
    const char *text;
    size_t bytes;
    enum dtype dtype;
} known_dtypes[] = {
    {"F32", 4, DT_F32},   {"F16", 2, DT_F16},       {"BF16", 2, DT_BF16},     {"U8", 1, DT_U8},
    {"I32", 4, DT_I32},   {"I64", 8, DT_I64},       {"BOOL", 1, DT_N},        {"I8", 1, DT_N},
    {"I16", 2, DT_N},     {"U16", 2, DT_N},         {"U32", 4, DT_N},         {"U64", 8, DT_N},
    {"F64", 8, DT_N},     {"C64", 8, DT_N},         {"F8_E4M3", 1, DT_N},     {"F8_E5M2", 1, DT_N},
    {"F8_E8M0", 1, DT_N}, {"F8_E4M3FNUZ", 1, DT_N}, {"F8_E5M2FNUZ", 1, DT_N},
};

/* ---- one file ---- */

static bool is_plain(const char *name)
{
    for (const char *c = name; *c; c++) {
        if ((unsigned char)*c < 0x20 || *c == 0x7f) {
            return false;
        }
    }
    return name[0] != '\0';
}

static enum status shard_map(struct shard *s, int fd)
{
    struct stat info;
    if (fstat(fd, &info) != 0) {
        FAIL(ST_IO, "cannot read %s: %s", s->path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        FAIL(ST_IO, "cannot read %s: it is %s, expected a safetensors file", s->path,
             S_ISDIR(info.st_mode) ? "a folder" : "not a regular file");
    }
    if (info.st_size <= LENGTH_BYTES) {
        FAIL(ST_FORMAT, "%s has %lld bytes, too few for a safetensors file; " DAMAGED, s->path,
             (long long)info.st_size);
    }
    s->bytes = (size_t)info.st_size;
    void *map = mmap(NULL, s->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) {
        FAIL(ST_IO, "cannot map %s: %s", s->path, strerror(errno));
    }
    s->map = map;
    return ST_OK;
}

static enum status shard_header(struct shard *s, json_t **header)
{
    if (memcmp(s->map, "version ", LENGTH_BYTES) == 0) {
        FAIL(ST_FORMAT,
             "%s is a Git LFS pointer, not the tensors; run `git lfs pull` in its folder", s->path);
    }
    uint64_t length = 0;
    for (int i = LENGTH_BYTES - 1; i >= 0; i--) {
        length = length << 8 | s->map[i];
    }
    if (length > HEADER_MAX || length > s->bytes - LENGTH_BYTES) {
        FAIL(ST_FORMAT,
             "%s: header length %llu, expected at most %d and inside the file's %zu bytes; " DAMAGED
             " (or is it no safetensors file?)",
             s->path, (unsigned long long)length, (int)HEADER_MAX, s->bytes);
    }
    s->data_at = LENGTH_BYTES + (size_t)length;
    TRY(json_read_text(header, (const char *)s->map + LENGTH_BYTES, (size_t)length, s->path));
    return ST_OK;
}

static enum status entry_shape(struct entry *e, const json_t *shape, const char *path,
                               size_t *count)
{
    if (!json_is_array(shape) || json_array_size(shape) > TENSOR_MAX_DIMS) {
        FAIL(ST_FORMAT, "%s: tensor \"%s\": expected a shape of at most %d numbers", path, e->name,
             (int)TENSOR_MAX_DIMS);
    }
    e->n_dims = (int32_t)json_array_size(shape);
    *count = 1;
    for (int32_t i = 0; i < e->n_dims; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0 ||
            json_integer_value(dim) > INT32_MAX) {
            char found[SHOWN_BYTES];
            FAIL(ST_FORMAT, "%s: tensor \"%s\": dimension %d of the shape is %s, expected 0..%d",
                 path, e->name, i, json_describe(dim, found, sizeof found), INT32_MAX);
        }
        e->dims[i] = (int32_t)json_integer_value(dim);
        if (__builtin_mul_overflow(*count, (size_t)e->dims[i], count)) {
            FAIL(ST_FORMAT, "%s: tensor \"%s\": the size of its shape overflows; " DAMAGED, path,
                 e->name);
        }
    }
    return ST_OK;
}

static enum status entry_parse(struct entry *e, const json_t *info, const struct shard *s)
{
    char found[SHOWN_BYTES];
    if (!json_is_object(info)) {
        FAIL(ST_FORMAT, "%s: tensor \"%s\" is %s, expected {dtype, shape, data_offsets}", s->path,
             e->name, json_describe(info, found, sizeof found));
    }
    const json_t *dtype = json_object_get(info, "dtype");
    if (!json_is_string(dtype)) {
        FAIL(ST_FORMAT, "%s: tensor \"%s\": dtype is %s, expected a string such as \"F16\"",
             s->path, e->name, json_describe(dtype, found, sizeof found));
    }
    snprintf(e->dtype_text, sizeof e->dtype_text, "%s", json_string_value(dtype));
    if (!is_plain(e->dtype_text)) {
        snprintf(e->dtype_text, sizeof e->dtype_text, "?");
    }
    size_t count = 0, element = 0, bytes = 0;
    TRY(entry_shape(e, json_object_get(info, "shape"), s->path, &count));
    e->dtype = DT_N;
    for (size_t i = 0; i < sizeof known_dtypes / sizeof known_dtypes[0]; i++) {
        if (strcmp(json_string_value(dtype), known_dtypes[i].text) == 0) {
            element = known_dtypes[i].bytes;
            e->dtype = known_dtypes[i].dtype;
        }
    }
    const json_t *offsets = json_object_get(info, "data_offsets");
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    size_t data_bytes = s->bytes - s->data_at;
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end)) {
        FAIL(ST_FORMAT, "%s: tensor \"%s\": expected data_offsets [begin, end]", s->path, e->name);
    }
    long long from = json_integer_value(begin), to = json_integer_value(end);
    if (from < 0 || to < from || (unsigned long long)to > data_bytes) {
        FAIL(
            ST_FORMAT,
            "%s: tensor \"%s\": data_offsets [%lld, %lld], expected begin <= end <= %zu, the bytes "
            "that follow the header; the file is cut short or damaged: fetch it again",
            s->path, e->name, from, to, data_bytes);
    }
    e->begin = (size_t)from;
    e->bytes = (size_t)(to - from);
    // an element type from the future has an unknown size: nobody can read it, its place is checked
    if (element && (__builtin_mul_overflow(count, element, &bytes) || bytes != e->bytes)) {
        FAIL(ST_FORMAT, "%s: tensor \"%s\": %zu bytes, expected %zu for its %s shape; " DAMAGED,
             s->path, e->name, e->bytes, bytes, e->dtype_text);
    }
    return ST_OK;
}

static int by_place(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    size_t x_end = x->begin + x->bytes, y_end = y->begin + y->bytes;
    return x->begin != y->begin ? (x->begin < y->begin ? -1 : 1)
                                : (x_end > y_end) - (x_end < y_end);
}

static int by_name(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* The format lets data neither overlap nor leave holes; a file that does was not written by a
 * safetensors writer. Sorts the entries by place. */
static enum status entries_check_cover(struct entry *entries, size_t n, const struct shard *s)
{
    if (n) {
        qsort(entries, n, sizeof entries[0], by_place);
    }
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        if (entries[i].begin != at) {
            FAIL(ST_FORMAT, "%s: tensor \"%s\" begins at byte %zu of the data, %s %zu; " DAMAGED,
                 s->path, entries[i].name, entries[i].begin,
                 entries[i].begin < at ? "overlapping another that ends at" : "leaving a hole from",
                 at);
        }
        at += entries[i].bytes;
    }
    if (at != s->bytes - s->data_at) {
        FAIL(ST_FORMAT, "%s: the tensors end at byte %zu of the data, the file at %zu; " DAMAGED,
             s->path, at, s->bytes - s->data_at);
    }
    return ST_OK;
}

static enum status entry_append(struct checkpoint *ckpt, const char *name, struct entry **out)
{
    if (ckpt->n_entries == ckpt->room_entries) {
        int32_t room = ckpt->room_entries ? 2 * ckpt->room_entries : 64;
        TRY(mem_grow_array((void **)&ckpt->entries, (size_t)ckpt->room_entries, (size_t)room,
                           sizeof ckpt->entries[0]));
        ckpt->room_entries = room;
    }
    struct entry *e = &ckpt->entries[ckpt->n_entries];
    *e = (struct entry){0};
    TRY(mem_strdup(&e->name, name));
    ckpt->n_entries++;
    *out = e;
    return ST_OK;
}

/* Appends the tensors of shard s; with a weight map only those that it places in `file`. */
static enum status shard_entries(struct checkpoint *ckpt, int32_t shard, json_t *header,
                                 const json_t *weight_map, const char *file)
{
    const struct shard *s = &ckpt->shards[shard];
    int32_t first = ckpt->n_entries;
    for (void *it = json_object_iter(header); it; it = json_object_iter_next(header, it)) {
        const char *name = json_object_iter_key(it);
        if (strcmp(name, "__metadata__") == 0) {
            continue;
        }
        if (!is_plain(name)) {
            FAIL(ST_FORMAT, "%s: a tensor's name is empty or has control characters; " DAMAGED,
                 s->path);
        }
        struct entry *e = NULL;
        TRY(entry_append(ckpt, name, &e));
        e->shard = shard;
        TRY(entry_parse(e, json_object_iter_value(it), s));
    }
    if (first == ckpt->n_entries) {
        FAIL(ST_FORMAT, "%s holds no tensor; " DAMAGED, s->path);
    }
    TRY(entries_check_cover(ckpt->entries + first, (size_t)(ckpt->n_entries - first), s));
    if (!weight_map) {
        return ST_OK;
    }
    int32_t kept = first;
    for (int32_t i = first; i < ckpt->n_entries; i++) {
        const char *home = json_string_value(json_object_get(weight_map, ckpt->entries[i].name));
        if (home && strcmp(home, file) == 0) {
            struct entry keep = ckpt->entries[i];
            ckpt->entries[i].name = NULL;
            ckpt->entries[kept++] = keep;
        } else {
            mem_free(ckpt->entries[i].name);
            ckpt->entries[i].name = NULL;
        }
    }
    ckpt->n_entries = kept;
    return ST_OK;
}

/* Maps one file and reads its header. Takes over fd. */
static enum status shard_open(struct checkpoint *ckpt, int fd, const char *path,
                              const json_t *weight_map, const char *file)
{
    enum status st = ST_OK;
    json_t *header = NULL;
    if (ckpt->n_shards == ckpt->room_shards) {
        int32_t room = ckpt->room_shards ? 2 * ckpt->room_shards : 8;
        TRY_GOTO(st,
                 mem_grow_array((void **)&ckpt->shards, (size_t)ckpt->room_shards, (size_t)room,
                                sizeof ckpt->shards[0]),
                 done);
        ckpt->room_shards = room;
    }
    int32_t index = ckpt->n_shards++;
    struct shard *s = &ckpt->shards[index];
    TRY_GOTO(st, mem_strdup(&s->path, path), done);
    TRY_GOTO(st, shard_map(s, fd), done);
    TRY_GOTO(st, shard_header(s, &header), done);
    TRY_GOTO(st, shard_entries(ckpt, index, header, weight_map, file), done);
done:
    json_release(&header);
    close(fd);
    return st;
}

/* ---- a folder ---- */

enum status checkpoint_join(char out[CHECKPOINT_PATH_BYTES], const char *folder, const char *file)
{
    int n = snprintf(out, CHECKPOINT_PATH_BYTES, "%s/%s", folder, file);
    if (n < 0 || n >= CHECKPOINT_PATH_BYTES) {
        FAIL(ST_IO, "the path %.80s.../%.80s is longer than %d bytes", folder, file,
             (int)CHECKPOINT_PATH_BYTES - 1);
    }
    return ST_OK;
}

static bool folder_has(const char *folder, const char *file)
{
    char path[CHECKPOINT_PATH_BYTES];
    int n = snprintf(path, sizeof path, "%s/%s", folder, file);
    return n > 0 && n < CHECKPOINT_PATH_BYTES && access(path, F_OK) == 0;
}

static enum status fail_missing(const char *folder)
{
    struct stat info;
    if (stat(folder, &info) != 0) {
        FAIL(ST_IO, "cannot open the model folder %s: %s", folder, strerror(errno));
    }
    if (!S_ISDIR(info.st_mode)) {
        FAIL(ST_IO, "%s is a file, expected a model folder with config.json and " SINGLE_FILE,
             folder);
    }
    if (folder_has(folder, "pytorch_model.bin") ||
        folder_has(folder, "pytorch_model.bin.index.json")) {
        FAIL(ST_IO,
             "%s holds pytorch_model.bin but no " SINGLE_FILE
             "; only safetensors are read: convert "
             "it with transformers, model.save_pretrained(FOLDER, safe_serialization=True)",
             folder);
    }
    FAIL(ST_IO, "%s has neither " SINGLE_FILE " nor " INDEX_FILE "; expected a model folder",
         folder);
}

static bool plain_file_name(const char *file)
{
    size_t n = strlen(file), suffix = strlen(".safetensors");
    return is_plain(file) && !strchr(file, '/') && n > suffix &&
           strcmp(file + n - suffix, ".safetensors") == 0;
}

static bool shard_is_open(const struct checkpoint *ckpt, const char *path)
{
    // names come in runs of one file, so the last one opened is nearly always the answer
    for (int32_t i = ckpt->n_shards - 1; i >= 0; i--) {
        if (strcmp(ckpt->shards[i].path, path) == 0) {
            return true;
        }
    }
    return false;
}

const struct entry *checkpoint_find(const struct checkpoint *ckpt, const char *name)
{
    const struct entry key = {.name = (char *)name}; // not written through
    return ckpt->n_entries ? bsearch(&key, ckpt->entries, (size_t)ckpt->n_entries,
                                     sizeof ckpt->entries[0], by_name)
                           : NULL;
}

static void sort_by_name(struct checkpoint *ckpt)
{
    if (ckpt->n_entries) {
        qsort(ckpt->entries, (size_t)ckpt->n_entries, sizeof ckpt->entries[0], by_name);
    }
}

static enum status open_sharded(struct checkpoint *ckpt, const char *folder, json_t *index)
{
    json_t *map = json_object_get(index, "weight_map");
    if (!json_is_object(map) || json_object_size(map) == 0) {
        FAIL(ST_FORMAT, "%s: expected a \"weight_map\" of tensor names to file names; " DAMAGED,
             ckpt->path);
    }
    char path[CHECKPOINT_PATH_BYTES], found[SHOWN_BYTES];
    for (void *it = json_object_iter(map); it; it = json_object_iter_next(map, it)) {
        const json_t *value = json_object_iter_value(it);
        const char *file = json_string_value(value);
        if (!file || !plain_file_name(file)) {
            FAIL(ST_FORMAT,
                 "%s: weight_map names %s, expected the name of a .safetensors file in the same "
                 "folder",
                 ckpt->path, json_describe(value, found, sizeof found));
        }
        TRY(checkpoint_join(path, folder, file));
        if (shard_is_open(ckpt, path)) {
            continue;
        }
        if (ckpt->n_shards >= SHARDS_MAX) {
            FAIL(ST_FORMAT, "%s lists more than %d files", ckpt->path, (int)SHARDS_MAX);
        }
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd < 0) {
            FAIL(ST_IO, "cannot open %s, which " INDEX_FILE " lists: %s; fetch the missing shard",
                 path, strerror(errno));
        }
        TRY(shard_open(ckpt, fd, path, map, file));
    }
    sort_by_name(ckpt);
    for (void *it = json_object_iter(map); it; it = json_object_iter_next(map, it)) {
        if (!checkpoint_find(ckpt, json_object_iter_key(it))) {
            json_t *name = json_string(json_object_iter_key(it));
            json_describe(name, found, sizeof found);
            json_decref(name);
            FAIL(ST_FORMAT, "%s places tensor %s in %s, but that file does not hold it; " DAMAGED,
                 ckpt->path, found, json_string_value(json_object_iter_value(it)));
        }
    }
    return ST_OK;
}

static enum status open_folder(struct checkpoint *ckpt, const char *folder)
{
    char path[CHECKPOINT_PATH_BYTES];
    TRY(checkpoint_join(path, folder, SINGLE_FILE));
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0) {
        enum status st = mem_strdup(&ckpt->path, path);
        if (st != ST_OK) {
            close(fd);
            return st;
        }
        TRY(shard_open(ckpt, fd, path, NULL, SINGLE_FILE));
        sort_by_name(ckpt);
        return ST_OK;
    }
    if (errno != ENOENT && errno != ENOTDIR) {
        FAIL(ST_IO, "cannot open %s: %s", path, strerror(errno));
    }
    if (!folder_has(folder, INDEX_FILE)) {
        return fail_missing(folder);
    }
    TRY(checkpoint_join(path, folder, INDEX_FILE));
    TRY(mem_strdup(&ckpt->path, path));
    json_t *index = NULL;
    TRY(json_read_file(&index, path, HEADER_MAX));
    enum status st = open_sharded(ckpt, folder, index);
    json_release(&index);
    return st;
}

enum status checkpoint_open(struct checkpoint **out, const char *folder)
{
    *out = NULL;
    struct checkpoint *ckpt = NULL;
    TRY(MEM_NEW(&ckpt, 1));
    enum status st = ST_OK;
    TRY_GOTO(st, open_folder(ckpt, folder), failed);
    *out = ckpt;
    return ST_OK;
failed:
    checkpoint_close(&ckpt);
    return st;
}

void checkpoint_close(struct checkpoint **ckpt)
{
    if (!ckpt || !*ckpt) {
        return;
    }
    struct checkpoint *c = *ckpt;
    for (int32_t i = 0; i < c->n_entries; i++) {
        mem_free(c->entries[i].name);
    }
    for (int32_t i = 0; i < c->n_shards; i++) {
        if (c->shards[i].map) {
            munmap(c->shards[i].map, c->shards[i].bytes);
        }
        mem_free(c->shards[i].path);
    }
    mem_free(c->entries);
    mem_free(c->shards);
    mem_free(c->path);
    mem_free(c);
    *ckpt = NULL;
}
