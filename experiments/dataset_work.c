/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/dataset_work.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/sampler.h"

/* ---- items ---- */

static void set_key(struct work_item *item, const char *depends)
{
    XXH64_hash_t seed = (XXH64_hash_t)item->ordinal << 20 ^ (XXH64_hash_t)item->prefix;
    XXH128_hash_t h = XXH3_128bits_withSeed(depends, strlen(depends), seed);
    h = XXH3_128bits_withSeed(item->ids, (size_t)item->n_ids * sizeof *item->ids,
                              h.low64 ^ (3 * h.high64));
    item->key[0] = h.low64;
    item->key[1] = h.high64;
}

static enum status add_item(struct work *w, const struct prompt *prompt, int64_t ordinal,
                            int32_t prefix, const int32_t *ids, int32_t n_ids, const char *depends)
{
    struct work_item *item = &w->items[w->n];
    *item = (struct work_item){.prompt = prompt,
                               .ordinal = ordinal,
                               .prefix = prefix,
                               .n_ids = n_ids,
                               .prompt_hash = dataset_prompt_hash(prompt->turns[0])};
    TRY(MEM_NEW(&item->ids, n_ids));
    memcpy(item->ids, ids, (size_t)n_ids * sizeof *ids);
    set_key(item, depends);
    w->n++;
    return ST_OK;
}

/* Prompt and reference answer as one text, as long as it may be. */
static enum status whole_text(int32_t **ids, int32_t *n, const struct prompt *p,
                              const struct tokenizer *tok, int32_t most)
{
    enum status st = ST_OK;
    int32_t *more = NULL, n_more = 0;
    TRY(tokenizer_encode(tok, p->reference, strlen(p->reference), false, &more, &n_more));
    *n = p->n_ids[0] + n_more;
    TRY_GOTO(st, MEM_NEW(ids, *n), done);
    memcpy(*ids, p->ids[0], (size_t)p->n_ids[0] * sizeof **ids);
    if (n_more > 0) {
        memcpy(*ids + p->n_ids[0], more, (size_t)n_more * sizeof **ids);
    }
    *n = *n < most ? *n : most;
done:
    mem_free(more);
    return st;
}

static enum status add_prefixes(struct work *w, const struct prompt *p, int64_t ordinal,
                                const struct tokenizer *tok, const struct work_options *o)
{
    enum status st = ST_OK;
    int32_t *ids = NULL, n = 0;
    TRY(whole_text(&ids, &n, p, tok, o->most_tok));
    uint64_t hash = dataset_prompt_hash(p->turns[0]);
    for (int32_t i = 1; n >= o->prefix_min && i <= o->n_prefixes; i++) {
        const uint32_t counter[4] = {(uint32_t)i, (uint32_t)hash, (uint32_t)(hash >> 32), 0};
        const uint32_t key[2] = {(uint32_t)o->seed, (uint32_t)(o->seed >> 32)};
        uint32_t random[4];
        philox4x32(random, counter, key);
        int32_t room = n - o->prefix_min + 1;
        int32_t cut = o->prefix_min + (int32_t)((uint64_t)random[0] * (uint64_t)room >> 32);
        TRY_GOTO(st, add_item(w, p, ordinal, i, ids, cut, o->depends), done);
    }
done:
    mem_free(ids);
    return st;
}

static int compare(const void *a, const void *b)
{
    const struct work_item *x = *(struct work_item *const *)a, *y = *(struct work_item *const *)b;
    return memcmp(x->key, y->key, sizeof x->key);
}

enum status work_create(struct work *out, const struct prompts *prompts,
                        const struct tokenizer *tok, const struct work_options *o)
{
    enum status st = ST_OK;
    size_t most = (size_t)prompts->n * (size_t)(o->n_prefixes ? o->n_prefixes : 1);
    *out = (struct work){0};
    TRY(MEM_NEW(&out->items, most));
    for (int32_t i = 0; i < prompts->n; i++) {
        const struct prompt *p = &prompts->prompt[i];
        st = o->n_prefixes ? add_prefixes(out, p, i, tok, o)
                           : add_item(out, p, i, 0, p->ids[0], p->n_ids[0], o->depends);
        TRY_GOTO(st, st, fail);
    }
    if (out->n == 0) {
        FAIL_GOTO(st, ST_USER, fail,
                  "no prompt with its reference has the %d tokens of the shortest prefix; lower "
                  "--prefix-min",
                  o->prefix_min);
    }
    TRY_GOTO(st, MEM_NEW(&out->by_key, out->n), fail);
    for (int32_t i = 0; i < out->n; i++) {
        out->by_key[i] = &out->items[i];
    }
    qsort(out->by_key, (size_t)out->n, sizeof *out->by_key, compare);
    return ST_OK;
fail:
    work_free(out);
    return st;
}

void work_free(struct work *w)
{
    for (int32_t i = 0; i < w->n; i++) {
        mem_free(w->items[i].ids);
        mem_free(w->items[i].reference);
        mem_free(w->items[i].top);
    }
    mem_free(w->items);
    mem_free(w->by_key);
    *w = (struct work){0};
}

static struct work_item *find(const struct work *w, const uint64_t key[2])
{
    struct work_item wanted = {.key = {key[0], key[1]}}, *at = &wanted;
    struct work_item **found = bsearch(&at, w->by_key, (size_t)w->n, sizeof at, compare);
    return found ? *found : NULL;
}

/* ---- records ---- */

struct reference_head {
    uint64_t key[2];
    int32_t n, has_top;
};

enum status work_put_reference(struct journal *j, const struct work_item *item)
{
    struct reference_head head = {
        {item->key[0], item->key[1]}, item->n_reference, item->top != NULL};
    size_t ids = (size_t)head.n * sizeof *item->reference;
    size_t tops = item->top ? (size_t)head.n * sizeof *item->top : 0;
    char *buf = NULL;
    TRY(mem_alloc_array((void **)&buf, sizeof head + ids + tops, 1));
    memcpy(buf, &head, sizeof head);
    memcpy(buf + sizeof head, item->reference, ids);
    if (item->top) {
        memcpy(buf + sizeof head + ids, item->top, tops);
    }
    enum status st = journal_append(j, WORK_REFERENCE, buf, sizeof head + ids + tops, true);
    mem_free(buf);
    return st;
}

enum status work_put_row(struct journal *j, const struct dataset_row *row,
                         const struct dataset_facts *facts)
{
    void *buf = NULL;
    size_t bytes = 0;
    TRY(dataset_row_pack(row, facts, &buf, &bytes));
    enum status st = journal_append(j, WORK_ROW, buf, bytes, true);
    mem_free(buf);
    return st;
}

/* ---- reading ---- */

struct reader {
    struct work *work;
    const struct dataset_facts *facts;
    struct dataset_row *rows; /* (work->n) by item; NULL: not kept */
};

static enum status take_reference(struct reader *r, const char *payload, size_t bytes)
{
    struct reference_head head;
    if (bytes < sizeof head) {
        FAIL(ST_FORMAT, "a reference record of %zu bytes", bytes);
    }
    memcpy(&head, payload, sizeof head);
    struct work_item *item = find(r->work, head.key);
    if (!item || item->reference) {
        return ST_OK;
    }
    size_t each = sizeof *item->reference + (head.has_top ? sizeof *item->top : 0);
    if (head.n < 1 || bytes != sizeof head + (size_t)head.n * each) {
        FAIL(ST_FORMAT, "a reference record of %zu bytes for %d tokens", bytes, head.n);
    }
    size_t ids = (size_t)head.n * sizeof *item->reference;
    if (head.has_top) {
        TRY(MEM_NEW(&item->top, head.n));
        memcpy(item->top, payload + sizeof head + ids, (size_t)head.n * sizeof *item->top);
    }
    TRY(MEM_NEW(&item->reference, head.n));
    memcpy(item->reference, payload + sizeof head, ids);
    item->n_reference = head.n;
    return ST_OK;
}

static enum status take_row(struct reader *r, const void *payload, size_t bytes)
{
    uint64_t key[2];
    if (bytes < sizeof key) {
        FAIL(ST_FORMAT, "a row record of %zu bytes", bytes);
    }
    memcpy(key, payload, sizeof key); /* a packed row begins with its key */
    struct work_item *item = find(r->work, key);
    r->work->n_other += item == NULL;
    if (!item || (item->is_done && !r->rows)) {
        return ST_OK;
    }
    r->work->n_done += !item->is_done;
    item->is_done = true;
    struct dataset_row *to = r->rows ? &r->rows[item - r->work->items] : NULL;
    return to && !to->id ? dataset_row_unpack(to, r->facts, payload, bytes) : ST_OK;
}

static enum status visit(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    return kind == WORK_REFERENCE ? take_reference(ctx, payload, bytes)
           : kind == WORK_ROW     ? take_row(ctx, payload, bytes)
                                  : ST_OK;
}

static enum status read_parts(struct reader *r, const char *parts)
{
    struct dirent **names = NULL;
    enum status st = ST_OK;
    int n = scandir(parts, &names, NULL, alphasort);
    if (n < 0 && errno != ENOENT) {
        FAIL(ST_IO, "%s: cannot be read: %s", parts, strerror(errno));
    }
    for (int i = 0; i < n; i++) {
        char dir[PATH_MAX];
        char file[PATH_MAX + 16];
        int length = snprintf(dir, sizeof dir, "%s/%s", parts, names[i]->d_name);
        snprintf(file, sizeof file, "%s/journal.bin", dir);
        if (st == ST_OK && strncmp(names[i]->d_name, "replica-", 8) == 0 && length < PATH_MAX &&
            access(file, F_OK) == 0) {
            size_t n_bad = 0;
            st = journal_read(dir, visit, r, &n_bad);
        }
        free(names[i]);
    }
    free(names);
    return st;
}

enum status work_read(struct work *w, const char *parts, const struct dataset_facts *facts,
                      struct dataset *rows)
{
    struct reader r = {.work = w, .facts = facts};
    enum status st = ST_OK;
    w->n_other = 0;
    if (rows) {
        TRY(MEM_NEW(&r.rows, w->n));
    }
    TRY_GOTO(st, read_parts(&r, parts), done);
    for (int32_t i = 0; rows && i < w->n; i++) {
        if (r.rows[i].id) {
            TRY_GOTO(st, dataset_add(rows, &r.rows[i]), done);
        }
    }
done:
    for (int32_t i = 0; r.rows && i < w->n; i++) {
        dataset_row_free(&r.rows[i]);
    }
    mem_free(r.rows);
    return st;
}
