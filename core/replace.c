/* SPDX-License-Identifier: Apache-2.0 */
#include "core/replace.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/mem.h"

enum status replace_name(char **temporary, const char *path)
{
    size_t bytes = strlen(path) + 32;
    TRY(mem_alloc_array((void **)temporary, bytes, 1));
    snprintf(*temporary, bytes, "%s.tmp.%ld", path, (long)getpid());
    return ST_OK;
}

const char *replace_advice(int error)
{
    if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
        return "make room on that file system and start again";
    }
    return "check the file system and start again";
}

static enum status sync_path(const char *path, int flags, const char *shown)
{
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0) {
        FAIL(ST_IO, "%s: cannot open for fsync: %s", shown, strerror(errno));
    }
    int failed = fsync(fd) != 0 ? errno : 0;
    close(fd);
    // some file systems cannot sync a folder and say so; there is nothing more to be had from them
    if (failed && failed != EINVAL && failed != ENOTSUP) {
        FAIL(ST_IO, "%s: fsync failed: %s; %s", shown, strerror(failed), replace_advice(failed));
    }
    return ST_OK;
}

enum status replace_commit(const char *temporary, const char *path)
{
    enum status st = ST_OK;
    char *folder = NULL;
    TRY_GOTO(st, mem_strdup(&folder, path), failed);
    char *slash = strrchr(folder, '/');
    if (!slash) {
        strcpy(folder, path[0] ? "." : ""); // "." fits: a path without a slash has a letter
    } else {
        slash[slash == folder ? 1 : 0] = '\0';
    }
    TRY_GOTO(st, sync_path(temporary, O_RDONLY, path), failed);
    if (rename(temporary, path) != 0) {
        FAIL_GOTO(st, ST_IO, failed, "%s: cannot rename %s to it: %s; %s", path, temporary,
                  strerror(errno), replace_advice(errno));
    }
    st = sync_path(folder, O_RDONLY | O_DIRECTORY, folder);
    mem_free(folder);
    return st;
failed:
    replace_abandon(temporary);
    mem_free(folder);
    return st;
}

void replace_abandon(const char *temporary)
{
    if (temporary) {
        unlink(temporary);
    }
}

void replace_sweep(const char *path)
{
    char *folder = NULL, *left = NULL;
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    size_t bytes = strlen(path) + sizeof((struct dirent *)0)->d_name + 2, n_name = strlen(name);
    if (mem_strdup(&folder, path) != ST_OK || mem_alloc_array((void **)&left, bytes, 1) != ST_OK) {
        mem_free(folder);
        return;
    }
    folder[name - path] = '\0';
    DIR *dir = opendir(folder[0] ? folder : ".");
    for (struct dirent *e = dir ? readdir(dir) : NULL; e; e = readdir(dir)) {
        if (strncmp(e->d_name, name, n_name) == 0 && strncmp(e->d_name + n_name, ".tmp.", 5) == 0) {
            snprintf(left, bytes, "%s%s", folder, e->d_name);
            unlink(left);
        }
    }
    if (dir) {
        closedir(dir);
    }
    mem_free(folder);
    mem_free(left);
}

static enum status write_bytes(int fd, const char *data, size_t bytes, const char *path)
{
    enum { PIECE_BYTES = 1 << 26 };
    while (bytes > 0) {
        ssize_t n = write(fd, data, bytes < PIECE_BYTES ? bytes : PIECE_BYTES);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            int error = n < 0 ? errno : ENOSPC;
            FAIL(ST_IO, "%s: write failed with %zu bytes to go: %s; %s", path, bytes,
                 strerror(error), replace_advice(error));
        }
        data += n;
        bytes -= (size_t)n;
    }
    return ST_OK;
}

enum status replace_with(const char *path, const void *data, size_t bytes)
{
    enum status st = ST_OK;
    char *temporary = NULL;
    TRY(replace_name(&temporary, path));
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        FAIL_GOTO(st, ST_IO, done, "%s: cannot create %s: %s; %s", path, temporary, strerror(errno),
                  replace_advice(errno));
    }
    st = write_bytes(fd, data, bytes, path);
    if (close(fd) != 0 && st == ST_OK) {
        st = status_raise(ST_IO, __FILE__, __LINE__, __func__, "%s: write failed: %s; %s", path,
                          strerror(errno), replace_advice(errno));
    }
    TRY_GOTO(st, st, done);
    TRY_GOTO(st, replace_commit(temporary, path), done);
done:
    if (st != ST_OK) {
        replace_abandon(temporary);
    }
    mem_free(temporary);
    return st;
}
