/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/kernels.h"

void kernels_register_all(void)
{
    static bool done;
    if (done) {
        return;
    }
    done = true;
    backend_register(&cpu_ref_ops);
    backend_register(&cpu_ops);
    backend_register(&cuda_ops);
}
