/* The lifeline's connections: frames, where rank 0 listens, how another rank gets there. Private to
 * dist/lifeline*.c. Knows nothing of what is said on them. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_LIFELINE_NET_H
#define PMPD_DIST_LIFELINE_NET_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dist/lifeline.h"

enum line_kind {
    LINE_HELLO = 1, /* to rank 0: struct line_hello */
    LINE_WELCOME,   /* back: the other half of the token */
    LINE_STOP,      /* to rank 0: int32_t signal */
    LINE_FAULT,     /* to rank 0: struct line_fault, its first n_prompts ordinals */
    LINE_ACK,       /* back: the fault is journalled */
    LINE_BYE,       /* both ways: what comes now is no death */
    LINE_OVER       /* from rank 0: the job ends, and the user knows why */
};

enum { LINE_HOST_BYTES = 64, LINE_MAX_ADDRESSES = 16, LINE_WHY_BYTES = 128 };

/* All ranks are one executable, so structs travel as bytes. */
struct line_head {
    uint32_t magic, kind, bytes, unused;
};
struct line_hello {
    uint64_t token;
    int32_t rank;
    char host[LINE_HOST_BYTES];
};
struct line_fault {
    int32_t replica, signal, n_prompts, unused;
    char text[LIFELINE_TEXT_BYTES];
    int64_t ordinals[LIFELINE_MAX_NAMED];
};

/* Where rank 0 listens: what it tells the others through MPI. */
struct line_place {
    uint64_t token[2]; /* what a rank says, what rank 0 answers */
    int32_t n_addresses;
    uint32_t address[LINE_MAX_ADDRESSES]; /* IPv4, network order */
    uint16_t port;                        /* network order */
    char host[LINE_HOST_BYTES];
    char why_not[LINE_WHY_BYTES]; /* empty when it listens */
};

/* A socket that listens on every address of this host; -1: none can be had, errno says why. */
int line_listen(struct line_place *place);
/* A proven connection to rank 0; -1: none, *why says what the last address answered. */
int line_connect(const struct line_place *place, int32_t rank, char why[LINE_WHY_BYTES]);
void line_host_name(char host[LINE_HOST_BYTES]);
/* The kernel gives the connection up when the other side is silent for LIFELINE_DEAD_S. */
void line_watch(int fd);

/* Sends a whole frame; `frame` begins with a head that this fills in. Gives up when the other side
 * does not take it. Async-signal-safe, and so is line_send. */
bool line_send_frame(int fd, enum line_kind kind, void *frame, size_t frame_bytes);
/* The same for a payload of at most 64 bytes. */
bool line_send(int fd, enum line_kind kind, const void *payload, size_t bytes);

enum line_event {
    LINE_FRAME, /* *head and the payload are there */
    LINE_NOTHING,
    LINE_CLOSED, /* the other side's process is gone */
    LINE_SILENT, /* its host or the link is */
    LINE_RUBBISH /* not a frame, or one that is larger than room */
};
/* Takes one frame if one has come: frames are sent whole, so the rest of one that has begun is
 * waited for, shortly. */
enum line_event line_receive(int fd, struct line_head *head, void *payload, size_t room);

/* A thread that no signal disturbs, and a pipe whose reading end control[0] wakes it. Nothing is
 * left after a failure. Errors: ST_NOMEM. */
MUST_CHECK enum status line_start_thread(pthread_t *thread, int control[2], void *(*run)(void *),
                                         void *ctx);
void line_wake_thread(const int control[2]);
void line_close(int *fd);
int64_t line_now_ms(void);

#endif
