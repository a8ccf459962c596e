/* The lifeline. Without arguments, on any number of ranks: opening and closing leave nothing
 * behind, strangers are not listened to, a signal on the last rank stops rank 0. `drive MPIEXEC`:
 * starts itself under mpirun in each of the deadly modes and checks what the user and the journal
 * get, that nothing buries it, and that no process is left. SPDX-License-Identifier: Apache-2.0
 */
#include "dist/lifeline.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/log.h"
#include "dist/stop.h"
#include "tests/check.h"

enum { OUTPUT_BYTES = 1 << 16, N_STRANGERS = 300 };

/* Also when signals come in between. */
static void pause_ms(int ms)
{
    for (double until = clock_s() + ms * 1e-3, now = 0; (now = clock_s()) < until;) {
        poll(NULL, 0, (int)((until - now) * 1e3) + 1);
    }
}

/* ---- what the lifeline calls ---- */

static void say(const char *text)
{
    ssize_t n = write(STDOUT_FILENO, text, strlen(text));
    CHECK(n == (ssize_t)strlen(text));
}

/* In place of a journal: one line on stdout. */
static void on_fault(void *ctx, const struct lifeline_fault *f)
{
    char text[512];
    CHECK(ctx == NULL);
    int n = snprintf(text, sizeof text, "journalled: rank %d replica %d signal %d prompts", f->rank,
                     f->replica, f->signal);
    for (int32_t i = 0; i < f->n_prompts && i < 4; i++) {
        n += snprintf(text + n, sizeof text - (size_t)n, " %d", (int)f->ordinals[i]);
    }
    snprintf(text + n, sizeof text - (size_t)n, " of %d: %s\n", f->n_prompts, f->text);
    say(text);
}

static int32_t n_suspects = 2;

static int32_t suspects(void *ctx, int64_t *ordinals, int32_t capacity)
{
    (void)ctx;
    int32_t n = n_suspects < capacity ? n_suspects : capacity;
    for (int32_t i = 0; i < n; i++) {
        ordinals[i] = 4 + 3 * i;
    }
    return n;
}

/* ---- all is well ---- */

static int count_entries(const char *path)
{
    DIR *d = opendir(path);
    int n = 0;
    while (d && readdir(d)) {
        n++;
    }
    if (d) {
        closedir(d);
    }
    return n;
}

/* The port of an IPv4 socket of this process that listens; 0: none. */
static int find_port(void)
{
    for (int fd = 3; fd < 1024; fd++) {
        int listens = 0;
        socklen_t bytes = sizeof listens;
        struct sockaddr_in in = {0};
        if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &bytes) == 0 && listens) {
            bytes = sizeof in;
            if (getsockname(fd, (struct sockaddr *)&in, &bytes) == 0 && in.sin_family == AF_INET) {
                return ntohs(in.sin_port);
            }
        }
    }
    return 0;
}

static int n_refused;

/* A thread of rank 0: rubbish of many kinds to the port that the lifeline opens. */
static void *pester(void *unused)
{
    (void)unused;
    int port = 0;
    for (int i = 0; i < 5000 && port == 0; i++) {
        port = find_port();
        pause_ms(1);
    }
    static char rubbish[1 << 16];
    memset(rubbish, 0xFF, sizeof rubbish);
    memcpy(rubbish, "GET / HTTP/1.0\r\n\r\n", 18);
    // right but for the token
    struct {
        uint32_t magic, kind, bytes, unused;
        uint64_t token;
        int32_t rank;
        char host[68];
    } hello = {0x4C4D5031, 1, 80, 0, 12345, 1, "h"};
    int fds[N_STRANGERS];
    for (int i = 0; i < N_STRANGERS; i++) {
        struct sockaddr_in in = {.sin_family = AF_INET,
                                 .sin_port = htons((uint16_t)port),
                                 .sin_addr = {htonl(INADDR_LOOPBACK)}};
        fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        CHECK(connect(fds[i], (struct sockaddr *)&in, sizeof in) == 0);
        ssize_t n = 0;
        if (i % 4 == 1) {
            n = send(fds[i], rubbish, i < N_STRANGERS / 2 ? 18 : sizeof rubbish,
                     MSG_NOSIGNAL | MSG_DONTWAIT);
        } else if (i % 4 == 2) {
            n = send(fds[i], &hello, sizeof hello, MSG_NOSIGNAL);
        }
        CHECK(n >= 0 || errno == EPIPE || errno == ECONNRESET);
    }
    for (int i = 0; i < N_STRANGERS; i++) {
        char byte = 0;
        if (i % 4 == 2) { // those that said a whole hello hear nothing but the end
            ssize_t n = recv(fds[i], &byte, 1, 0);
            CHECK(n <= 0);
            n_refused += n <= 0;
        }
    }
    for (int i = 0; i < N_STRANGERS; i++) {
        close(fds[i]);
    }
    return NULL;
}

static void test_well(struct env *env)
{
    int n_files = count_entries("/proc/self/fd"), n_threads = count_entries("/proc/self/task");
    for (int i = 0; i < 3; i++) {
        CHECK_OK(lifeline_open(env, on_fault, suspects, NULL));
        CHECK(count_entries("/proc/self/task") == n_threads + 1);
        CHECK(count_entries("/proc/self/fd") > n_files);
        if (i == 1) {
            pause_ms(env->rank == 0 ? 0 : 100 * env->rank); // rank 0 closes first
        } else if (i == 2) {
            pause_ms(env->rank == 0 ? 200 : 0); // and last
        }
        lifeline_close();
        lifeline_close();
        lifeline_report("nobody hears", true);
        lifeline_pass_stop(SIGTERM);
        CHECK(count_entries("/proc/self/fd") == n_files);
        CHECK(count_entries("/proc/self/task") == n_threads);
    }
    struct sigaction now;
    CHECK(sigaction(SIGFPE, NULL, &now) == 0);
    struct sigaction before = now;
    CHECK_OK(lifeline_open(env, on_fault, suspects, NULL));
    CHECK(sigaction(SIGFPE, NULL, &now) == 0 && now.sa_sigaction != before.sa_sigaction);
    lifeline_close();
    CHECK(sigaction(SIGFPE, NULL, &now) == 0 && now.sa_sigaction == before.sa_sigaction);
    CHECK(stop_asked() == 0 && strcmp(stop_reason(), "") == 0);
}

static void test_strangers_and_stop(struct env *env)
{
    pthread_t thread;
    if (env->rank == 0 && env->size > 1) {
        CHECK(pthread_create(&thread, NULL, pester, NULL) == 0);
    } else if (env->size > 1) {
        pause_ms(300); // the strangers come first
    }
    CHECK_OK(lifeline_open(env, on_fault, suspects, NULL));
    if (env->rank == 0 && env->size > 1) {
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(n_refused == N_STRANGERS / 4);
    }
    stop_install(env->rank);
    if (env->rank == env->size - 1) {
        CHECK(raise(SIGUSR1) == 0);
        CHECK(raise(SIGUSR1) == 0); // the same wish by another way
        CHECK(stop_asked() == SIGUSR1);
    }
    char expected[64];
    snprintf(expected, sizeof expected, "SIGUSR1 on rank %d", env->size - 1);
    for (int i = 0; i < 5000 && env->rank == 0 && !stop_asked(); i++) {
        pause_ms(1);
    }
    if (env->rank == 0) {
        CHECK(stop_asked() == SIGUSR1 && strcmp(stop_reason(), expected) == 0);
        stop_ask(SIGTERM, 0); // the first is kept
        CHECK(stop_asked() == SIGUSR1 && strcmp(stop_reason(), expected) == 0);
    } else if (env->rank < env->size - 1) {
        CHECK(stop_asked() == 0);
    }
    stop_restore();
    lifeline_close();
}

/* ---- deadly modes, each a job of its own ---- */

static int deep(int n)
{
    volatile char room[4096];
    room[0] = (char)n;
    return n == 0 ? 0 : deep(n + 1) + room[0];
}

#ifdef __SANITIZE_ADDRESS__ // it sees the signal after the lifeline, and ends the process its way
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif
static int volatile *nowhere;
static int volatile zero;

/* Rank 1, then rank 2, whose end is the job's. */
static void report_in_turn(struct env *env, const char *text, bool by_prompt)
{
    if (env->rank == 2) {
        MPI_Recv(NULL, 0, MPI_BYTE, 1, 0, env->world, MPI_STATUS_IGNORE);
    }
    lifeline_report(text, by_prompt);
    if (env->rank == 1) {
        MPI_Send(NULL, 0, MPI_BYTE, 2, 0, env->world);
        pause_ms(5000);
    }
    env_abort(1);
}

__attribute__((no_sanitize_undefined)) static void die(struct env *env, const char *mode)
{
    int rank = env->rank;
    if (strcmp(mode, "error") == 0 && rank > 0) {
        // rank 1 comes first, with the consequence of what rank 2 is about to say
        report_in_turn(env, rank == 1 ? "MPI failed" : "it broke\nin two", rank == 2);
    } else if (strcmp(mode, "both") == 0 && rank > 0) {
        report_in_turn(env, "not a number", true); // a replica's ranks all meet the same error
    } else if (strcmp(mode, "many") == 0 && rank == 1) {
        n_suspects = INT32_MAX;
        lifeline_report("too many", true);
        env_abort(1);
    } else if (strcmp(mode, "own") == 0 && rank == 0) {
        lifeline_report("rank 0 broke", true);
        env_abort(1);
    } else if (strcmp(mode, "invariant") == 0 && rank == 1) {
        INVARIANT(rank == 7);
    } else if (strcmp(mode, "segv") == 0 && rank == 1) {
        *nowhere = 1;
    } else if (strcmp(mode, "segv0") == 0 && rank == 0) {
        *nowhere = 1;
    } else if (strcmp(mode, "overflow") == 0 && rank == 1) {
        deep(1);
    } else if (strcmp(mode, "fpe") == 0 && rank == 2) {
        zero = 7 / zero;
    } else if (strcmp(mode, "abort") == 0 && rank == 2) {
        abort();
    } else if (strcmp(mode, "kill") == 0 && rank == 2) {
        raise(SIGKILL);
    } else if (strcmp(mode, "kill0") == 0 && rank == 0) {
        raise(SIGKILL);
    } else if (strcmp(mode, "hang") == 0 && rank == 0) {
        MPI_Barrier(env->world); // ended by the thread beside it
    } else if (strcmp(mode, "hang") == 0 && rank == 1) {
        raise(SIGKILL);
    }
    pause_ms(strcmp(mode, "wait") == 0 ? 60000 : 20000); // "wait": by hand, to cut a link
    say("nobody ended this rank\n");
    env_abort(99);
}

static int play(struct env *env, const char *mode)
{
    char text[64];
    CHECK_OK(env_grid(env, 1));
    CHECK_OK(lifeline_open(env, on_fault, suspects, NULL));
    if (strcmp(mode, "kill") == 0 || strcmp(mode, "error") == 0) {
        stop_install(env->rank); // the launcher's SIGTERM ends nobody
    }
    snprintf(text, sizeof text, "pid %d\n", (int)getpid());
    say(text);
    MPI_Barrier(env->world);
    pause_ms(100);
    die(env, mode);
    return 1;
}

/* A zombie is gone: whoever should wait for it is not of this test. */
static bool lives(int pid)
{
    char path[64], state = 'Z';
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%*d (%*[^)]) %c", &state) != 1) {
        state = 'Z';
    }
    if (f) {
        fclose(f);
    }
    return state != 'Z' && state != 'X';
}

struct death {
    const char *mode, *flags;
    int code; /* of mpirun; -1: any but 0; -2: any */
    const char *expected[3], *never[3];
};

static const struct death deaths[] = {
    {"error",
     "",
     1,
     {"journalled: rank 1 replica 1 signal 0 prompts of 0: MPI failed",
      "journalled: rank 2 replica 2 signal 0 prompts 4 7 of 2: it broke\n",
      ", at one of the prompts 4, 7: it broke\n"},
     {"died without", "no sign", NULL}},
    {"both",
     "",
     1,
     {"journalled: rank 1 replica 1 signal 0 prompts 4 7 of 2: not a number\n", "error: rank 1"},
     {"journalled: rank 2", "died without", NULL}},
    {"many", "", 1, {"prompts 4 7 10 13 of 4096: too many", ", 25, ... (4096): too many"}, {NULL}},
    {"own", "", 1, {"journalled: rank 0 replica 0 signal 0 prompts 4 7 of 2"}, {"died without"}},
    {"invariant",
     "",
     70,
     {"signal 0 prompts 4 7 of 2: broken invariant `rank == 7` in die (test_lifeline.c:"},
     {"died without"}},
    {"segv",
     "",
     139,
     {"journalled: rank 1 replica 1 signal 11 prompts 4 7 of 2: fatal signal SIGSEGV"},
     {"died without"}},
    {"segv0", "", 139, {"journalled: rank 0 replica 0 signal 11 prompts 4 7"}, {"died without"}},
    {"overflow", "", 139, {"journalled: rank 1 replica 1 signal 11 prompts 4 7"}, {"died without"}},
    {"fpe", "", 136, {"journalled: rank 2 replica 2 signal 8 prompts 4 7"}, {"died without"}},
    {"abort", "", 134, {"journalled: rank 2 replica 2 signal 6 prompts 4 7"}, {"died without"}},
    {"kill",
     "",
     -1,
     {"pmpd: error: rank 2 (host ", ") died without a word: it was killed"},
     {"journalled", "rank 0 (host", "rank 1 (host"}},
    {"kill0", "", -1, {"error: rank 0 (host ", ") died without a word"}, {"journalled"}},
    {"hang", "", -1, {"pmpd: error: rank 1 (host "}, {"journalled", "rank 0 (host"}},
    // a launcher that lets the survivors live: the lifeline alone ends them
    {"kill",
     "--enable-recovery",
     -2,
     {"pmpd: error: rank 2 (host ", ") died without a word: it was killed"},
     {"journalled", "rank 0 (host", "rank 1 (host"}},
    {"kill0", "--enable-recovery", -2, {"rank 0 (host ", ") died without a word"}, {"journalled"}},
};

/* Runs a mode under mpirun; its output in text. */
static int run_mode(const char *program, const char *mpiexec, const struct death *d, char *text)
{
    char command[PATH_MAX + 256];
    snprintf(command, sizeof command, "'%s' %s -n 3 '%s' %s 2>&1", mpiexec, d->flags, program,
             d->mode);
    FILE *f = popen(command, "r");
    size_t n = 0;
    while (f && n < OUTPUT_BYTES - 1) {
        size_t more = fread(text + n, 1, OUTPUT_BYTES - 1 - n, f);
        if (more == 0) {
            break;
        }
        n += more;
    }
    text[n] = '\0';
    int rc = f ? pclose(f) : -1;
    return WIFEXITED(rc) ? WEXITSTATUS(rc) : -1;
}

static int drive(const char *program, const char *mpiexec)
{
    static char text[OUTPUT_BYTES];
    for (size_t i = 0; i < sizeof deaths / sizeof deaths[0]; i++) {
        const struct death *d = &deaths[i];
        int n_failed = check_n_failed;
        double begin = clock_s();
        int code = run_mode(program, mpiexec, d, text);
        bool any = d->code == -1 || (SANITIZED && d->code > 128);
        CHECK(code >= 0 && (any ? code > 0 : d->code == -2 || code == d->code));
        CHECK(strstr(text, "nobody ended this rank") == NULL);
        for (int k = 0; k < 3; k++) {
            CHECK(!d->expected[k] || strstr(text, d->expected[k]));
            CHECK(!d->never[k] || !strstr(text, d->never[k]));
        }
        int n_pids = 0;
        for (const char *p = strstr(text, "pid "); p; p = strstr(p + 1, "pid ")) {
            int pid = atoi(p + 4);
            if (pid <= 0) {
                continue;
            }
            n_pids++;
            for (int k = 0; k < 3000 && lives(pid); k++) {
                pause_ms(1);
            }
            CHECK(!lives(pid));
        }
        CHECK(n_pids == 3);
        printf("%s %s: code %d, %.1f s\n", d->mode, d->flags, code, clock_s() - begin);
        if (check_n_failed > n_failed) {
            fprintf(stderr, "---- output of %s %s:\n%s----\n", d->mode, d->flags, text);
        }
    }
    return check_report();
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "drive") == 0) {
        return drive(argv[0], argv[2]);
    }
    struct env env;
    CHECK_OK(env_start(&env, &argc, &argv));
    if (env.world == MPI_COMM_NULL) {
        return check_report();
    }
    if (argc == 2) {
        return play(&env, argv[1]);
    }
    CHECK_OK(env_grid(&env, 1));
    test_well(&env);
    MPI_Barrier(env.world);
    test_strangers_and_stop(&env);
    MPI_Barrier(env.world);
    env_end(&env);
    return check_report();
}
