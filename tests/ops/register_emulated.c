/* Makes a program know the backend "cuda-emulated": linked into pmpd it becomes pmpd_emulated,
 * which runs the cuda backend's kernels on the host. SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/kernels.h"

extern const struct backend_ops cuda_emulated_ops;

static void __attribute__((constructor)) register_emulated(void)
{
    kernels_register_all();
    backend_register(&cuda_emulated_ops);
}
