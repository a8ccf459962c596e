/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/block_store.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/replace.h"

enum { STAMP_BYTES_MAX = 4096 };
static const char magic[8] = "pmpdblk1";

/* A file is the magic, a digest of the rest, then per role the report and the buffer's block. It is
 * read on the machine that wrote it: numbers lie as they do in memory. */
struct file_head {
    char magic[8];
    uint64_t low, high;
};

void fitted_block_free(struct fitted_block *block)
{
    for (int role = 0; role < M_N_ROLES; role++) {
        nested_buffer_free(&block->buffer[role]);
    }
    *block = (struct fitted_block){0};
}

static void file_path(char path[OUT_PATH_BYTES + 32], const struct block_store *s, int layer)
{
    snprintf(path, OUT_PATH_BYTES + 32, "%s/block-%05d", s->folder, layer);
}

/* The whole of a small text file; false when there is none. */
static bool read_stamp(char text[STAMP_BYTES_MAX], const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f) {
        return false;
    }
    size_t n = fread(text, 1, STAMP_BYTES_MAX - 1, f);
    text[n] = '\0';
    text[strcspn(text, "\n")] = '\0';
    fclose(f);
    return true;
}

enum status block_store_begin(struct block_store *s, const char *out, const char *stamp)
{
    char path[OUT_PATH_BYTES + 32], found[STAMP_BYTES_MAX];
    size_t n = strlen(out);
    while (n > 1 && out[n - 1] == '/') {
        n--;
    }
    s->folder[0] = '\0';
    if (n + 64 > OUT_PATH_BYTES) {
        FAIL(ST_USER, "OUT is a path of %zu bytes, expected at most %d", n, OUT_PATH_BYTES - 64);
    }
    char folder[OUT_PATH_BYTES];
    snprintf(folder, sizeof folder, "%.*s.tmp", (int)n, out);
    if (mkdir(folder, 0777) != 0 && errno != EEXIST) {
        FAIL(ST_IO, "cannot create the folder %s: %s", folder, strerror(errno));
    }
    snprintf(path, sizeof path, "%s/stamp", folder);
    if (read_stamp(found, path)) {
        if (strcmp(found, stamp) != 0) {
            FAIL(ST_USER,
                 "%s holds finished blocks of a run with other options; repeat that run to finish "
                 "it, or remove the folder (its stamp: %s; this run: %s)",
                 folder, found, stamp);
        }
    } else {
        char line[STAMP_BYTES_MAX];
        int bytes = snprintf(line, sizeof line, "%s\n", stamp);
        INVARIANT(bytes > 0 && bytes < STAMP_BYTES_MAX);
        TRY(replace_with(path, line, (size_t)bytes));
    }
    memcpy(s->folder, folder, sizeof folder);
    return ST_OK;
}

static size_t packed_bytes(const struct fitted_block *b)
{
    size_t total = sizeof(struct file_head); /* buffers are in memory: no overflow */
    for (int role = 0; role < M_N_ROLES; role++) {
        total += sizeof b->report[role] + b->buffer[role].total_bytes;
    }
    return total;
}

static struct file_head make_head(const char *data, size_t bytes)
{
    struct file_head head;
    XXH128_hash_t h = XXH3_128bits_withSeed(data + sizeof head, bytes - sizeof head, 0);
    memcpy(head.magic, magic, sizeof magic);
    head.low = h.low64;
    head.high = h.high64;
    return head;
}

enum status block_store_put(const struct block_store *s, int layer, const struct fitted_block *b)
{
    char path[OUT_PATH_BYTES + 32], *data = NULL;
    size_t bytes = packed_bytes(b), at = sizeof(struct file_head);
    TRY(mem_alloc_array((void **)&data, bytes, 1));
    for (int role = 0; role < M_N_ROLES; role++) {
        memcpy(data + at, &b->report[role], sizeof b->report[role]);
        at += sizeof b->report[role];
        if (b->buffer[role].block) {
            memcpy(data + at, b->buffer[role].block, b->buffer[role].total_bytes);
            at += b->buffer[role].total_bytes;
        }
    }
    struct file_head head = make_head(data, bytes);
    memcpy(data, &head, sizeof head);
    file_path(path, s, layer);
    enum status st = replace_with(path, data, bytes);
    mem_free(data);
    return st;
}

static bool read_whole(char *data, size_t bytes, const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f) {
        return false;
    }
    bool good = fread(data, 1, bytes, f) == bytes && fgetc(f) == EOF;
    fclose(f);
    struct file_head want = make_head(data, bytes), head;
    memcpy(&head, data, sizeof head);
    good = good && memcmp(&head, &want, sizeof head) == 0;
    if (!good) {
        log_warn("%s is damaged; the block is fitted again", path);
    }
    return good;
}

enum status block_store_get(const struct block_store *s, int layer, struct fitted_block *b,
                            bool *found)
{
    char path[OUT_PATH_BYTES + 32], *data = NULL;
    size_t bytes = packed_bytes(b), at = sizeof(struct file_head);
    TRY(mem_alloc_array((void **)&data, bytes, 1));
    file_path(path, s, layer);
    *found = read_whole(data, bytes, path);
    for (int role = 0; *found && role < M_N_ROLES; role++) {
        memcpy(&b->report[role], data + at, sizeof b->report[role]);
        at += sizeof b->report[role];
        if (b->buffer[role].block) {
            memcpy(b->buffer[role].block, data + at, b->buffer[role].total_bytes);
            at += b->buffer[role].total_bytes;
        }
    }
    mem_free(data);
    return ST_OK;
}

void block_store_remove(struct block_store *s)
{
    char path[2 * OUT_PATH_BYTES];
    if (!s->folder[0]) {
        return;
    }
    DIR *dir = opendir(s->folder);
    for (struct dirent *e = dir ? readdir(dir) : NULL; e; e = readdir(dir)) {
        if (strncmp(e->d_name, "block-", 6) == 0 || strncmp(e->d_name, "stamp", 5) == 0) {
            snprintf(path, sizeof path, "%s/%s", s->folder,
                     e->d_name); /* .tmp.PID of a kill, too */
            unlink(path);
        }
    }
    if (dir) {
        closedir(dir);
    }
    if (rmdir(s->folder) != 0) {
        log_warn("cannot remove %s: %s", s->folder, strerror(errno));
    }
    s->folder[0] = '\0';
}
