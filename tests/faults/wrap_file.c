/* Faults at the system calls that make the journal, run.h5 and answers.jsonl. Which file a call is
 * about is read off the descriptor's path. SPDX-License-Identifier: Apache-2.0
 */
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tests/faults/fault.h"

enum which_file { FILE_OTHER = 0, FILE_JOURNAL, FILE_RUN, FILE_ANSWERS, N_FILES };
static const char *const beginnings[N_FILES] = {NULL, "journal.bin", "run.h5", "answers.jsonl"};
static const char *const names[N_FILES] = {NULL, "journal", "run", "answers"};
static atomic_bool full[N_FILES]; /* an enospc fault has happened: it stays so */

ssize_t __real_write(int fd, const void *data, size_t bytes);
int __real_fsync(int fd);
int __real_fdatasync(int fd);
int __real_close(int fd);
int __real_fclose(FILE *file);
int __real_rename(const char *from, const char *to);
ssize_t __wrap_write(int fd, const void *data, size_t bytes);
int __wrap_fsync(int fd);
int __wrap_fdatasync(int fd);
int __wrap_close(int fd);
int __wrap_fclose(FILE *file);
int __wrap_rename(const char *from, const char *to);

static enum which_file file_of_path(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;
    for (int i = 1; i < N_FILES; i++) {
        if (strncmp(base, beginnings[i], strlen(beginnings[i])) == 0) {
            return (enum which_file)i;
        }
    }
    return FILE_OTHER;
}

static enum which_file file_of(int fd)
{
    char link[64], path[PATH_MAX];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (n <= 0) {
        return FILE_OTHER;
    }
    path[n] = '\0';
    return file_of_path(path);
}

static enum fault_action due(enum which_file file, const char *call)
{
    char point[32];
    if (file == FILE_OTHER) {
        return FAULT_NONE;
    }
    snprintf(point, sizeof point, "%s_%s", names[file], call);
    return fault_at(point, NULL, 0, NULL);
}

static int fail(int error)
{
    errno = error;
    return -1;
}

/* A call that writes nothing itself. */
static int plain(enum which_file file, const char *call)
{
    enum fault_action action = due(file, call);
    return action == FAULT_NONE ? 0 : fail(action == FAULT_ENOSPC ? ENOSPC : EIO);
}

ssize_t __wrap_write(int fd, const void *data, size_t bytes)
{
    enum which_file file = file_of(fd);
    if (atomic_load(&full[file])) {
        return fail(ENOSPC);
    }
    enum fault_action action = due(file, "write");
    if (action == FAULT_ERROR) {
        return fail(EIO);
    }
    if (action == FAULT_TORN || action == FAULT_ENOSPC) {
        ssize_t n = __real_write(fd, data, bytes / 2);
        if (action == FAULT_TORN) {
            fault_kill();
        }
        atomic_store(&full[file], true);
        return n > 0 ? n : fail(ENOSPC);
    }
    return __real_write(fd, data, bytes);
}

int __wrap_fsync(int fd)
{
    int rc = plain(file_of(fd), "sync");
    return rc ? rc : __real_fsync(fd);
}

int __wrap_fdatasync(int fd)
{
    int rc = plain(file_of(fd), "sync");
    return rc ? rc : __real_fdatasync(fd);
}

int __wrap_close(int fd)
{
    enum which_file file = file_of(fd);
    int rc = __real_close(fd);
    return rc ? rc : plain(file, "close");
}

// a C stream's own write(2) does not come through here: "write" is then before its last flush
int __wrap_fclose(FILE *f)
{
    enum which_file file = file_of(fileno(f));
    enum fault_action action = due(file, "write");
    if (action == FAULT_TORN) {
        fflush(f);
        if (ftruncate(fileno(f), ftell(f) / 2) == 0) {
            fault_kill();
        }
    }
    int rc = __real_fclose(f);
    if (action != FAULT_NONE) {
        return fail(action == FAULT_ENOSPC ? ENOSPC : EIO);
    }
    return rc ? rc : plain(file, "close");
}

int __wrap_rename(const char *from, const char *to)
{
    enum which_file file = file_of_path(to);
    int rc = plain(file, "rename");
    rc = rc ? rc : __real_rename(from, to);
    return rc ? rc : plain(file, "renamed");
}
