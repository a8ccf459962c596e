/* Frequencies of the rotary embedding, plain or stretched for contexts longer than the model was
 * first trained on.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_ROPE_H
#define PMPD_CORE_ROPE_H

#include <stdint.h>

enum rope_kind { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3, ROPE_N };

/* A zeroed struct is the plain rotation. */
struct rope_scaling {
    enum rope_kind kind;
    double factor;                            /* LINEAR, LLAMA3: >= 1 */
    double low_freq_factor, high_freq_factor; /* LLAMA3: 0 < low < high */
    int32_t original_context;                 /* LLAMA3: tokens of the first training */
};

/* "default", "linear", "llama3": as config.json has them. */
const char *rope_kind_name(enum rope_kind kind);
/* ROPE_N: another name. */
enum rope_kind rope_kind_parse(const char *name);

/* out (rot_dim / 2): position p turns pair i by the angle p * out[i].
 * Sources: the plain frequencies theta^(-2i / rot_dim): RoFormer (arXiv 2104.09864), section 3.2.2.
 * Linear, position / factor: Position Interpolation (arXiv 2306.15595). Llama3, by wavelength: the
 * rule of Llama 3.1's published reference code (apply_scaling), which keeps wavelengths below
 * original_context / high_freq_factor, divides the frequencies of those above original_context /
 * low_freq_factor by factor, and goes over from one to the other in between. */
void rope_frequencies(double *out, double theta, int32_t rot_dim, const struct rope_scaling *s);

#endif
