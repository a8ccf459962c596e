/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/bench/statistics.h"

#include <stdlib.h>

#include "core/mem.h"

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

struct spread spread_of(double *values, int n)
{
    INVARIANT(n >= 1);
    qsort(values, (size_t)n, sizeof *values, by_value);
    double low = values[(n - 1) / 2], high = values[n / 2];
    return (struct spread){.min = values[0], .median = (low + high) / 2, .max = values[n - 1]};
}

enum status samples_create(struct samples *out, int room)
{
    *out = (struct samples){.room = room};
    return MEM_NEW(&out->value, room);
}

void samples_free(struct samples *s)
{
    mem_free(s->value);
    *s = (struct samples){0};
}

void samples_add(struct samples *s, double value)
{
    INVARIANT(s->n < s->room);
    s->value[s->n++] = value;
}

struct spread samples_spread(struct samples *s)
{
    return spread_of(s->value, s->n);
}
