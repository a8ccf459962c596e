/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/label.h"

#include <math.h>
#include <string.h>

const char *const criterion_name[CRITERION_N] = {"rouge-l", "agreement", "kl"};

enum status criterion_parse(enum criterion *out, const char *name)
{
    for (int i = 0; i < CRITERION_N; i++) {
        if (strcmp(name, criterion_name[i]) == 0) {
            *out = (enum criterion)i;
            return ST_OK;
        }
    }
    FAIL(ST_USER, "unknown criterion \"%s\"; expected rouge-l, agreement or kl", name);
}

double label_agreement(const int32_t *a, int32_t n_a, const int32_t *b, int32_t n_b)
{
    int32_t same = 0, most = n_a > n_b ? n_a : n_b;
    for (int32_t i = 0; i < n_a && i < n_b; i++) {
        same += a[i] == b[i];
    }
    return most > 0 ? (double)same / most : 0;
}

static double log_sum(const float *logits, int32_t vocab)
{
    double most = (double)logits[0], sum = 0;
    for (int32_t i = 1; i < vocab; i++) {
        most = (double)logits[i] > most ? (double)logits[i] : most;
    }
    for (int32_t i = 0; i < vocab; i++) {
        sum += exp((double)logits[i] - most);
    }
    return most + log(sum);
}

void top_take(struct top *out, const float *logits, int32_t vocab)
{
    double all = log_sum(logits, vocab);
    out->n = 0;
    for (int32_t i = 0; i < vocab; i++) {
        int32_t at = out->n;
        while (at > 0 && logits[i] > out->logprob[at - 1]) {
            at--;
        }
        if (at == TOP_N) {
            continue;
        }
        int32_t moved = out->n < TOP_N ? out->n - at : TOP_N - 1 - at;
        memmove(out->id + at + 1, out->id + at, (size_t)moved * sizeof *out->id);
        memmove(out->logprob + at + 1, out->logprob + at, (size_t)moved * sizeof *out->logprob);
        out->id[at] = i;
        out->logprob[at] = logits[i];
        out->n += out->n < TOP_N;
    }
    for (int32_t i = 0; i < out->n; i++) {
        out->logprob[i] = (float)((double)out->logprob[i] - all);
    }
}

double top_divergence(const struct top *p, const float *logits, int32_t vocab)
{
    double all = log_sum(logits, vocab), sum = 0, p_rest = 1, q_rest = 1;
    for (int32_t i = 0; i < p->n; i++) {
        double lp = (double)p->logprob[i], lq = (double)logits[p->id[i]] - all;
        sum += exp(lp) * (lp - lq);
        p_rest -= exp(lp);
        q_rest -= exp(lq);
    }
    /* both rests are differences of rounded numbers: below that they say nothing */
    if (p_rest > 1e-6) {
        sum += p_rest * log(p_rest / (q_rest > 1e-6 ? q_rest : 1e-6));
    }
    return sum > 0 ? sum : 0;
}
