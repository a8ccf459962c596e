/* SPDX-License-Identifier: Apache-2.0 */
#include "core/candidates.h"

#include <math.h>

#include "core/sampler.h"

static const double reach_tolerance = 1e-9;

bool candidate_filter_is_on(const struct candidate_filter *f)
{
    return f->top_k > 0 || f->top_p < 1 || f->min_p > 0;
}

int32_t candidate_filter_width(const struct candidate_filter *f)
{
    return f->top_k > 0 && f->top_k < CANDIDATES_MAX ? f->top_k : CANDIDATES_MAX;
}

/* ---- the best of a row ---- */

static bool is_before(const struct logit_candidate *a, const struct logit_candidate *b)
{
    return a->logit > b->logit || (a->logit >= b->logit && a->id < b->id);
}

/* Puts c into the heap heap[0..n) at a place from `at` down; the root is the last in order. */
static void sift_down(struct logit_candidate *heap, int32_t n, int32_t at, struct logit_candidate c)
{
    for (int32_t child = 2 * at + 1; child < n; child = 2 * at + 1) {
        if (child + 1 < n && is_before(&heap[child], &heap[child + 1])) {
            child++;
        }
        if (!is_before(&c, &heap[child])) {
            break;
        }
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = c;
}

void candidates_select(struct logit_candidate *out, int32_t k, const float *logits, int32_t n,
                       int32_t first_id)
{
    enum { BLOCK = 32 }; /* most blocks hold nothing better than the k found so far */
    int32_t n_kept = k < n ? k : n, i = 0;
    for (; i < n_kept; i++) {
        out[i] = (struct logit_candidate){logits[i], first_id + i};
    }
    for (int32_t j = n_kept / 2 - 1; j >= 0; j--) {
        sift_down(out, n_kept, j, out[j]);
    }
    while (i < n) {
        int32_t end = n - i < BLOCK ? n : i + BLOCK;
        float largest = logits[i];
        for (int32_t j = i + 1; j < end; j++) {
            largest = logits[j] > largest ? logits[j] : largest;
        }
        /* an equal logit has a higher id than those in the heap: it stays out */
        for (; largest > out[0].logit && i < end; i++) {
            if (logits[i] > out[0].logit) {
                sift_down(out, n_kept, 0, (struct logit_candidate){logits[i], first_id + i});
            }
        }
        i = end;
    }
    for (int32_t left = n_kept - 1; left > 0; left--) {
        struct logit_candidate last = out[0], c = out[left];
        sift_down(out, left, 0, c);
        out[left] = last;
    }
    for (int32_t j = n_kept; j < k; j++) {
        out[j] = (struct logit_candidate){-INFINITY, -1};
    }
}

/* ---- the choice ---- */

/* The next in order of the whole vocabulary, or false when that is not known to be in the lists. */
static bool take_next(struct logit_candidate *out, struct candidate_list *parts, int n_parts)
{
    struct candidate_list *best = NULL;
    for (int p = 0; p < n_parts; p++) {
        if (parts[p].n == 0) {
            if (!parts[p].is_whole) {
                return false;
            }
        } else if (!best || is_before(parts[p].at, best->at)) {
            best = &parts[p];
        }
    }
    if (!best) {
        return false;
    }
    *out = *best->at++;
    best->n--;
    return true;
}

static bool all_taken(const struct candidate_list *parts, int n_parts)
{
    for (int p = 0; p < n_parts; p++) {
        if (parts[p].n > 0 || !parts[p].is_whole) {
            return false;
        }
    }
    return true;
}

/* The first of n kept with the largest score. */
static struct logit_candidate best_of(const struct logit_candidate *kept, int32_t n,
                                      const struct logit_want *want)
{
    struct logit_candidate best = kept[0];
    float best_score = sampler_score(want, best.logit, best.id);
    for (int32_t i = 1; i < n; i++) {
        float score = sampler_score(want, kept[i].logit, kept[i].id);
        if (score > best_score) {
            best = kept[i];
            best_score = score;
        }
    }
    return best;
}

bool candidates_choose(struct logit_candidate *choice, struct candidate_list *parts, int n_parts,
                       const struct logit_stats *merged, const struct candidate_filter *f,
                       const struct logit_want *want, struct logit_candidate *kept)
{
    double max = (double)merged->max, per_t = 1 / (double)want->temperature;
    /* top-p's probabilities are known at once over the whole vocabulary, over top-k's ids only when
     * these have all been seen */
    double goal = f->top_p * (1 - reach_tolerance), sum = 0;
    bool p_is_on = f->top_p < 1;
    int32_t n = 0, n_min_p = -1; /* ids taken; how many min-p keeps, -1: all so far */
    for (bool settled = false; !settled;) {
        if (!take_next(&kept[n], parts, n_parts)) {
            if (n == 0 || !all_taken(parts, n_parts)) {
                return false;
            }
            break;
        }
        double e = exp(((double)kept[n].logit - max) * per_t);
        if (n_min_p < 0 && n > 0 && e < f->min_p) {
            n_min_p = n;
        }
        n++;
        sum += e;
        bool reached = p_is_on && f->top_k == 0 && sum >= goal * merged->sum_exp_t;
        bool cut = n_min_p >= 0 && (!p_is_on || f->top_k == 0);
        settled = n == f->top_k || reached || cut;
    }
    int32_t n_kept = n_min_p >= 0 ? n_min_p : n;
    if (p_is_on && f->top_k > 0) {
        double reached = 0;
        for (int32_t i = 0; i < n_kept; i++) {
            reached += exp(((double)kept[i].logit - max) * per_t);
            if (reached >= goal * sum) {
                n_kept = i + 1;
            }
        }
    }
    *choice = best_of(kept, n_kept, want);
    return true;
}

void candidates_choose_all(struct logit_candidate *choice, const float *logits, int32_t n,
                           const struct logit_stats *merged, const struct candidate_filter *f,
                           const struct logit_want *want, struct logit_candidate *scratch)
{
    /* What is kept is mostly far shorter than the vocabulary: order a longer beginning of it until
     * it suffices. */
    int32_t k = f->top_k > 0 ? f->top_k : 4 * CANDIDATES_MAX;
    for (bool done = false; !done; k = k > INT32_MAX / 4 ? INT32_MAX : 4 * k) {
        int32_t n_best = k < n ? k : n;
        candidates_select(scratch, n_best, logits, n, 0);
        struct candidate_list whole = {scratch, n_best, n_best == n};
        done = candidates_choose(choice, &whole, 1, merged, f, want, scratch + n) || n_best == n;
    }
}
