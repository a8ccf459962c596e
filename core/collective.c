/* SPDX-License-Identifier: Apache-2.0 */
#include "core/collective.h"

#include <string.h>

#include "core/log.h"

static enum status local_all_reduce_sum(struct collective *c, struct tensor *x)
{
    (void)c;
    (void)x;
    return ST_OK;
}

static enum status local_all_gather(struct collective *c, struct tensor *whole,
                                    const struct tensor *part, const size_t *counts)
{
    (void)c;
    (void)counts;
    if (whole->data != part->data) {
        memmove(whole->data, part->data, tensor_bytes(part));
    }
    return ST_OK;
}

static enum status local_broadcast(struct collective *c, struct tensor *x, int root)
{
    (void)c;
    (void)x;
    (void)root;
    return ST_OK;
}

static void local_close(struct collective *c)
{
    (void)c;
}

static const struct collective_ops local_ops = {
    .name = "local",
    .all_reduce_sum = local_all_reduce_sum,
    .all_gather = local_all_gather,
    .broadcast = local_broadcast,
    .close = local_close,
};

void collective_local(struct collective *out)
{
    *out = (struct collective){.ops = &local_ops, .rank = 0, .size = 1};
}

void collective_close(struct collective *c)
{
    if (c && c->ops) {
        c->ops->close(c);
        *c = (struct collective){0};
    }
}

enum status collective_all_reduce_sum(struct collective *c, struct tensor *x)
{
    if (x->dtype != DT_F32) {
        FAIL(ST_SHAPE, "all-reduce adds F32, found %s", dtype_name(x->dtype));
    }
    double start = clock_s();
    TRY(c->ops->all_reduce_sum(c, x));
    c->comm_s += clock_s() - start;
    return ST_OK;
}

enum status collective_all_gather(struct collective *c, struct tensor *whole,
                                  const struct tensor *part, const size_t *counts)
{
    size_t sum = 0;
    for (int r = 0; r < c->size; r++) {
        sum += counts[r];
    }
    if (whole->dtype != part->dtype || tensor_count(part) != counts[c->rank] ||
        tensor_count(whole) != sum) {
        FAIL(ST_SHAPE, "all-gather: part has %zu elements (%zu announced), whole %zu, sum %zu",
             tensor_count(part), counts[c->rank], tensor_count(whole), sum);
    }
    double start = clock_s();
    TRY(c->ops->all_gather(c, whole, part, counts));
    c->comm_s += clock_s() - start;
    return ST_OK;
}

enum status collective_broadcast(struct collective *c, struct tensor *x, int root)
{
    if (root < 0 || root >= c->size) {
        FAIL(ST_SHAPE, "broadcast from rank %d of %d", root, c->size);
    }
    double start = clock_s();
    TRY(c->ops->broadcast(c, x, root));
    c->comm_s += clock_s() - start;
    return ST_OK;
}
