/* Checks that count failures and never return early. main ends with `return check_report();`:
 * 0 all passed, 1 something failed; a test that cannot run here calls check_skip (exit 77).
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_TESTS_CHECK_H
#define PMPD_TESTS_CHECK_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/status.h"

static int check_n_run, check_n_failed;

static inline bool check_that(bool good, const char *file, int line, const char *what)
{
    check_n_run++;
    if (!good) {
        check_n_failed++;
        fprintf(stderr, "%s:%d: FAILED: %s\n", file, line, what);
    }
    return good;
}

#define CHECK(cond) check_that((cond), __FILE__, __LINE__, #cond)

/* expr returns ST_OK; prints the message when it does not. */
#define CHECK_OK(expr)                                                                  \
    do {                                                                                \
        enum status check_st_ = (expr);                                                 \
        if (!check_that(check_st_ == ST_OK, __FILE__, __LINE__, #expr)) {               \
            fprintf(stderr, "    %s: %s\n%s", status_name(check_st_), status_message(), \
                    status_traceback());                                                \
        }                                                                               \
    } while (0)

/* expr fails with st and its message contains part. */
#define CHECK_STATUS(expr, st, part)                                                         \
    do {                                                                                     \
        enum status check_st_ = (expr);                                                      \
        if (!check_that(check_st_ == (st), __FILE__, __LINE__, #expr " gives " #st) ||       \
            !check_that(strstr(status_message(), (part)) != NULL, __FILE__, __LINE__,        \
                        "the message contains " #part)) {                                    \
            fprintf(stderr, "    found %s: %s\n", status_name(check_st_), status_message()); \
        }                                                                                    \
    } while (0)

/* |a - b| <= tol; NaN fails. */
#define CHECK_NEAR(a, b, tol)                                                           \
    do {                                                                                \
        double check_a_ = (double)(a), check_b_ = (double)(b);                          \
        if (!check_that(fabs(check_a_ - check_b_) <= (double)(tol), __FILE__, __LINE__, \
                        #a " near " #b)) {                                              \
            fprintf(stderr, "    found %.9g and %.9g\n", check_a_, check_b_);           \
        }                                                                               \
    } while (0)

/* sum (a - b)^2 / sum b^2 */
static inline double check_nmse(const float *a, const float *b, size_t n)
{
    double error = 0, power = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        error += d * d;
        power += (double)b[i] * (double)b[i];
    }
    return power > 0 ? error / power : error;
}

#define CHECK_CLOSE(a, b, n, bound)                                                     \
    do {                                                                                \
        double check_e_ = check_nmse((a), (b), (n));                                    \
        if (!check_that(check_e_ <= (bound), __FILE__, __LINE__, #a " close to " #b)) { \
            fprintf(stderr, "    NMSE %.3g, bound %.3g\n", check_e_, (double)(bound));  \
        }                                                                               \
    } while (0)

static inline int check_report(void)
{
    printf("%d checks, %d failed\n", check_n_run, check_n_failed);
    return check_n_failed ? 1 : 0;
}

static inline void check_skip(const char *why)
{
    printf("skipped: %s\n", why);
    exit(77);
}

#endif
