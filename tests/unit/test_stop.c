/* The wish to stop, in children of this process: the first signal is noted, the same wish by
 * another way changes nothing, the same signal later ends the process, another one does not.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "dist/stop.h"

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/check.h"

typedef int child_fn(void);

/* The child's wait status. */
static int status_of(child_fn *child)
{
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        check_n_failed = 0;
        int rc = child();
        fflush(NULL);
        _exit(check_n_failed ? 1 : rc);
    }
    int rc = -1;
    CHECK(waitpid(pid, &rc, 0) == pid);
    return rc;
}

static int asks_once(void)
{
    CHECK(stop_asked() == 0 && strcmp(stop_reason(), "") == 0);
    stop_install(0);
    stop_install(3); // later calls only set the rank
    CHECK(raise(SIGTERM) == 0);
    CHECK(stop_asked() == SIGTERM && strcmp(stop_reason(), "SIGTERM on rank 3") == 0);
    CHECK(raise(SIGTERM) == 0); // a launcher hands on what everybody got anyway
    CHECK(raise(SIGINT) == 0);
    CHECK(raise(SIGUSR1) == 0);
    CHECK(stop_asked() == SIGTERM && strcmp(stop_reason(), "SIGTERM on rank 3") == 0);
    stop_ask(SIGINT, 1);
    CHECK(strcmp(stop_reason(), "SIGTERM on rank 3") == 0);
    return 0;
}

static int asks_again(void)
{
    stop_install(0);
    CHECK(raise(SIGINT) == 0);
    poll(NULL, 0, 1200);
    CHECK(stop_asked() == SIGINT);
    CHECK(raise(SIGTERM) == 0); // another signal: the first of its kind
    raise(SIGINT);
    return 7;
}

static int told(void)
{
    stop_ask(SIGUSR1, 12);
    CHECK(stop_asked() == SIGUSR1 && strcmp(stop_reason(), "SIGUSR1 on rank 12") == 0);
    return 0;
}

static int told_strangely(void)
{
    stop_ask(SIGHUP, 1);
    CHECK(stop_asked() == SIGHUP && strcmp(stop_reason(), "signal 1 on rank 1") == 0);
    return 0;
}

static int restores(void)
{
    signal(SIGINT, SIG_IGN);
    stop_install(0);
    stop_restore();
    stop_restore();
    CHECK(raise(SIGINT) == 0); // ignored, as before
    CHECK(stop_asked() == 0);
    raise(SIGUSR1);
    return 7;
}

int main(void)
{
    CHECK(status_of(asks_once) == 0);
    CHECK(status_of(told) == 0);
    CHECK(status_of(told_strangely) == 0);
    int rc = status_of(asks_again);
    CHECK(WIFSIGNALED(rc) && WTERMSIG(rc) == SIGINT);
    rc = status_of(restores);
    CHECK(WIFSIGNALED(rc) && WTERMSIG(rc) == SIGUSR1);
    return check_report();
}
