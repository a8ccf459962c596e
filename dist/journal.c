/* SPDX-License-Identifier: Apache-2.0 */
#include "dist/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <isa-l.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/journal_bytes.h"

enum { MAGIC_BYTES = 4, HEAD_BYTES = 16, TORN_FIRST_BYTES = 4096 };
static const char MAGIC[MAGIC_BYTES] = {'P', 'M', 'J', '1'};

enum writer_state { WRITER_IDLE, WRITER_ASKED, WRITER_DONE, WRITER_QUIT };

/* The thread that waits for the disk, and the record that it was given. */
struct writer {
    pthread_t thread;
    pthread_mutex_t lock; /* with wake: of the way from IDLE or DONE to ASKED or QUIT */
    pthread_cond_t wake;
    _Atomic int state; /* enum writer_state */
    bool started;
    uint32_t kind;
    const void *payload; /* borrowed until DONE */
    size_t bytes;
    enum status st; /* how it ended; text: the message of a failure */
    char text[PATH_MAX + 256];
};

struct journal {
    int fd;
    struct writer writer;
    int64_t size;         /* bytes of whole records: where the next one begins */
    unsigned char *frame; /* (frame_bytes) owned */
    size_t frame_bytes;
    bool broken;          /* a failed append could not be cut back */
    pthread_mutex_t lock; /* of all but fd and path: faults are appended by another thread */
    char path[PATH_MAX];
};

/* CRC-32C of kind, length (bytes 4..11 of the head) and payload. */
static uint32_t frame_crc(const unsigned char *head, const unsigned char *payload, size_t bytes)
{
    // isa-l's argument is not const, but it only reads; it leaves the inversions to the caller
    unsigned crc = crc32_iscsi((unsigned char *)(uintptr_t)(head + MAGIC_BYTES), 8, ~0u);
    crc = crc32_iscsi((unsigned char *)(uintptr_t)payload, (int)bytes, crc);
    return ~crc;
}

static enum status journal_path(char path[PATH_MAX], const char *dir)
{
    int n = snprintf(path, PATH_MAX, "%s/journal.bin", dir);
    if (n < 0 || n >= PATH_MAX) {
        FAIL(ST_IO, "the path of the run directory is too long: %.200s...", dir);
    }
    return ST_OK;
}

static enum status sync_directory(const char *dir)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        FAIL(ST_IO, "%s: cannot open the directory: %s", dir, strerror(errno));
    }
    int rc = fsync(fd), e = errno;
    close(fd);
    if (rc != 0 && e != EINVAL && e != ENOTSUP) { // some file systems have nothing to do here
        FAIL(ST_IO, "%s: cannot sync the directory: %s", dir, strerror(e));
    }
    return ST_OK;
}

/* The directory that holds path[0..n), as a string. */
static void parent_of(char parent[PATH_MAX], const char *path, size_t n)
{
    while (n > 0 && path[n - 1] == '/') {
        n--;
    }
    while (n > 0 && path[n - 1] != '/') {
        n--;
    }
    if (n == 0) {
        memcpy(parent, ".", 2);
    } else {
        memcpy(parent, path, n);
        parent[n] = '\0';
    }
}

static enum status make_directories(const char *dir)
{
    char path[PATH_MAX], parent[PATH_MAX];
    size_t n = strlen(dir);
    if (n == 0 || n >= sizeof path) {
        FAIL(ST_IO, "the run directory's name has %zu bytes, expected 1 to %d (output.dir)", n,
             PATH_MAX - 1);
    }
    memcpy(path, dir, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (path[i] != '/' && path[i] != '\0') {
            continue;
        }
        char old = path[i];
        path[i] = '\0';
        if (mkdir(path, 0777) == 0) {
            parent_of(parent, path, i);
            TRY(sync_directory(parent));
        } else if (errno != EEXIST) {
            struct stat info;
            int e = errno;
            // a parent on a read-only or automounted place may exist and still refuse mkdir
            if (stat(path, &info) != 0 || !S_ISDIR(info.st_mode)) {
                FAIL(ST_IO, "%s: cannot make the run directory %s: %s; choose another output.dir",
                     path, dir, strerror(e));
            }
        }
        path[i] = old;
    }
    return ST_OK;
}

/* The process that holds the lock, from /proc/locks; 0: not known (another host, no /proc). */
static long lock_holder(int fd)
{
    struct stat info;
    FILE *f = fopen("/proc/locks", "re");
    long holder = 0;
    if (f && fstat(fd, &info) == 0) {
        char line[256];
        while (holder == 0 && fgets(line, sizeof line, f)) {
            long pid = 0;
            unsigned major_no = 0, minor_no = 0;
            uint64_t inode = 0;
            if (sscanf(line, "%*d: FLOCK %*s %*s %ld %x:%x:%" SCNu64, &pid, &major_no, &minor_no,
                       &inode) == 4 &&
                inode == info.st_ino && major_no == major(info.st_dev) &&
                minor_no == minor(info.st_dev)) {
                holder = pid;
            }
        }
    }
    if (f) {
        fclose(f);
    }
    return holder;
}

static enum status lock_file(int fd, const char *path)
{
    while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        if (errno == EINTR) {
            continue;
        }
        if (errno == EWOULDBLOCK) {
            long pid = lock_holder(fd);
            char who[64] = "another process";
            if (pid > 0) {
                snprintf(who, sizeof who, "process %ld", pid);
            }
            FAIL(ST_USER,
                 "%s is held by %s: wait for that run to end, or choose another "
                 "output.dir",
                 path, who);
        }
        if (errno == ENOSYS || errno == EOPNOTSUPP || errno == ENOLCK) {
            log_warn("%s: this file system has no locks (%s); make sure that no other run uses "
                     "this directory",
                     path, strerror(errno));
            return ST_OK;
        }
        FAIL(ST_IO, "%s: cannot lock: %s", path, strerror(errno));
    }
    return ST_OK;
}

static enum status read_exactly(int fd, void *out, size_t bytes, int64_t at, const char *path)
{
    unsigned char *p = out;
    while (bytes > 0) {
        ssize_t n = pread(fd, p, bytes, at);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            FAIL(ST_IO, "%s: cannot read at %" PRId64 ": %s", path, at, strerror(errno));
        }
        if (n == 0) {
            FAIL(ST_IO, "%s: became shorter while it was read", path);
        }
        p += n;
        bytes -= (size_t)n;
        at += n;
    }
    return ST_OK;
}

enum frame_state { FRAME_WHOLE, FRAME_TORN, FRAME_BAD };

struct scan {
    int fd;
    const char *path;
    int64_t file_bytes, at; /* at: behind the last whole record */
    unsigned char head[HEAD_BYTES];
    unsigned char *payload; /* (room) owned */
    size_t room;
};

/* Reads the frame at s->at. TORN: the file ends inside it, and what is there looks like a frame. */
static enum status read_frame(struct scan *s, enum frame_state *state)
{
    int64_t left = s->file_bytes - s->at;
    size_t head = left < HEAD_BYTES ? (size_t)left : HEAD_BYTES;
    TRY(read_exactly(s->fd, s->head, head, s->at, s->path));
    *state = FRAME_BAD;
    if (memcmp(s->head, MAGIC, head < MAGIC_BYTES ? head : MAGIC_BYTES) != 0) {
        return ST_OK;
    }
    if (head < HEAD_BYTES) {
        *state = FRAME_TORN;
        return ST_OK;
    }
    size_t bytes = get_u32(s->head + 8);
    if (bytes > JOURNAL_MAX_PAYLOAD) {
        return ST_OK;
    }
    if ((int64_t)bytes > left - HEAD_BYTES) {
        *state = FRAME_TORN;
        return ST_OK;
    }
    if (bytes > s->room) { // at most the size of the file
        size_t room = bytes > 2 * s->room ? bytes : 2 * s->room;
        mem_free(s->payload);
        s->payload = NULL;
        s->room = 0;
        TRY(MEM_NEW(&s->payload, room));
        s->room = room;
    }
    TRY(read_exactly(s->fd, s->payload, bytes, s->at + HEAD_BYTES, s->path));
    if (frame_crc(s->head, s->payload, bytes) == get_u32(s->head + 12)) {
        *state = FRAME_WHOLE;
    }
    return ST_OK;
}

static enum status scan_frames(struct scan *s, journal_visit_fn *visit, void *ctx)
{
    enum frame_state state = FRAME_WHOLE;
    while (s->at < s->file_bytes) {
        TRY(read_frame(s, &state));
        if (state != FRAME_WHOLE) {
            break;
        }
        size_t bytes = get_u32(s->head + 8);
        if (visit) {
            TRY(visit(ctx, get_u32(s->head + 4), s->payload, bytes));
        }
        s->at += HEAD_BYTES + (int64_t)bytes;
    }
    // A run begins with a short record, so a first record that is torn leaves a short file. A
    // longer file without a whole first record is somebody else's, or a damaged journal: all of it
    // would go.
    if (s->at == 0 && (state == FRAME_BAD || s->file_bytes > TORN_FIRST_BYTES)) {
        FAIL(ST_FORMAT,
             "%s: not a pmpd journal, or its first record is damaged (%" PRId64
             " bytes); it was left as it is: move it away, or choose another output.dir",
             s->path, s->file_bytes);
    }
    return ST_OK;
}

/* Visits all records; *size: bytes of whole records, *bad: bytes behind them. */
static enum status visit_file(int fd, const char *path, journal_visit_fn *visit, void *ctx,
                              int64_t *size, int64_t *bad)
{
    struct stat info;
    if (fstat(fd, &info) != 0) {
        FAIL(ST_IO, "%s: %s", path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        FAIL(ST_IO, "%s: not a regular file", path);
    }
    struct scan s = {.fd = fd, .path = path, .file_bytes = info.st_size};
    enum status st = ST_OK;
    s.room = 4096;
    TRY(MEM_NEW(&s.payload, s.room));
    TRY_GOTO(st, scan_frames(&s, visit, ctx), done);
    *size = s.at;
    *bad = s.file_bytes - s.at;
done:
    mem_free(s.payload);
    return st;
}

static enum status cut_tail(struct journal *j, int64_t bad)
{
    log_warn("%s: cut %" PRId64 " bytes of an unfinished or damaged record at its end", j->path,
             bad);
    if (ftruncate(j->fd, j->size) != 0 || fsync(j->fd) != 0) {
        FAIL(ST_IO, "%s: cannot cut a damaged tail: %s", j->path, strerror(errno));
    }
    return ST_OK;
}

enum status journal_open(struct journal **out, const char *dir, journal_visit_fn *visit, void *ctx)
{
    struct journal *j = NULL;
    enum status st = ST_OK;
    int64_t bad = 0;
    TRY(make_directories(dir));
    TRY(MEM_NEW(&j, 1));
    j->fd = -1;
    pthread_mutex_init(&j->lock, NULL);
    TRY_GOTO(st, journal_path(j->path, dir), failed);
    j->fd = open(j->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (j->fd < 0) {
        FAIL_GOTO(st, ST_IO, failed,
                  "%s: cannot open for writing: %s; make the run directory "
                  "writable, or choose another output.dir",
                  j->path, strerror(errno));
    }
    TRY_GOTO(st, lock_file(j->fd, j->path), failed);
    TRY_GOTO(st, sync_directory(dir), failed);
    TRY_GOTO(st, visit_file(j->fd, j->path, visit, ctx, &j->size, &bad), failed);
    if (bad > 0) {
        TRY_GOTO(st, cut_tail(j, bad), failed);
    }
    TRY_GOTO(st, journal_reserve(j, JOURNAL_SMALL_BYTES), failed);
    *out = j;
    return ST_OK;
failed:
    journal_close(&j);
    return st;
}

enum status journal_read(const char *dir, journal_visit_fn *visit, void *ctx, size_t *n_bad_tail)
{
    char path[PATH_MAX];
    TRY(journal_path(path, dir));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        FAIL(ST_IO, "%s: cannot open: %s; is this a run directory?", path, strerror(errno));
    }
    int64_t size = 0, bad = 0;
    enum status st = visit_file(fd, path, visit, ctx, &size, &bad);
    close(fd);
    TRY(st);
    if (n_bad_tail) {
        *n_bad_tail = (size_t)bad;
    }
    return ST_OK;
}

static enum status write_all(int fd, const unsigned char *p, size_t bytes, int *error)
{
    while (bytes > 0) {
        ssize_t n = write(fd, p, bytes);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            *error = n < 0 ? errno : ENOSPC;
            return ST_IO;
        }
        // a short write is the last one before a full disk; the next says why
        p += n;
        bytes -= (size_t)n;
    }
    return ST_OK;
}

static const char *advice(int error)
{
    if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
        return "make room on that file system and start again: finished prompts are kept";
    }
    return "check the file system and start again: finished prompts are kept";
}

static enum status reserve(struct journal *j, size_t payload_bytes)
{
    if (payload_bytes > JOURNAL_MAX_PAYLOAD) {
        FAIL(ST_SHAPE,
             "%s: a record of %zu bytes, at most %d are allowed; record fewer features "
             "(output.kv_features)",
             j->path, payload_bytes, JOURNAL_MAX_PAYLOAD);
    }
    size_t need = payload_bytes + HEAD_BYTES;
    if (need > j->frame_bytes) {
        unsigned char *frame = NULL;
        TRY(MEM_NEW(&frame, need));
        mem_free(j->frame);
        j->frame = frame;
        j->frame_bytes = need;
    }
    return ST_OK;
}

static enum status append(struct journal *j, uint32_t kind, const void *payload, size_t bytes,
                          bool durable)
{
    if (j->broken) {
        FAIL(ST_IO, "%s: an earlier write failed and could not be undone; start again", j->path);
    }
    TRY(reserve(j, bytes));
    memcpy(j->frame, MAGIC, MAGIC_BYTES);
    put_u32(j->frame + 4, kind);
    put_u32(j->frame + 8, (uint32_t)bytes);
    if (bytes > 0) {
        memcpy(j->frame + HEAD_BYTES, payload, bytes);
    }
    put_u32(j->frame + 12, frame_crc(j->frame, j->frame + HEAD_BYTES, bytes));
    size_t total = HEAD_BYTES + bytes;
    int error = 0;
    const char *what = "write";
    enum status st = write_all(j->fd, j->frame, total, &error);
    if (st == ST_OK && durable && fdatasync(j->fd) != 0) {
        error = errno;
        what = "sync";
        st = ST_IO;
    }
    if (st != ST_OK) {
        j->broken = ftruncate(j->fd, j->size) != 0;
        FAIL(st, "%s: cannot %s a record of %zu bytes: %s; %s", j->path, what, total,
             strerror(error), advice(error));
    }
    j->size += (int64_t)total;
    return ST_OK;
}

enum status journal_append(struct journal *j, uint32_t kind, const void *payload, size_t bytes,
                           bool durable)
{
    pthread_mutex_lock(&j->lock);
    enum status st = append(j, kind, payload, bytes, durable);
    pthread_mutex_unlock(&j->lock);
    return st;
}

enum status journal_reserve(struct journal *j, size_t payload_bytes)
{
    pthread_mutex_lock(&j->lock);
    enum status st = reserve(j, payload_bytes);
    pthread_mutex_unlock(&j->lock);
    return st;
}

static void *write_records(void *ctx)
{
    struct journal *j = ctx;
    struct writer *w = &j->writer;
    for (;;) {
        pthread_mutex_lock(&w->lock);
        while (atomic_load(&w->state) != WRITER_ASKED && atomic_load(&w->state) != WRITER_QUIT) {
            pthread_cond_wait(&w->wake, &w->lock);
        }
        bool quits = atomic_load(&w->state) == WRITER_QUIT;
        pthread_mutex_unlock(&w->lock);
        if (quits) {
            return NULL;
        }
        w->st = journal_append(j, w->kind, w->payload, w->bytes, true);
        snprintf(w->text, sizeof w->text, "%s", w->st == ST_OK ? "" : status_message());
        atomic_store(&w->state, WRITER_DONE);
    }
}

enum status journal_writer_open(struct journal *j)
{
    struct writer *w = &j->writer;
    if (w->started) {
        return ST_OK;
    }
    atomic_init(&w->state, WRITER_IDLE);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, NULL);
    int error = pthread_create(&w->thread, NULL, write_records, j);
    if (error != 0) {
        pthread_cond_destroy(&w->wake);
        pthread_mutex_destroy(&w->lock);
        FAIL(ST_NOMEM, "the journal's thread cannot be started: %s", strerror(error));
    }
    w->started = true;
    return ST_OK;
}

static void tell_writer(struct writer *w, enum writer_state state)
{
    pthread_mutex_lock(&w->lock);
    atomic_store(&w->state, state);
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
}

void journal_append_begin(struct journal *j, uint32_t kind, const void *payload, size_t bytes)
{
    struct writer *w = &j->writer;
    INVARIANT(w->started && atomic_load(&w->state) != WRITER_ASKED);
    w->kind = kind;
    w->payload = payload;
    w->bytes = bytes;
    tell_writer(w, WRITER_ASKED);
}

enum status journal_append_done(struct journal *j, bool *done)
{
    const struct writer *w = &j->writer;
    *done = atomic_load(&w->state) == WRITER_DONE;
    if (*done && w->st != ST_OK) {
        FAIL(w->st, "%s", w->text);
    }
    return ST_OK;
}

static void close_writer(struct writer *w)
{
    if (!w->started) {
        return;
    }
    while (atomic_load(&w->state) == WRITER_ASKED) {
        sched_yield(); // a record that is under way
    }
    tell_writer(w, WRITER_QUIT);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->wake);
    pthread_mutex_destroy(&w->lock);
    w->started = false;
}

void journal_close(struct journal **j)
{
    if (!j || !*j) {
        return;
    }
    close_writer(&(*j)->writer);
    if ((*j)->fd >= 0) {
        if (fdatasync((*j)->fd) != 0) {
            log_warn("%s: the last records may not be on disk: %s", (*j)->path, strerror(errno));
        }
        close((*j)->fd);
    }
    pthread_mutex_destroy(&(*j)->lock);
    mem_free((*j)->frame);
    mem_free(*j);
    *j = NULL;
}
