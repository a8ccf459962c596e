/* Mutations of JSON that leave it JSON: members go, come, change places and types.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "tests/gen.h"

enum { PLACES_MAX = 1024, DEPTH_MAX = 64 };

/* Where a value hangs: a member of an object, or an item of an array. */
struct place {
    json_t *parent;  /* borrowed */
    const char *key; /* NULL: in an array */
    size_t index;
};
struct tree {
    struct place place[PLACES_MAX];
    uint32_t n;
    struct gen_rng rng;
    const char *const *words; /* NULL-terminated */
    uint32_t n_words;
};

static void list(struct tree *t, json_t *node, int depth)
{
    const char *key;
    json_t *value;
    size_t i;
    if (depth > DEPTH_MAX) {
        return;
    }
    json_object_foreach(node, key, value)
    {
        if (t->n < PLACES_MAX) {
            t->place[t->n++] = (struct place){node, key, 0};
        }
        list(t, value, depth + 1);
    }
    json_array_foreach(node, i, value)
    {
        if (t->n < PLACES_MAX) {
            t->place[t->n++] = (struct place){node, NULL, i};
        }
        list(t, value, depth + 1);
    }
}

static json_t *get(const struct place *p)
{
    return p->key ? json_object_get(p->parent, p->key) : json_array_get(p->parent, p->index);
}

static json_t *changed_string(const char *text)
{
    uint8_t room[512];
    size_t n = strlen(text) < sizeof room / 2 ? strlen(text) : sizeof room / 2;
    memcpy(room, text, n);
    n = LLVMFuzzerMutate(room, n, sizeof room);
    return json_stringn((const char *)room, n); // NULL where it is no UTF-8
}

static json_t *new_value(struct tree *t, json_t *old)
{
    static const json_int_t numbers[] = {0,          1,
                                         -1,         2,
                                         3,          4,
                                         7,          8,
                                         9,          16,
                                         31,         32,
                                         64,         127,
                                         128,        255,
                                         256,        1000,
                                         4096,       65536,
                                         INT32_MAX,  (json_int_t)INT32_MAX + 1,
                                         UINT32_MAX, INT64_MAX,
                                         INT64_MIN};
    static const double reals[] = {0.0, 0.25, 0.5, 1.0, -1.5, 1e-8, 1e-320, 1e30, 1e300, 2e9};
    json_int_t x = json_integer_value(old);
    switch (gen_below(&t->rng, 10)) {
    case 0:
        return json_integer(numbers[gen_below(&t->rng, sizeof numbers / sizeof numbers[0])]);
    case 1:
        return json_real(reals[gen_below(&t->rng, sizeof reals / sizeof reals[0])]);
    case 2:
        return json_boolean(gen_below(&t->rng, 2));
    case 3:
        return gen_below(&t->rng, 2)   ? json_null()
               : gen_below(&t->rng, 2) ? json_array()
                                       : json_object();
    case 4:
    case 5:
        return json_string(t->words[gen_below(&t->rng, t->n_words)]);
    case 6:
        return json_deep_copy(get(&t->place[gen_below(&t->rng, t->n)]));
    default: // near what was there
        if (json_is_string(old)) {
            return changed_string(json_string_value(old));
        }
        if (json_is_integer(old)) {
            uint32_t how = gen_below(&t->rng, 4);
            return json_integer(how == 0   ? (json_int_t)((uint64_t)x + 1)
                                : how == 1 ? (json_int_t)((uint64_t)x - 1)
                                : how == 2 ? (json_int_t)((uint64_t)x * 2)
                                           : x / 2);
        }
        return json_is_boolean(old) ? json_boolean(!json_is_true(old)) : json_deep_copy(old);
    }
}

static const char *new_key(struct tree *t)
{
    const struct place *p = &t->place[gen_below(&t->rng, t->n)];
    return p->key && gen_below(&t->rng, 2) ? p->key : t->words[gen_below(&t->rng, t->n_words)];
}

static void mutate_once(struct tree *t)
{
    const struct place p = t->place[gen_below(&t->rng, t->n)];
    json_t *old = get(&p), *value = NULL;
    char key[64] = "";
    switch (gen_below(&t->rng, 8)) {
    case 0: // goes
        p.key ? json_object_del(p.parent, p.key) : json_array_remove(p.parent, p.index);
        return;
    case 1: // a new one beside it
        value = new_value(t, old);
        p.key ? json_object_set_new(p.parent, new_key(t), value)
              : json_array_insert_new(p.parent, p.index, value);
        return;
    case 2: // inside it
        value = new_value(t, old);
        if (json_is_object(old)) {
            json_object_set_new(old, new_key(t), value);
        } else if (json_is_array(old)) {
            json_array_append_new(old, value);
        } else {
            json_decref(value);
        }
        return;
    case 3: // under another name
        if (p.key) {
            strncpy(key, new_key(t), sizeof key - 1);
            json_object_set(p.parent, key, old);
            json_object_del(p.parent, p.key);
            return;
        }
        // fall through
    default:
        value = new_value(t, old);
        p.key ? json_object_set_new(p.parent, p.key, value)
              : json_array_set_new(p.parent, p.index, value);
    }
}

size_t fuzz_mutate_json(char *text, size_t bytes, size_t max_bytes, unsigned seed,
                        const char *const *words)
{
    static struct tree t;
    size_t n = 0;
    json_t *root = json_loadb(text, bytes, 0, NULL);
    t = (struct tree){.rng = {seed}, .words = words};
    while (words[t.n_words]) {
        t.n_words++;
    }
    for (uint32_t times = 1 + gen_below(&t.rng, 3); root && times > 0; times--) {
        t.n = 0; // places are borrowed from what the last mutation may have removed
        list(&t, root, 0);
        if (t.n > 0) {
            mutate_once(&t);
        }
    }
    char *dumped = root ? json_dumps(root, JSON_COMPACT) : NULL;
    if (dumped && strlen(dumped) <= max_bytes) {
        n = strlen(dumped);
        memcpy(text, dumped, n);
    }
    free(dumped);
    json_decref(root);
    return n;
}

size_t fuzz_mutate_part(uint8_t *data, size_t size, size_t max_size, unsigned seed,
                        const char *const *words, uint8_t end)
{
    size_t begin = 0, n_parts = 1, pick;
    for (size_t i = 0; i < size; i++) {
        n_parts += data[i] == end;
    }
    if (seed % 4 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    pick = seed / 4 % n_parts;
    for (size_t i = 0; i < size && pick > 0; i++) {
        if (data[i] == end) {
            begin = i + 1;
            pick--;
        }
    }
    const uint8_t *stop = begin < size ? memchr(data + begin, end, size - begin) : NULL;
    size_t n = (stop ? (size_t)(stop - data) : size) - begin, n_tail = size - begin - n;
    uint8_t *tail = malloc(n_tail + 1);
    INVARIANT(tail != NULL);
    memcpy(tail, data + begin + n, n_tail);
    size_t room = max_size - begin - n_tail;
    size_t mutated = fuzz_mutate_json((char *)data + begin, n, room, seed, words);
    n = mutated ? mutated : room ? LLVMFuzzerMutate(data + begin, n, room) : n;
    memcpy(data + begin + n, tail, n_tail);
    free(tail);
    return begin + n + n_tail;
}
