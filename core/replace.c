/* SPDX-License-Identifier: Apache-2.0 */
#include "core/replace.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/log.h"
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

/* "NAME.tmp.PID" of the file `base`. */
static bool is_temporary(const char *name, const char *base)
{
    static const char middle[] = ".tmp.";
    size_t n = strlen(base);
    if (strncmp(name, base, n) != 0 || strncmp(name + n, middle, sizeof middle - 1) != 0) {
        return false;
    }
    const char *pid = name + n + sizeof middle - 1;
    return pid[0] != '\0' && pid[strspn(pid, "0123456789")] == '\0';
}

void replace_sweep(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;
    char full[PATH_MAX];
    int n =
        snprintf(full, sizeof full, "%.*s", slash ? (int)(base - path) : 2, slash ? path : "./");
    DIR *dir = n < PATH_MAX ? opendir(full) : NULL;
    for (struct dirent *e = dir ? readdir(dir) : NULL; e; e = readdir(dir)) {
        if (is_temporary(e->d_name, base) && n + (int)strlen(e->d_name) < PATH_MAX) {
            strcpy(full + n, e->d_name);
            log_debug("%s: left by a start that died; removed", full);
            unlink(full);
        }
    }
    if (dir) {
        closedir(dir);
    }
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
