/* Errors: every function that can fail returns enum status; the text of the failure and the path it
 * took are kept per thread until main prints them. Libraries never print errors and never exit.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_STATUS_H
#define PMPD_CORE_STATUS_H

enum status {
    ST_OK = 0,
    ST_USER,   /* wrong command line, setting or prompt: the user mends it */
    ST_IO,     /* the operating system refused: open, read, write, map, rename */
    ST_FORMAT, /* a file from outside is damaged or hostile */
    ST_SHAPE,  /* tensor shapes, dtypes or ranges disagree */
    ST_NOMEM,
    ST_UNSUPPORTED, /* understood, but not available in this build, backend or version */
    ST_CUDA,
    ST_MPI,
    ST_NCCL,
    ST_HDF5,
    ST_TIMEOUT,
    ST_NUMERIC, /* a result that is not a number */
    ST_STOPPED, /* stopped on request (signal, deadline): the same command again resumes */
    ST_DIFFERS, /* a comparison found what should be equal to differ */
    ST_N
};

#define MUST_CHECK __attribute__((warn_unused_result))
#define PRINTF(a, b) __attribute__((format(printf, a, b)))

/* Stores the message (one line: what was found, what was expected, what to do; control characters
 * become '?') and starts a new traceback. Returns st, so that FAIL can return it. Never fails. Per
 * thread. */
enum status status_raise(enum status st, const char *file, int line, const char *func,
                         const char *fmt, ...) PRINTF(5, 6);
/* Adds one line to the traceback; returns st. */
enum status status_trace(enum status st, const char *file, int line, const char *func);
/* Puts text in front of the stored message: "reading a.json: " + message. Returns st. */
enum status status_prefix(enum status st, const char *fmt, ...) PRINTF(2, 3);
/* The calling thread's last message and traceback; empty strings when there is none. */
const char *status_message(void);
const char *status_traceback(void);
void status_clear(void);
/* "ST_USER" */
const char *status_name(enum status st);

#define FAIL(st, ...) return status_raise((st), __FILE__, __LINE__, __func__, __VA_ARGS__)
#define FAIL_GOTO(var, code, label, ...)                                         \
    do {                                                                         \
        (var) = status_raise((code), __FILE__, __LINE__, __func__, __VA_ARGS__); \
        goto label;                                                              \
    } while (0)
#define TRY(expr)                                                   \
    do {                                                            \
        enum status st_ = (expr);                                   \
        if (st_ != ST_OK) {                                         \
            return status_trace(st_, __FILE__, __LINE__, __func__); \
        }                                                           \
    } while (0)
#define TRY_GOTO(st, expr, label)                             \
    do {                                                      \
        (st) = (expr);                                        \
        if ((st) != ST_OK) {                                  \
            status_trace((st), __FILE__, __LINE__, __func__); \
            goto label;                                       \
        }                                                     \
    } while (0)

/* A broken invariant of our own: prints where, calls the abort hook, never returns. Active in
 * every build. The hook (MPI_Abort in the program) is set once at start and finds what was printed
 * in status_message. */
typedef void status_abort_fn(void);
void status_set_abort(status_abort_fn *hook);
void status_invariant_failed(const char *file, int line, const char *func, const char *what)
    __attribute__((noreturn));
#define INVARIANT(cond)                                                   \
    do {                                                                  \
        if (!(cond)) {                                                    \
            status_invariant_failed(__FILE__, __LINE__, __func__, #cond); \
        }                                                                 \
    } while (0)

#endif
