/* The table of the instruction set that the includer has set up, under the name LOOPS.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu_loops_attention.h"
#include "kernels/cpu_loops_layer.h"
#include "kernels/cpu_loops_logits.h"

const struct cpu_loops LOOPS = {
    .attend = attend,
    .attend_merge = attend_merge,
    .to_f16 = to_f16,
    .rmsnorm = rmsnorm,
    .layernorm = layernorm,
    .moments = moments,
    .rotate = rotate,
    .silu_gate = silu_gate,
    .gelu_tanh = gelu_tanh,
    .exp = exps,
    .stats = stats,
};
