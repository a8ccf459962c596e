/* The journal: its bytes, torn tails, damage, locks, full disks.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "dist/journal.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/log.h"
#include "core/mem.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { MAX_SEEN = 64, SEEN_BYTES = 600 };

struct seen {
    int n;
    int stop_at; /* the visit that fails; -1: none */
    uint32_t kind[MAX_SEEN];
    size_t bytes[MAX_SEEN];
    unsigned char payload[MAX_SEEN][SEEN_BYTES];
};

static enum status see(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    struct seen *s = ctx;
    if (s->n == s->stop_at) {
        FAIL(ST_FORMAT, "stopped by the test");
    }
    if (s->n < MAX_SEEN) {
        s->kind[s->n] = kind;
        s->bytes[s->n] = bytes;
        if (bytes > 0) {
            memcpy(s->payload[s->n], payload, bytes < SEEN_BYTES ? bytes : SEEN_BYTES);
        }
    }
    s->n++;
    return ST_OK;
}

static struct seen seen;

static void forget(void)
{
    memset(&seen, 0, sizeof seen);
    seen.stop_at = -1;
}

static enum status reopen(const char *dir)
{
    struct journal *j = NULL;
    forget();
    enum status st = journal_open(&j, dir, see, &seen);
    journal_close(&j);
    return st;
}

/* An independent CRC-32C, bit by bit: reflected polynomial 0x82F63B78 (RFC 3720, appendix B.4). */
static uint32_t crc32c(const unsigned char *p, size_t n)
{
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++) {
            crc = crc & 1 ? crc >> 1 ^ 0x82F63B78u : crc >> 1;
        }
    }
    return ~crc;
}

static char folder[GEN_PATH_BYTES];

/* dir = a new subfolder of the test's folder (not made); file = its journal. */
static void new_dir(char dir[PATH_MAX], char file[PATH_MAX])
{
    static int n;
    snprintf(dir, PATH_MAX, "%s/%d", folder, n++);
    snprintf(file, PATH_MAX, "%s/journal.bin", dir);
}

/* Records of lengths 12, 0, 36, 5, 100 with kinds 1, 7, 2, 3, 0xFFFFFFFF. */
static const size_t lengths[] = {12, 0, 36, 5, 100};
static const uint32_t kinds[] = {1, 7, 2, 3, 0xFFFFFFFFu};
enum { N_RECORDS = 5 };

static void fill(unsigned char *p, int record)
{
    for (size_t i = 0; i < lengths[record]; i++) {
        p[i] = (unsigned char)(31 * record + (int)i);
    }
}

/* The file's bytes put together here; begin[k]: where record k begins. */
static size_t expected_file(unsigned char *out, size_t begin[N_RECORDS + 1])
{
    size_t at = 0;
    for (int k = 0; k < N_RECORDS; k++) {
        begin[k] = at;
        unsigned char *p = out + at;
        memcpy(p, "PMJ1", 4);
        for (int i = 0; i < 4; i++) {
            p[4 + i] = (unsigned char)(kinds[k] >> (8 * i));
            p[8 + i] = (unsigned char)(lengths[k] >> (8 * i));
        }
        fill(p + 16, k);
        unsigned char covered[8 + 100];
        memcpy(covered, p + 4, 8);
        memcpy(covered + 8, p + 16, lengths[k]);
        uint32_t crc = crc32c(covered, 8 + lengths[k]);
        for (int i = 0; i < 4; i++) {
            p[12 + i] = (unsigned char)(crc >> (8 * i));
        }
        at += 16 + lengths[k];
    }
    begin[N_RECORDS] = at;
    return at;
}

static void check_seen(int n)
{
    CHECK(seen.n == n);
    for (int k = 0; k < n && k < N_RECORDS; k++) {
        unsigned char p[100];
        fill(p, k);
        CHECK(seen.kind[k] == kinds[k] && seen.bytes[k] == lengths[k]);
        CHECK(memcmp(seen.payload[k], p, lengths[k]) == 0);
    }
}

static void test_bytes(void)
{
    CHECK(crc32c((const unsigned char *)"123456789", 9) == 0xE3069283u);
    char dir[PATH_MAX], file[PATH_MAX];
    new_dir(dir, file);
    struct journal *j = NULL;
    forget();
    CHECK_OK(journal_open(&j, dir, see, &seen));
    CHECK(seen.n == 0);
    if (!j) {
        return;
    }
    CHECK_OK(journal_reserve(j, 100));
    uint64_t allocs = mem_alloc_count();
    for (int k = 0; k < N_RECORDS; k++) {
        unsigned char p[100];
        fill(p, k);
        CHECK_OK(journal_append(j, kinds[k], lengths[k] ? p : NULL, lengths[k], k % 2 == 0));
    }
    CHECK(mem_alloc_count() == allocs);
    journal_close(&j);
    CHECK(j == NULL);
    journal_close(&j);
    unsigned char expected[512];
    size_t begin[N_RECORDS + 1], n = expected_file(expected, begin), found_n = 0;
    char *found = gen_read_file(file, &found_n);
    CHECK(found && found_n == n && memcmp(found, expected, n) == 0);
    free(found);
    CHECK_OK(reopen(dir));
    check_seen(N_RECORDS);
    size_t bad = 99;
    forget();
    CHECK_OK(journal_read(dir, see, &seen, &bad));
    check_seen(N_RECORDS);
    CHECK(bad == 0);
    CHECK_OK(journal_read(dir, NULL, NULL, NULL));
}

/* Written to byte `cut`: whole records are seen, the rest is cut, and appending goes on. */
static void test_torn(void)
{
    char dir[PATH_MAX], file[PATH_MAX];
    new_dir(dir, file);
    CHECK(mkdir(dir, 0777) == 0);
    unsigned char bytes[512];
    size_t begin[N_RECORDS + 1], n = expected_file(bytes, begin);
    for (size_t cut = 0; cut <= n; cut++) {
        int whole = 0;
        while (whole < N_RECORDS && begin[whole + 1] <= cut) {
            whole++;
        }
        gen_write_file(file, bytes, cut);
        size_t bad = 99;
        forget();
        CHECK_OK(journal_read(dir, see, &seen, &bad));
        check_seen(whole);
        CHECK(bad == cut - begin[whole]);
        struct stat info;
        CHECK(stat(file, &info) == 0 && info.st_size == (off_t)cut); // reading cuts nothing
        // each byte of the last two records, and of the first; syncing all would take long
        if (cut < begin[N_RECORDS - 2] && cut > begin[1]) {
            continue;
        }
        CHECK_OK(reopen(dir));
        check_seen(whole);
        CHECK(stat(file, &info) == 0 && info.st_size == (off_t)begin[whole]);
        if (cut % 10 == 3) {
            struct journal *j = NULL;
            forget();
            CHECK_OK(journal_open(&j, dir, see, &seen));
            CHECK_OK(journal_append(j, 77, "after", 5, false));
            journal_close(&j);
            CHECK_OK(reopen(dir));
            CHECK(seen.n == whole + 1 && seen.kind[whole] == 77);
        }
    }
}

static void test_flipped(void)
{
    char dir[PATH_MAX], file[PATH_MAX];
    new_dir(dir, file);
    CHECK(mkdir(dir, 0777) == 0);
    unsigned char bytes[512];
    size_t begin[N_RECORDS + 1], n = expected_file(bytes, begin);
    for (size_t at = 0; at < n; at++) {
        int record = 0;
        while (begin[record + 1] <= at) {
            record++;
        }
        for (int bit = 0; bit < 8; bit++) {
            bytes[at] ^= (unsigned char)(1 << bit);
            gen_write_file(file, bytes, n);
            bytes[at] ^= (unsigned char)(1 << bit);
            // a first length beyond the end of this short file is a torn first record
            bool torn = at >= 8 && at < 12 && (at > 8 || bit >= 6);
            bool huge = at == 11 && bit >= 6; // above 1 GiB: no length at all
            size_t bad = 99;
            forget();
            if (record == 0 && (!torn || huge)) {
                CHECK_STATUS(journal_read(dir, see, &seen, &bad), ST_FORMAT,
                             "not a pmpd journal, or its first record is damaged");
                CHECK(seen.n == 0);
            } else if (record > 0) {
                CHECK_OK(journal_read(dir, see, &seen, &bad));
                check_seen(record);
                CHECK(bad == n - begin[record]);
            }
        }
        if (record > 0) {
            bytes[at] ^= 0x10;
            gen_write_file(file, bytes, n);
            bytes[at] ^= 0x10;
            CHECK_OK(reopen(dir));
            check_seen(record);
            struct stat info;
            CHECK(stat(file, &info) == 0 && info.st_size == (off_t)begin[record]);
        }
    }
}

static void check_untouched(const char *dir, const char *file, const void *bytes, size_t n)
{
    gen_write_file(file, bytes, n);
    CHECK_STATUS(reopen(dir), ST_FORMAT, file);
    CHECK(strstr(status_message(), "left as it is") != NULL);
    forget();
    CHECK_STATUS(journal_read(dir, see, &seen, NULL), ST_FORMAT, "not a pmpd journal");
    size_t found_n = 0;
    char *found = gen_read_file(file, &found_n);
    CHECK(found && found_n == n && memcmp(found, bytes, n) == 0);
    free(found);
}

static void test_foreign(void)
{
    char dir[PATH_MAX], file[PATH_MAX];
    new_dir(dir, file);
    CHECK(mkdir(dir, 0777) == 0);
    check_untouched(dir, file, "x", 1);
    check_untouched(dir, file, "PMJ2", 4);
    check_untouched(dir, file, "{\"a\": 1}\n", 9);
    static unsigned char zeros[5000];
    check_untouched(dir, file, zeros, sizeof zeros);
    // a journal's magic, but a first record that is longer than a large file
    memcpy(zeros, "PMJ1\1\0\0\0\0\0\1\0", 12);
    check_untouched(dir, file, zeros, sizeof zeros);
    // the same in a small file is a torn first record
    gen_write_file(file, zeros, 300);
    CHECK_OK(reopen(dir));
    CHECK(seen.n == 0);
    // a length above the limit, in the second record
    unsigned char bytes[512];
    size_t begin[N_RECORDS + 1];
    expected_file(bytes, begin);
    memset(bytes + begin[1] + 8, 0xFF, 4);
    gen_write_file(file, bytes, begin[2]);
    CHECK_OK(reopen(dir));
    check_seen(1);
}

static void test_visit_fails(void)
{
    char dir[PATH_MAX], file[PATH_MAX];
    new_dir(dir, file);
    CHECK(mkdir(dir, 0777) == 0);
    unsigned char bytes[512];
    size_t begin[N_RECORDS + 1], n = expected_file(bytes, begin);
    gen_write_file(file, bytes, n - 1);
    struct journal *j = NULL;
    forget();
    seen.stop_at = 2;
    CHECK_STATUS(journal_open(&j, dir, see, &seen), ST_FORMAT, "stopped by the test");
    CHECK(j == NULL);
    struct stat info;
    CHECK(stat(file, &info) == 0 && info.st_size == (off_t)(n - 1)); // nothing was cut
    CHECK_OK(reopen(dir));                                           // and the lock is free
}

static void test_lock(void)
{
    char dir[PATH_MAX], file[PATH_MAX], expected[64];
    new_dir(dir, file);
    int ready[2], leave[2];
    CHECK(pipe(ready) == 0 && pipe(leave) == 0);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct journal *j = NULL;
        char c = journal_open(&j, dir, NULL, NULL) == ST_OK ? 'y' : 'n';
        ssize_t rc = write(ready[1], &c, 1);
        rc += read(leave[0], &c, 1);
        _exit(rc == 2 ? 0 : 1);
    }
    char c = 0;
    CHECK(read(ready[0], &c, 1) == 1 && c == 'y');
    struct stat before, after;
    CHECK(stat(file, &before) == 0);
    CHECK_STATUS(reopen(dir), ST_USER, "journal.bin is held by ");
    snprintf(expected, sizeof expected, "process %d", (int)child);
    if (strstr(status_message(), "another process") == NULL) { // /proc/locks may be missing
        CHECK(strstr(status_message(), expected) != NULL);
    }
    CHECK(stat(file, &after) == 0 && after.st_size == before.st_size);
    CHECK_OK(journal_read(dir, NULL, NULL, NULL)); // reading needs no lock
    CHECK(write(leave[1], "x", 1) == 1);
    int rc = 1;
    CHECK(waitpid(child, &rc, 0) == child && rc == 0);
    CHECK_OK(reopen(dir)); // the lock went with the process
    close(ready[0]);
    close(ready[1]);
    close(leave[0]);
    close(leave[1]);
}

static void test_directories(void)
{
    char dir[PATH_MAX], file[PATH_MAX];
    new_dir(dir, file);
    char deep[PATH_MAX + 32];
    snprintf(deep, sizeof deep, "%s//a/b/../c/", dir);
    // a/b/.. is a once b is there
    CHECK_OK(reopen(deep));
    snprintf(deep, sizeof deep, "%s/a/c/journal.bin", dir);
    CHECK(access(deep, R_OK) == 0);
    // a file in the way
    snprintf(deep, sizeof deep, "%s/a/c/journal.bin/x", dir);
    CHECK_STATUS(reopen(deep), ST_IO, "choose another output.dir");
    CHECK_STATUS(reopen("/proc/no-such-place"), ST_IO, "/proc/no-such-place");
    CHECK_STATUS(reopen(""), ST_IO, "output.dir");
    static char name[PATH_MAX + 10];
    memset(name, 'x', sizeof name - 1);
    CHECK_STATUS(reopen(name), ST_IO, "output.dir");
    CHECK_STATUS(journal_read(folder, see, &seen, NULL), ST_IO, "is this a run directory");
    // the journal's name taken by a directory
    snprintf(deep, sizeof deep, "%s/z/journal.bin", dir);
    CHECK_OK(reopen(deep));
    snprintf(deep, sizeof deep, "%s/z", dir);
    CHECK_STATUS(reopen(deep), ST_IO, "journal.bin");
    if (geteuid() != 0) {
        CHECK(chmod(dir, 0555) == 0);
        CHECK_STATUS(reopen(dir), ST_IO, "make the run directory writable");
        CHECK(chmod(dir, 0777) == 0);
    }
}

/* The disk ends inside the second record: the first stays, the file is cut back, a shorter record
 * still fits. */
static void fill_disk(const char *dir, const char *file, size_t large)
{
    struct journal *j = NULL;
    CHECK_OK(journal_open(&j, dir, NULL, NULL));
    if (!j) {
        return;
    }
    unsigned char *p = calloc(large, 1);
    CHECK_OK(journal_append(j, 1, "first", 5, true));
    CHECK_STATUS(journal_append(j, 2, p, large, true), ST_IO, "make room on that file system");
    CHECK(strstr(status_message(), file) != NULL);
    struct stat info;
    CHECK(stat(file, &info) == 0 && info.st_size == 16 + 5);
    CHECK_OK(journal_append(j, 3, p, 100, true));
    journal_close(&j);
    free(p);
    CHECK_OK(reopen(dir));
    CHECK(seen.n == 2 && seen.kind[0] == 1 && seen.kind[1] == 3 && seen.bytes[1] == 100);
}

static void test_full(void)
{
    char dir[PATH_MAX], file[PATH_MAX];
    // a limit on the size of files stands for a small disk where mounting is not allowed
    new_dir(dir, file);
    struct rlimit old, small = {.rlim_cur = 8192};
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    small.rlim_max = old.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    fill_disk(dir, file, 20000);
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);

    new_dir(dir, file);
    CHECK(mkdir(dir, 0777) == 0);
    if (geteuid() != 0 || mount("tmpfs", dir, "tmpfs", 0, "size=64k") != 0) {
        printf("no small file system can be mounted here: that part is left out\n");
        return;
    }
    fill_disk(dir, file, 200000);
    CHECK(umount(dir) == 0);
}

static void test_too_large(void)
{
    char dir[PATH_MAX], file[PATH_MAX];
    new_dir(dir, file);
    struct journal *j = NULL;
    CHECK_OK(journal_open(&j, dir, NULL, NULL));
    CHECK_STATUS(journal_append(j, 1, "", (size_t)JOURNAL_MAX_PAYLOAD + 1, false), ST_SHAPE,
                 "at most");
    CHECK_STATUS(journal_reserve(j, SIZE_MAX), ST_SHAPE, "at most");
    // a record larger than the first read buffer
    size_t n = 300000;
    unsigned char *p = malloc(n);
    struct gen_rng rng = {1};
    for (size_t i = 0; i < n; i++) {
        p[i] = (unsigned char)gen_next(&rng);
    }
    CHECK_OK(journal_append(j, 9, p, n, true));
    CHECK_OK(journal_append(j, 1, "end", 3, true));
    journal_close(&j);
    CHECK_OK(reopen(dir));
    CHECK(seen.n == 2 && seen.bytes[0] == n && memcmp(seen.payload[0], p, SEEN_BYTES) == 0);
    CHECK(seen.bytes[1] == 3);
    free(p);
}

static void test_pack(void)
{
    unsigned char buf[JOURNAL_SMALL_BYTES];
    struct journal_run run = {.epoch = 3, .unix_s = 1.5}, run2;
    // 1.5 = 0x3FF8000000000000
    static const unsigned char run_bytes[] = {3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xF8, 0x3F};
    CHECK(journal_pack_run(buf, &run) == 12 && memcmp(buf, run_bytes, 12) == 0);
    CHECK_OK(journal_unpack_run(&run2, buf, 12));
    CHECK(run2.epoch == 3);
    CHECK_NEAR(run2.unix_s, 1.5, 0);
    CHECK_STATUS(journal_unpack_run(&run2, buf, 11), ST_FORMAT, "11 bytes, expected 12");

    struct journal_start start = {.ordinal = -2,
                                  .key = {0x0102030405060708u, UINT64_MAX},
                                  .attempt = 2,
                                  .epoch = INT32_MAX,
                                  .replica = 5},
                         start2;
    CHECK(journal_pack_start(buf, &start) == 36);
    CHECK(buf[0] == 0xFE && buf[7] == 0xFF && buf[8] == 8 && buf[15] == 1 && buf[24] == 2);
    CHECK_OK(journal_unpack_start(&start2, buf, 36));
    CHECK(start2.ordinal == -2 && start2.key[0] == start.key[0] && start2.key[1] == UINT64_MAX);
    CHECK(start2.attempt == 2 && start2.epoch == INT32_MAX && start2.replica == 5);
    CHECK_STATUS(journal_unpack_start(&start2, buf, 37), ST_FORMAT, "start record");

    struct journal_failed failed = {.ordinal = 7, .key = {1, 2}, .attempts = 2}, failed2;
    memset(failed.reason, 'r', sizeof failed.reason); // no end: cut, not read past
    size_t n = journal_pack_failed(buf, &failed);
    CHECK(n == 284 && n <= JOURNAL_SMALL_BYTES);
    CHECK_OK(journal_unpack_failed(&failed2, buf, n));
    CHECK(failed2.ordinal == 7 && failed2.key[1] == 2 && failed2.attempts == 2);
    CHECK(strlen(failed2.reason) == sizeof failed2.reason - 1);
    snprintf(failed.reason, sizeof failed.reason, "out of memory");
    n = journal_pack_failed(buf, &failed);
    CHECK(buf[28 + 13] == 0 && buf[28 + 14] == 0 && buf[n - 1] == 0); // nothing leaks behind it
    CHECK_OK(journal_unpack_failed(&failed2, buf, n));
    CHECK(strcmp(failed2.reason, "out of memory") == 0);
    buf[n - 1] = 'x';
    CHECK_STATUS(journal_unpack_failed(&failed2, buf, n), ST_FORMAT, "has no end");
    CHECK_STATUS(journal_unpack_failed(&failed2, buf, 0), ST_FORMAT, "failed record");
}

static void test_pack_state(void)
{
    unsigned char buf[JOURNAL_SMALL_BYTES];
    const struct journal_state a = {.lease = 7,
                                    .ordinal = 0x0102030405,
                                    .key = {11, 12},
                                    .dial = 0.25f,
                                    .target = 2.8,
                                    .offset = -1.5,
                                    .slope = 3.5,
                                    .account = 0.125};
    struct journal_state b;
    size_t n = journal_pack_state(buf, &a);
    CHECK(n == 68 && buf[0] == 7 && buf[8] == 5 && buf[12] == 1 && buf[16] == 11);
    CHECK(memcmp(buf + 32, "\0\0\x80\x3e", 4) == 0); // 0.25
    CHECK_OK(journal_unpack_state(&b, buf, n));
    CHECK(b.lease == a.lease && b.ordinal == a.ordinal && b.key[0] == 11 && b.key[1] == 12);
    CHECK_NEAR(b.dial, a.dial, 0);
    CHECK_NEAR(b.target, a.target, 0);
    CHECK_NEAR(b.offset, a.offset, 0);
    CHECK_NEAR(b.slope, a.slope, 0);
    CHECK_NEAR(b.account, a.account, 0);
    CHECK_STATUS(journal_unpack_state(&b, buf, n - 1), ST_FORMAT, "67 bytes; expected 68");
    memcpy(buf + 32, "\0\0\xc0\x7f", 4); // not a number
    CHECK_STATUS(journal_unpack_state(&b, buf, n), ST_FORMAT, "expected 0 to 1");
    memcpy(buf + 32, "\0\0\0\0", 4);
    buf[7] = 0x80;
    CHECK_STATUS(journal_unpack_state(&b, buf, n), ST_FORMAT, "controller state of lease -");
}

static void test_pack_faults(void)
{
    unsigned char buf[JOURNAL_SMALL_BYTES];
    struct journal_fault fault = {.ordinal = 0x0102030405060708,
                                  .key = {5, 0xFFu},
                                  .epoch = 1,
                                  .rank = 2,
                                  .n_company = 3,
                                  .signal = 11,
                                  .reason = "it broke"},
                         fault2;
    memset(buf, 0xEE, sizeof buf);
    size_t n = journal_pack_fault(buf, &fault);
    CHECK(n == 296 && n <= JOURNAL_SMALL_BYTES && buf[n] == 0xEE);
    static const unsigned char numbers[] = {8, 7, 6, 5,    4, 3, 2, 1, 5, 0, 0, 0, 0,
                                            0, 0, 0, 0xFF, 0, 0, 0, 0, 0, 0, 0, 1, 0,
                                            0, 0, 2, 0,    0, 0, 3, 0, 0, 0, 11};
    CHECK(memcmp(buf, numbers, sizeof numbers) == 0);
    CHECK(memcmp(buf + 40, "it broke\0", 10) == 0 && buf[n - 1] == 0);
    CHECK_OK(journal_unpack_fault(&fault2, buf, n));
    CHECK(fault2.ordinal == fault.ordinal && fault2.key[0] == 5 && fault2.key[1] == 0xFF);
    CHECK(fault2.epoch == 1 && fault2.rank == 2 && fault2.n_company == 3 && fault2.signal == 11);
    CHECK(strcmp(fault2.reason, "it broke") == 0);
    CHECK_STATUS(journal_unpack_fault(&fault2, buf, n - 1), ST_FORMAT, "fault record of 295 bytes");
    memset(buf + 40, 'x', 256);
    CHECK_STATUS(journal_unpack_fault(&fault2, buf, n), ST_FORMAT, "has no end");

    struct journal_end end = {.epoch = 2, .how = JOURNAL_STOPPED, .unix_s = 1.5}, end2;
    memset(end.reason, 'r', sizeof end.reason);
    memset(buf, 0xEE, sizeof buf);
    n = journal_pack_end(buf, &end);
    CHECK(n == 272 && buf[n] == 0xEE && buf[n - 1] == 0);
    static const unsigned char head[] = {2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xF8, 0x3F};
    CHECK(memcmp(buf, head, sizeof head) == 0);
    CHECK_OK(journal_unpack_end(&end2, buf, n));
    CHECK(end2.epoch == 2 && end2.how == JOURNAL_STOPPED && strlen(end2.reason) == 255);
    CHECK_NEAR(end2.unix_s, 1.5, 0);
    CHECK_STATUS(journal_unpack_end(&end2, buf, n + 1), ST_FORMAT, "end record");
    buf[n - 1] = 1;
    CHECK_STATUS(journal_unpack_end(&end2, buf, n), ST_FORMAT, "has no end");
}

/* The main thread hands in records while the lifeline's thread appends faults. */
enum { N_EACH = 20000, MOST_BYTES = 700 };

struct writer {
    struct journal *j;
    uint32_t kind;
};

static size_t bytes_of(int i)
{
    return (size_t)i * 31 % MOST_BYTES;
}

static void *write_many(void *ctx)
{
    const struct writer *w = ctx;
    unsigned char p[MOST_BYTES];
    for (int i = 0; i < N_EACH; i++) {
        memset(p, (int)w->kind + i, sizeof p);
        if (journal_append(w->j, w->kind, p, bytes_of(i), false) != ST_OK) {
            return NULL;
        }
    }
    return ctx;
}

struct order {
    int n[2];
    bool wrong;
};

static enum status check_order(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    struct order *o = ctx;
    if (kind < 20 || kind > 21) {
        o->wrong = true;
        return ST_OK;
    }
    int i = o->n[kind - 20]++;
    unsigned char p[MOST_BYTES];
    memset(p, (int)kind + i, sizeof p);
    o->wrong = o->wrong || bytes != bytes_of(i) || (bytes > 0 && memcmp(payload, p, bytes) != 0);
    return ST_OK;
}

static void test_two_threads(void)
{
    char dir[PATH_MAX], file[PATH_MAX];
    new_dir(dir, file);
    struct journal *j = NULL;
    CHECK_OK(journal_open(&j, dir, NULL, NULL));
    struct writer main_thread = {j, 20}, other = {j, 21};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, write_many, &other) == 0);
    CHECK(write_many(&main_thread) == &main_thread);
    void *rc = NULL;
    CHECK(pthread_join(thread, &rc) == 0 && rc == &other);
    journal_close(&j);
    struct order o = {0};
    size_t bad = 99;
    CHECK_OK(journal_read(dir, check_order, &o, &bad));
    CHECK(bad == 0 && o.n[0] == N_EACH && o.n[1] == N_EACH && !o.wrong);
}

/* Appending beside other work: whole, in order, and a full disk is told to whoever asks. */
static enum status append_beside(struct journal *j, uint32_t kind, const void *payload, size_t n)
{
    bool done = false;
    journal_append_begin(j, kind, payload, n);
    while (!done) {
        TRY(journal_append_done(j, &done));
    }
    return ST_OK;
}

static void test_beside(void)
{
    char dir[PATH_MAX], file[PATH_MAX], payload[SEEN_BYTES];
    struct journal *j = NULL;
    new_dir(dir, file);
    CHECK_OK(journal_open(&j, dir, NULL, NULL));
    CHECK_OK(journal_reserve(j, sizeof payload));
    CHECK_OK(journal_writer_open(j));
    CHECK_OK(journal_writer_open(j)); // once is enough
    uint64_t allocs = mem_alloc_count();
    for (uint32_t i = 0; i < 40; i++) {
        memset(payload, (int)i, sizeof payload);
        if (i % 3 == 0) {
            CHECK_OK(journal_append(j, i, payload, i, true));
        } else {
            CHECK_OK(append_beside(j, i, payload, i));
        }
        memset(payload, 0xee, sizeof payload); // it is no longer needed
    }
    CHECK(mem_alloc_count() == allocs);
    struct rlimit old, small = {.rlim_cur = 100};
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    small.rlim_max = old.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    CHECK_STATUS(append_beside(j, 1, payload, 10), ST_IO, "journal.bin");
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
    CHECK_OK(append_beside(j, 99, "end", 3));
    journal_append_begin(j, 100, "under way", 9);
    journal_close(&j); // waits for it
    CHECK_OK(reopen(dir));
    CHECK(seen.n == 42 && seen.kind[40] == 99 && seen.kind[41] == 100 && seen.bytes[41] == 9);
    for (int i = 0; i < 40 && i < seen.n; i++) {
        CHECK(seen.kind[i] == (uint32_t)i && seen.bytes[i] == (size_t)i);
        CHECK(i == 0 || (seen.payload[i][0] == i && seen.payload[i][i - 1] == i));
    }
}

int main(void)
{
    log_set_level(LOG_ERROR); // cut tails are expected here
    gen_folder(folder);
    test_bytes();
    test_torn();
    test_flipped();
    test_foreign();
    test_visit_fails();
    test_lock();
    test_directories();
    test_full();
    test_too_large();
    test_pack();
    test_pack_faults();
    test_pack_state();
    test_two_threads();
    test_beside();
    gen_remove(folder);
    return check_report();
}
