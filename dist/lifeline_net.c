/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE // pipe2
#include "dist/lifeline_net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAGIC = 0x4C4D5031, SMALL_BYTES = 64 };
/* Who accepts a connection at that port is most likely rank 0, busy with the other ranks. */
enum { CONNECT_MS = 2000, WELCOME_MS = 5000, FRAME_MS = 2000 };

int64_t line_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void line_close(int *fd)
{
    if (*fd >= 0) {
        close(*fd);
        *fd = -1;
    }
}

void line_wake_thread(const int control[2])
{
    ssize_t written = write(control[1], "", 1);
    (void)written;
}

enum status line_start_thread(pthread_t *thread, int control[2], void *(*run)(void *), void *ctx)
{
    if (pipe2(control, O_CLOEXEC) != 0) {
        control[0] = control[1] = -1;
        FAIL(ST_NOMEM, "the lifeline gets no pipe: %s; raise the limit on open files (ulimit -n)",
             strerror(errno));
    }
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(thread, NULL, run, ctx);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc != 0) {
        line_close(&control[0]);
        line_close(&control[1]);
        FAIL(ST_NOMEM,
             "the lifeline's thread does not start: %s; raise the limit on processes (ulimit -u)",
             strerror(rc));
    }
    return ST_OK;
}

/* Waits for an event until then; false: it did not come. */
static bool wait_for(int fd, short events, int64_t until_ms)
{
    for (;;) {
        int64_t left = until_ms - line_now_ms();
        struct pollfd p = {.fd = fd, .events = events};
        int rc = poll(&p, 1, left > 0 ? (int)left : 0);
        if (rc > 0) {
            return true;
        }
        if (left <= 0 || (rc < 0 && errno != EINTR)) {
            return false;
        }
    }
}

/* ---- frames ---- */

bool line_send_frame(int fd, enum line_kind kind, void *frame, size_t frame_bytes)
{
    struct line_head head = {
        .magic = MAGIC, .kind = (uint32_t)kind, .bytes = (uint32_t)(frame_bytes - sizeof head)};
    memcpy(frame, &head, sizeof head);
    const unsigned char *p = frame;
    int64_t until = line_now_ms() + FRAME_MS;
    while (frame_bytes > 0) {
        ssize_t n = send(fd, p, frame_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n > 0) {
            p += n;
            frame_bytes -= (size_t)n;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (!wait_for(fd, POLLOUT, until)) {
                return false;
            }
        } else if (errno != EINTR) {
            return false;
        }
    }
    return true;
}

bool line_send(int fd, enum line_kind kind, const void *payload, size_t bytes)
{
    unsigned char frame[sizeof(struct line_head) + SMALL_BYTES];
    if (bytes > SMALL_BYTES) {
        return false;
    }
    if (bytes > 0) {
        memcpy(frame + sizeof(struct line_head), payload, bytes);
    }
    return line_send_frame(fd, kind, frame, sizeof(struct line_head) + bytes);
}

static enum line_event failure(int error)
{
    switch (error) {
    case ETIMEDOUT:
    case EHOSTUNREACH:
    case EHOSTDOWN:
    case ENETUNREACH:
    case ENETDOWN:
        return LINE_SILENT;
    default:
        return LINE_CLOSED;
    }
}

static enum line_event receive_bytes(int fd, void *out, size_t bytes, bool begun)
{
    unsigned char *p = out;
    int64_t until = line_now_ms() + FRAME_MS;
    while (bytes > 0) {
        ssize_t n = recv(fd, p, bytes, MSG_DONTWAIT);
        if (n > 0) {
            p += n;
            bytes -= (size_t)n;
            begun = true;
        } else if (n == 0) {
            return LINE_CLOSED;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (!begun) {
                return LINE_NOTHING;
            }
            if (!wait_for(fd, POLLIN, until)) {
                return LINE_SILENT;
            }
        } else if (errno != EINTR) {
            return failure(errno);
        }
    }
    return LINE_FRAME;
}

enum line_event line_receive(int fd, struct line_head *head, void *payload, size_t room)
{
    enum line_event e = receive_bytes(fd, head, sizeof *head, false);
    if (e != LINE_FRAME) {
        return e;
    }
    if (head->magic != MAGIC || head->bytes > room) {
        return LINE_RUBBISH;
    }
    return receive_bytes(fd, payload, head->bytes, true);
}

/* ---- connections ---- */

static void set_option(int fd, int level, int name, int value)
{
    // where the kernel does not know one, a death is noticed later
    int rc = setsockopt(fd, level, name, &value, sizeof value);
    (void)rc;
}

void line_watch(int fd)
{
    enum { PROBE_S = 5 }; // the third probe without an answer is the last
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, PROBE_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, PROBE_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, LIFELINE_DEAD_S / PROBE_S - 1);
    set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, LIFELINE_DEAD_S * 1000); // of what is sent
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
}

void line_host_name(char host[LINE_HOST_BYTES])
{
    memset(host, 0, LINE_HOST_BYTES);
    if (gethostname(host, LINE_HOST_BYTES - 1) != 0) {
        memcpy(host, "?", 2);
    }
}

static void add_addresses(struct line_place *place)
{
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all) != 0) {
        return;
    }
    for (const struct ifaddrs *a = all; a; a = a->ifa_next) {
        if (a->ifa_addr && a->ifa_addr->sa_family == AF_INET && (a->ifa_flags & IFF_UP) &&
            !(a->ifa_flags & IFF_LOOPBACK) && place->n_addresses < LINE_MAX_ADDRESSES) {
            struct sockaddr_in in;
            memcpy(&in, a->ifa_addr, sizeof in);
            place->address[place->n_addresses++] = in.sin_addr.s_addr;
        }
    }
    freeifaddrs(all);
}

int line_listen(struct line_place *place)
{
    *place = (struct line_place){0};
    line_host_name(place->host);
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_ANY)}};
    socklen_t bytes = sizeof in;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return -1;
    }
    if (getrandom(place->token, sizeof place->token, 0) != (ssize_t)sizeof place->token ||
        bind(fd, (struct sockaddr *)&in, sizeof in) != 0 || listen(fd, SOMAXCONN) != 0 ||
        getsockname(fd, (struct sockaddr *)&in, &bytes) != 0) {
        int e = errno;
        close(fd);
        errno = e;
        return -1;
    }
    place->port = in.sin_port;
    add_addresses(place);
    return fd;
}

/* One address: connect, say the token, hear the answer. Returns -1 with errno set. An address may
 * lead to another machine's process (private networks exist many times), hence the answer. */
static int connect_to(const struct line_place *place, uint32_t address, int32_t rank)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = place->port, .sin_addr = {address}};
    struct line_hello hello = {.token = place->token[0], .rank = rank};
    struct line_head head;
    uint64_t answer = 0;
    int error = 0;
    socklen_t bytes = sizeof error;
    unsigned char frame[sizeof head + sizeof hello];
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return -1;
    }
    line_watch(fd);
    line_host_name(hello.host);
    memcpy(frame + sizeof head, &hello, sizeof hello);
    if (connect(fd, (struct sockaddr *)&in, sizeof in) != 0 && errno != EINPROGRESS) {
        goto failed;
    }
    errno = ETIMEDOUT;
    if (!wait_for(fd, POLLOUT, line_now_ms() + CONNECT_MS)) {
        goto failed;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &bytes) != 0 || error != 0) {
        errno = error;
        goto failed;
    }
    errno = ECONNRESET;
    if (!line_send_frame(fd, LINE_HELLO, frame, sizeof frame) ||
        !wait_for(fd, POLLIN, line_now_ms() + WELCOME_MS) ||
        line_receive(fd, &head, &answer, sizeof answer) != LINE_FRAME ||
        head.kind != LINE_WELCOME || head.bytes != sizeof answer || answer != place->token[1]) {
        errno = errno == 0 ? ECONNRESET : errno;
        goto failed;
    }
    return fd;
failed:
    error = errno;
    close(fd);
    errno = error;
    return -1;
}

int line_connect(const struct line_place *place, int32_t rank, char why[LINE_WHY_BYTES])
{
    char host[LINE_HOST_BYTES], text[INET_ADDRSTRLEN] = "";
    bool same_host = false;
    int32_t n = place->n_addresses;
    line_host_name(host);
    same_host = strcmp(host, place->host) == 0;
    snprintf(why, LINE_WHY_BYTES, "%s has no IPv4 address but its own loopback", place->host);
    for (int32_t i = same_host ? -1 : 0; i < n && i < LINE_MAX_ADDRESSES; i++) {
        struct in_addr address = {i < 0 ? htonl(INADDR_LOOPBACK) : place->address[i]};
        int fd = connect_to(place, address.s_addr, rank);
        if (fd >= 0) {
            return fd;
        }
        int e = errno;
        inet_ntop(AF_INET, &address, text, sizeof text);
        snprintf(why, LINE_WHY_BYTES, "%s port %u: %s", text, ntohs(place->port), strerror(e));
    }
    return -1;
}
