/* Sampling from a part of the vocabulary: top-k, top-p and min-p over candidates in descending
 * order, taken from the lists that the ranks of a replica offer.
 *
 * The order of the filters is that of Hugging Face transformers' generate: temperature, top-k,
 * top-p, min-p. With ids ordered by logit, largest first and equal logits by the lower id, each
 * filter keeps the beginning of that order, so that what is kept is the shortest of three
 * beginnings: top-k  the first k ids. top-p  the fewest ids whose probabilities reach p, at least
 * one. Probabilities are exp(l / T), normalised over what top-k keeps. "Reach" has a tolerance of
 * 1e-9, so that rounding of sums decides nothing where the exact sum is p. min-p  the ids with at
 * least min_p times the probability of the most likely id. The token is then the one of the kept
 * with the largest sampler_score (Gumbel-max), the first of equal ones: an exact sample of their
 * renormalised softmax(l / T), drawn with the same noise per id whether anything is filtered or
 * not. Sources: top-k: Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation" (arXiv
 * 1805.04833), section 5. top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration"
 *            (arXiv 1904.09751), section 3.1.
 *          min-p: Nguyen et al., "Turning Up the Heat: Min-p Sampling" (arXiv 2407.01082),
 * section 3. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_CANDIDATES_H
#define PMPD_CORE_CANDIDATES_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"

/* What a rank offers for one token at most. */
enum { CANDIDATES_MAX = 256 };

struct candidate_filter {
    int32_t top_k; /* 0: off */
    double top_p;  /* 0..1; 1: off */
    double min_p;  /* 0..1; 0: off */
};

bool candidate_filter_is_on(const struct candidate_filter *f);
/* How many candidates each rank has to offer: top_k of them decide it, else CANDIDATES_MAX. */
int32_t candidate_filter_width(const struct candidate_filter *f);

/* The k largest of logits (n), ids first_id.. , as backend_top_k orders them. */
void candidates_select(struct logit_candidate *out, int32_t k, const float *logits, int32_t n,
                       int32_t first_id);

/* What one part of the vocabulary offers, in order. */
struct candidate_list {
    const struct logit_candidate *at;
    int32_t n;     /* without the {-inf, -1} at the end */
    bool is_whole; /* the part has no other ids */
};

/* Chooses a token. parts: lists in vocabulary order, of parts that make up the vocabulary; they are
 * used up by the call. merged: the whole vocabulary's statistics for the same want (restricted).
 * kept: scratch with room for all candidates of all parts.
 * false: the candidates do not settle what is kept (it may reach beyond what some part offers);
 * *choice is then unchanged. Any lists that settle it give the same choice. */
bool candidates_choose(struct logit_candidate *choice, struct candidate_list *parts, int n_parts,
                       const struct logit_stats *merged, const struct candidate_filter *f,
                       const struct logit_want *want, struct logit_candidate *kept);

/* The same from all logits (n) of the vocabulary. scratch: room for 2n candidates. */
void candidates_choose_all(struct logit_candidate *choice, const float *logits, int32_t n,
                           const struct logit_stats *merged, const struct candidate_filter *f,
                           const struct logit_want *want, struct logit_candidate *scratch);

#endif
