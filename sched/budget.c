/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/budget.h"

/* Sums over the known leases, each weighted by its steps over the mean steps. */
struct sums {
    double w, d, c, dd, dc; /* weights, dials, costs of a step, and products */
    double spent;           /* weighted cost beyond the target */
};

static struct sums add_up(const struct budget *b, int64_t n, const float *dials,
                          const struct budget_outcome *outcomes)
{
    struct sums s = {0};
    int64_t n_steps = 0, n_counted = 0;
    for (int64_t j = 0; j < n; j++) {
        n_steps += outcomes[j].n_steps;
        n_counted += outcomes[j].n_steps > 0;
    }
    for (int64_t j = 0; j < n; j++) {
        const struct budget_outcome *o = &outcomes[j];
        if (o->n_steps > 0) {
            double w = (double)o->n_steps * (double)n_counted / (double)n_steps;
            double c = o->cost / (double)o->n_steps, d = (double)dials[j];
            s.w += w;
            s.d += w * d;
            s.c += w * c;
            s.dd += w * d * d;
            s.dc += w * d * c;
            s.spent += w * (c - b->target);
        }
    }
    return s;
}

/* Leases over which the account is paid back. */
static int64_t horizon(const struct budget *b, int64_t i)
{
    int64_t h = (int64_t)b->window + BUDGET_HORIZON;
    h = b->n_leases - i < h ? b->n_leases - i : h;
    return h < BUDGET_HORIZON ? BUDGET_HORIZON : h;
}

void budget_dial(struct budget_state *out, const struct budget *b, int64_t i, const float *dials,
                 const struct budget_outcome *outcomes)
{
    int64_t n_known = i - b->window + 1 > 0 ? i - b->window + 1 : 0;
    struct sums s = add_up(b, n_known, dials, outcomes);
    /* Minimise sum w (c - a - b d)^2 + P (mean over d in [0, 1] of (a0 + b0 d - a - b d)^2), as if
     * P leases had been seen on the prior's line; 1/2 and 1/3 are the means of d and d^2. */
    double range = b->most - b->least, prior = BUDGET_PRIOR_LEASES;
    double aa = s.w + prior, ab = s.d + prior / 2, bb = s.dd + prior / 3;
    double ac = s.c + prior * (b->least + range / 2);
    double bc = s.dc + prior * (b->least / 2 + range / 3);
    out->slope = (aa * bc - ab * ac) / (aa * bb - ab * ab);
    /* A policy never gives less for a larger dial; a slope too flat would throw the dial about. */
    out->slope = out->slope < range / 4 ? range / 4 : out->slope;
    out->offset = (ac - ab * out->slope) / aa;
    out->account = s.spent;
    for (int64_t j = n_known; j < i; j++) {
        out->account += out->offset + out->slope * (double)dials[j] - b->target;
    }
    double wanted = b->target - out->account / (double)horizon(b, i);
    double dial = (wanted - out->offset) / out->slope;
    out->dial = (float)(dial < 0 ? 0 : dial > 1 ? 1 : dial);
}

struct budget_outcome budget_outcome_of(const int64_t *n_steps, const double *cost,
                                        int32_t n_levels)
{
    struct budget_outcome o = {0};
    for (int32_t l = 0; l < n_levels; l++) {
        o.cost += (double)n_steps[l] * cost[l];
        o.n_steps += n_steps[l];
    }
    return o;
}
