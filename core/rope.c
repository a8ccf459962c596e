/* SPDX-License-Identifier: Apache-2.0 */
#include "core/rope.h"

#include <math.h>
#include <string.h>

static const double TWO_PI = 6.283185307179586476925286766559;

static const char *const kind_names[ROPE_N] = {
    [ROPE_DEFAULT] = "default",
    [ROPE_LINEAR] = "linear",
    [ROPE_LLAMA3] = "llama3",
};

const char *rope_kind_name(enum rope_kind kind)
{
    return (unsigned)kind < ROPE_N ? kind_names[kind] : "?";
}

enum rope_kind rope_kind_parse(const char *name)
{
    int kind = 0;
    while (kind < ROPE_N && strcmp(name, kind_names[kind]) != 0) {
        kind++;
    }
    return (enum rope_kind)kind;
}

static double stretch_llama3(double frequency, const struct rope_scaling *s)
{
    /* turns within the original context: the inverse of the wavelength, in those units */
    double turns = s->original_context * frequency / TWO_PI;
    if (turns > s->high_freq_factor) {
        return frequency;
    }
    if (turns < s->low_freq_factor) {
        return frequency / s->factor;
    }
    double keep = (turns - s->low_freq_factor) / (s->high_freq_factor - s->low_freq_factor);
    return (1 - keep) * frequency / s->factor + keep * frequency;
}

void rope_frequencies(double *out, double theta, int32_t rot_dim, const struct rope_scaling *s)
{
    for (int32_t i = 0; i < rot_dim / 2; i++) {
        double frequency = pow(theta, -2.0 * i / rot_dim);
        switch (s->kind) {
        case ROPE_LINEAR:
            frequency /= s->factor;
            break;
        case ROPE_LLAMA3:
            frequency = stretch_llama3(frequency, s);
            break;
        case ROPE_DEFAULT:
        case ROPE_N:
            break;
        }
        out[i] = frequency;
    }
}
