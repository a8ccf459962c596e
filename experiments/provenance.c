/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/provenance.h"

#include <hdf5.h>
#include <libconfig.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/invariance.h"
#include "core/level.h"
#include "version.h" /* made by version.cmake: PMPD_VERSION, PMPD_GIT, PMPD_COMPILER, PMPD_FLAGS */

const char *provenance_version(void)
{
    return "pmpd " PMPD_VERSION " (" PMPD_GIT ")";
}

static void add(struct provenance *p, const char *key, const char *fmt, ...) PRINTF(3, 4);
static void add(struct provenance *p, const char *key, const char *fmt, ...)
{
    INVARIANT(p->n < PROVENANCE_MAX);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(p->text[p->n], PROVENANCE_BYTES, fmt, ap);
    va_end(ap);
    p->fact[p->n] = (struct run_fact){.key = key, .value = p->text[p->n]};
    p->n++;
}

void provenance_fill(struct provenance *p, const struct engine *e, const struct settings *s,
                     const struct prompts *prompts, const char *model_digest, int n_epochs)
{
    char host[256] = "?", mpi[MPI_MAX_LIBRARY_VERSION_STRING] = "?", date[64] = "?";
    unsigned h5[3] = {0};
    int length = 0;
    time_t now = time(NULL);
    struct tm utc;
    p->n = 0;
    gethostname(host, sizeof host - 1);
    MPI_Get_library_version(mpi, &length);
    mpi[strcspn(mpi, ",\n")] = '\0';
    H5get_libversion(&h5[0], &h5[1], &h5[2]);
    if (gmtime_r(&now, &utc)) {
        strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", &utc);
    }
    const struct env *env = e->env;
    const struct model_config *c = &e->source.config;
    add(p, "program", "%s", provenance_version());
    add(p, "git_revision", "%s", PMPD_GIT);
    add(p, "compiler", "%s", PMPD_COMPILER);
    add(p, "compiler_flags", "%s", PMPD_FLAGS);
    add(p, "mpi", "%s", mpi);
    add(p, "hdf5", "%u.%u.%u", h5[0], h5[1], h5[2]);
    add(p, "libconfig", "%d.%d.%d", LIBCONFIG_VER_MAJOR, LIBCONFIG_VER_MINOR,
        LIBCONFIG_VER_REVISION);
    add(p, "written_utc", "%s", date);
    add(p, "host", "%s", host);
    add(p, "world_size", "%d", env->size);
    add(p, "replicas", "%d", env->n_replicas);
    add(p, "tensor_ranks", "%d", env->tensor_size);
    add(p, "starts", "%d", n_epochs);
    add(p, "model_path", "%s", s->model.path);
    add(p, "model_digest", "%s", model_digest);
    add(p, "model_shape",
        "%s: %d layers, hidden %d, %d heads, %d KV heads, head_dim %d, ffn %d, "
        "vocabulary %d",
        model_family_name(c->family), c->n_layers, c->hidden, c->n_heads, c->n_kv_heads,
        c->head_dim, c->ffn, c->vocab);
    add(p, "model_nested", "%s", c->nested ? c->method : "no");
    add(p, "prompts_path", "%s", s->prompts.path);
    add(p, "prompts_digest", "%s", prompts->digest);
    add(p, "backend", "%s", e->backend);
    add(p, "arithmetic", "%s", e->arithmetic);
    add(p, "kv_format", "%s", dtype_name(e->kv_dtype));
    add(p, "seed", "%lld", (long long)s->decode.seed);
    add(p, "policy", "%s", s->policy.name);
    const char *product = invariance_product(s, e->policy_adds_tokens);
    char invariance[INVARIANCE_BYTES];
    invariance_text(invariance, s, product);
    add(p, "product", "%s", product);
    add(p, "invariant_under", "%s", invariance);
}
