/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/out_folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/json.h"
#include "core/log.h"

enum { COPY_BYTES = 1 << 16, CONFIG_BYTES_MAX = 64 << 20, N_TOKENIZERS = 2 };

/* The tokenizers first. */
static const char *const copied[] = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                                     "special_tokens_map.json", "generation_config.json"};
static const char *const written[] = {"config.json", "model.safetensors"};

enum { N_COPIED = sizeof copied / sizeof *copied, N_WRITTEN = sizeof written / sizeof *written };

static bool is_ours(const char *name)
{
    for (int i = 0; i < N_COPIED; i++) {
        if (strcmp(name, copied[i]) == 0) {
            return true;
        }
    }
    for (int i = 0; i < N_WRITTEN; i++) {
        if (strcmp(name, written[i]) == 0) {
            return true;
        }
    }
    return false;
}

static enum status join(char path[OUT_PATH_BYTES], const char *folder, const char *name)
{
    int n = snprintf(path, OUT_PATH_BYTES, "%s/%s", folder, name);
    if (n < 0 || n >= OUT_PATH_BYTES) {
        FAIL(ST_IO, "the path %.40s.../%s is longer than %d bytes", folder, name, OUT_PATH_BYTES);
    }
    return ST_OK;
}

enum status out_folder_path(char path[OUT_PATH_BYTES], const struct out_folder *out,
                            const char *name)
{
    return join(path, out->temporary, name);
}

/* Only a folder that is nothing but a nested model may be replaced. */
static enum status check_replaceable(const char *folder)
{
    char path[OUT_PATH_BYTES];
    json_t *json = NULL;
    TRY(join(path, folder, "config.json"));
    const char *method = NULL;
    if (json_read_file(&json, path, CONFIG_BYTES_MAX) == ST_OK) {
        const json_t *quant = json_member(json, "quantization_config");
        if (!quant || json_get_string_or(&method, quant, "quant_method", NULL, path) != ST_OK) {
            method = NULL;
        }
    }
    bool good = method && strcmp(method, "pmpd") == 0;
    json_release(&json);
    status_clear();
    if (!good) {
        FAIL(ST_USER,
             "%s exists and is not a nested model, so --force does not replace it; choose "
             "another OUT or remove it yourself",
             folder);
    }
    DIR *dir = opendir(folder);
    if (!dir) {
        FAIL(ST_IO, "cannot list %s: %s", folder, strerror(errno));
    }
    enum status st = ST_OK;
    for (struct dirent *e = readdir(dir); e && st == ST_OK; e = readdir(dir)) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0 && !is_ours(e->d_name)) {
            st =
                status_raise(ST_USER, __FILE__, __LINE__, __func__,
                             "%s holds %s, which is no part of a nested model, so --force does not "
                             "replace it; move that file away or choose another OUT",
                             folder, e->d_name);
        }
    }
    closedir(dir);
    return st;
}

/* Removes the files of a nested model and then the folder, if that emptied it. */
static void remove_folder(const char *folder)
{
    char path[OUT_PATH_BYTES];
    for (int i = 0; i < N_COPIED + N_WRITTEN; i++) {
        const char *name = i < N_COPIED ? copied[i] : written[i - N_COPIED];
        if (snprintf(path, sizeof path, "%s/%s", folder, name) < (int)sizeof path) {
            unlink(path);
        }
    }
    if (rmdir(folder) != 0) {
        log_warn("cannot remove %s: %s", folder, strerror(errno));
    }
}

enum status out_folder_begin(struct out_folder *out, const char *path, bool force)
{
    *out = (struct out_folder){0};
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') {
        n--;
    }
    if (n == 0 || n + 64 > OUT_PATH_BYTES) {
        FAIL(ST_USER, "OUT is a path of %zu bytes, expected 1 to %d", n, OUT_PATH_BYTES - 64);
    }
    memcpy(out->final, path, n);
    struct stat info;
    if (lstat(out->final, &info) == 0) {
        if (!force) {
            FAIL(ST_USER, "%s exists; choose another OUT, or --force to replace a nested model",
                 out->final);
        }
        TRY(check_replaceable(out->final));
        out->replaces = true;
    }
    char temporary[OUT_PATH_BYTES];
    snprintf(temporary, sizeof temporary, "%.*s.tmp.%ld", (int)n, out->final, (long)getpid());
    if (mkdir(temporary, 0777) != 0) {
        FAIL(ST_IO, "cannot create the folder %s: %s", temporary, strerror(errno));
    }
    memcpy(out->temporary, temporary, sizeof temporary); /* from here on it is ours to remove */
    return ST_OK;
}

static bool write_all(int fd, const char *data, size_t bytes)
{
    while (bytes > 0) {
        ssize_t n = write(fd, data, bytes);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return false;
        }
        data += n;
        bytes -= (size_t)n;
    }
    return true;
}

/* Syncs and closes; EINVAL: a file system that does not sync such a thing. */
static bool settle(int fd)
{
    bool good = fsync(fd) == 0 || errno == EINVAL;
    int why = errno;
    good = close(fd) == 0 && good;
    errno = why;
    return good;
}

enum status out_folder_write(const struct out_folder *out, const char *name, const void *data,
                             size_t bytes)
{
    char path[OUT_PATH_BYTES];
    TRY(out_folder_path(path, out, name));
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    bool good = fd >= 0 && write_all(fd, data, bytes);
    if (fd >= 0) {
        good = settle(fd) && good;
    }
    if (!good) {
        FAIL(ST_IO, "cannot write %s: %s", path, strerror(errno));
    }
    return ST_OK;
}

/* Sets *found to whether `from` has the file. */
static enum status copy_file(const struct out_folder *out, const char *from, const char *name,
                             uint64_t *bytes, bool *found)
{
    char source[OUT_PATH_BYTES], path[OUT_PATH_BYTES], block[COPY_BYTES];
    TRY(join(source, from, name));
    TRY(out_folder_path(path, out, name));
    *found = false;
    int in = open(source, O_RDONLY | O_CLOEXEC);
    if (in < 0 && errno == ENOENT) {
        return ST_OK;
    }
    if (in < 0) {
        FAIL(ST_IO, "cannot open %s: %s", source, strerror(errno));
    }
    int to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    bool good = to >= 0;
    ssize_t n = 0;
    while (good && (n = read(in, block, sizeof block)) > 0) {
        good = write_all(to, block, (size_t)n);
        *bytes += (uint64_t)n;
    }
    good = good && n == 0;
    int why = errno;
    close(in);
    if (to >= 0 && !settle(to) && good) {
        good = false;
        why = errno;
    }
    if (!good) {
        FAIL(ST_IO, "cannot copy %s to %s: %s", source, path, strerror(why));
    }
    *found = true;
    return ST_OK;
}

enum status out_folder_copy_files(const struct out_folder *out, const char *from, uint64_t *bytes,
                                  bool *has_tokenizer)
{
    *has_tokenizer = false;
    for (int i = 0; i < N_COPIED; i++) {
        bool found;
        TRY(copy_file(out, from, copied[i], bytes, &found));
        *has_tokenizer |= found && i < N_TOKENIZERS;
    }
    return ST_OK;
}

/* The folder that holds path. */
static bool sync_parent(const char *path)
{
    char parent[OUT_PATH_BYTES];
    const char *slash = strrchr(path, '/');
    snprintf(parent, sizeof parent, "%.*s", slash ? (int)(slash - path) + 1 : 1,
             slash ? path : ".");
    int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd >= 0 && settle(fd);
}

enum status out_folder_commit(struct out_folder *out)
{
    char old[OUT_PATH_BYTES + 32];
    snprintf(old, sizeof old, "%s.old.%ld", out->final, (long)getpid());
    int fd = open(out->temporary, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || !settle(fd)) {
        FAIL(ST_IO, "cannot sync %s: %s", out->temporary, strerror(errno));
    }
    if (out->replaces && rename(out->final, old) != 0) {
        FAIL(ST_IO, "cannot rename %s to %s: %s", out->final, old, strerror(errno));
    }
    if (rename(out->temporary, out->final) != 0) {
        int why = errno;
        if (out->replaces && rename(old, out->final) != 0) {
            log_warn("the model that was at %s is now at %s", out->final, old);
        }
        FAIL(ST_IO, "cannot rename %s to %s: %s", out->temporary, out->final, strerror(why));
    }
    out->temporary[0] = '\0';
    if (out->replaces) {
        remove_folder(old);
    }
    if (!sync_parent(out->final)) {
        FAIL(ST_IO, "cannot sync the folder that holds %s: %s", out->final, strerror(errno));
    }
    return ST_OK;
}

void out_folder_abandon(struct out_folder *out)
{
    if (out->temporary[0]) {
        remove_folder(out->temporary);
        out->temporary[0] = '\0';
    }
}
