/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/fuzz/fuzz.h"

#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/log.h"
#include "tests/gen.h"

enum { DATA_MAX = 1 << 20 };

bool fuzz_ok(enum status st)
{
    if (st == ST_OK) {
        return true;
    }
    const char *text = status_message();
    INVARIANT(text[0] != '\0');
    for (; *text; text++) {
        INVARIANT((unsigned char)*text >= 0x20 && *text != 0x7F);
    }
    status_clear();
    return false;
}

/* ---- files ---- */

static char folder[GEN_PATH_BYTES];

static void remove_folder(void)
{
    gen_remove(folder);
}

const char *fuzz_folder(void)
{
    if (!folder[0]) {
        if (access("/dev/shm", W_OK) == 0) {
            setenv("TMPDIR", "/dev/shm", 0);
        }
        gen_folder(folder);
        atexit(remove_folder);
        log_set_level(LOG_ERROR);
    }
    return folder;
}

const char *fuzz_path(const char *file)
{
    static char path[GEN_PATH_BYTES];
    return gen_path(path, fuzz_folder(), file);
}

void fuzz_put(const char *file, const void *data, size_t bytes)
{
    const char *path = fuzz_path(file);
    if (!data) {
        unlink(path);
        return;
    }
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ssize_t written = fd < 0 ? -1 : write(fd, data, bytes);
    if (written < 0 || (size_t)written != bytes) {
        perror(path);
        exit(2); // the machine's trouble, not the input's
    }
    close(fd);
}

/* ---- parts ---- */

void fuzz_split(struct fuzz_part *parts, int n_parts, const uint8_t *data, size_t size)
{
    const uint8_t *at = data, *end = data + size;
    for (int i = 0; i < n_parts; i++) {
        parts[i] = (struct fuzz_part){(const char *)at, 0};
        if (!at) {
            continue;
        }
        const uint8_t *stop =
            i + 1 < n_parts && at < end ? memchr(at, 0xFF, (size_t)(end - at)) : NULL;
        parts[i].bytes = (size_t)((stop ? stop : end) - at);
        at = stop ? stop + 1 : NULL;
    }
}

void fuzz_put_part(const char *file, const struct fuzz_part *part)
{
    fuzz_put(file, part->text, part->bytes);
}

char *fuzz_text(const struct fuzz_part *part)
{
    char *text = malloc(part->bytes + 1);
    INVARIANT(text != NULL);
    if (part->bytes) {
        memcpy(text, part->text, part->bytes);
    }
    text[part->bytes] = '\0';
    return text;
}

/* ---- safetensors ---- */

static size_t data_bytes(const struct fuzz_part *header)
{
    json_t *root = json_loadb(header->text, header->bytes, 0, NULL);
    json_int_t most = 0;
    const char *name;
    json_t *info;
    json_object_foreach(root, name, info)
    {
        json_int_t end =
            json_integer_value(json_array_get(json_object_get(info, "data_offsets"), 1));
        most = end > most && end <= DATA_MAX ? end : most;
    }
    json_decref(root);
    return (size_t)most;
}

void fuzz_put_safetensors(const char *file, const struct fuzz_part *header,
                          const struct fuzz_part *data)
{
    static unsigned char *tail; // byte pairs that are numbers from 0.03 to 0.5 as F16
    size_t padded = (header->bytes + 7) / 8 * 8, n_data = data_bytes(header);
    unsigned char *whole = malloc(8 + padded + n_data);
    if (!tail) {
        struct gen_rng rng = {.state = 1};
        tail = malloc(DATA_MAX);
        for (size_t i = 0; tail && i < DATA_MAX; i++) {
            uint32_t r = (uint32_t)gen_next(&rng);
            tail[i] = (unsigned char)(i % 2 ? 0x28 + (r & 0x0F) + (r & 0x80) : r);
        }
    }
    INVARIANT(whole && tail);
    for (int i = 0; i < 8; i++) {
        whole[i] = (unsigned char)(padded >> 8 * i);
    }
    memset(whole + 8, ' ', padded);
    if (header->bytes) {
        memcpy(whole + 8, header->text, header->bytes);
    }
    memcpy(whole + 8 + padded, tail, n_data);
    if (data->text) {
        memcpy(whole + 8 + padded, data->text, data->bytes < n_data ? data->bytes : n_data);
    }
    fuzz_put(file, whole, 8 + padded + n_data);
    free(whole);
}

/* Bytes that a tensor's dtype and shape ask for, -1: they make no sense here. */
static json_int_t tensor_bytes_of(const json_t *info)
{
    static const struct {
        const char *name;
        json_int_t bytes;
    } known[] = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"U8", 1},
                 {"I32", 4}, {"I64", 8}, {"I8", 1},   {"F64", 8}};
    const char *dtype = json_string_value(json_object_get(info, "dtype"));
    const json_t *shape = json_object_get(info, "shape");
    json_int_t bytes = -1;
    for (size_t i = 0; dtype && i < sizeof known / sizeof known[0]; i++) {
        bytes = strcmp(dtype, known[i].name) == 0 ? known[i].bytes : bytes;
    }
    for (size_t i = 0; bytes > 0 && i < json_array_size(shape); i++) {
        json_int_t dim = json_integer_value(json_array_get(shape, i));
        bytes = dim >= 0 && dim <= DATA_MAX && bytes * dim <= DATA_MAX ? bytes * dim : -1;
    }
    return bytes;
}

size_t fuzz_mend_header(char *text, size_t bytes, size_t max_bytes)
{
    json_t *root = json_loadb(text, bytes, 0, NULL), *info;
    json_int_t at = 0;
    const char *name;
    size_t n = 0;
    json_object_foreach(root, name, info)
    {
        json_int_t size = tensor_bytes_of(info);
        if (size >= 0) {
            json_object_set_new(info, "data_offsets", json_pack("[I, I]", at, at + size));
            at += size;
        }
    }
    char *mended = at > 0 ? json_dumps(root, JSON_COMPACT) : NULL;
    if (mended && strlen(mended) <= max_bytes) {
        n = strlen(mended);
        memcpy(text, mended, n);
    }
    free(mended);
    json_decref(root);
    return n;
}

void fuzz_put_tokenizer(void)
{
    static const char text[] =
        "{\"decoder\":{\"type\":\"Fuse\"},\"model\":{\"type\":\"BPE\",\"unk_token\":\"?\","
        "\"vocab\":{\"?\":0,\"a\":1,\"b\":2,\"ab\":3},\"merges\":[\"a b\"]}}";
    fuzz_put("tokenizer.json", text, sizeof text - 1);
}

/* ---- numbers ---- */

uint8_t fuzz_u8(struct fuzz_bytes *b)
{
    return b->at < b->end ? *b->at++ : 0;
}

uint32_t fuzz_u32(struct fuzz_bytes *b)
{
    uint32_t x = 0;
    for (int i = 0; i < 4; i++) {
        x |= (uint32_t)fuzz_u8(b) << 8 * i;
    }
    return x;
}
