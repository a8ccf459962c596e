/* The rotary part of config.json, in its older and its newer spelling.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/json.h"
#include "core/model_internal.h"

static const double DEFAULT_THETA = 10000.0;

/* A number that may be said in more than one place. */
struct said {
    double value;
    bool is_said;
};

static enum status read_said(struct said *out, const json_t *object, const char *prefix,
                             const char *key, const char *where)
{
    double value = 0;
    if (!json_member(object, key)) {
        return ST_OK;
    }
    TRY(json_get_f64_or(&value, object, key, 0, where));
    if (out->is_said && !(out->value == value)) {
        FAIL(ST_FORMAT, "%s: %s%s is %g, but another %s is %g; keep one", where, prefix, key, value,
             key, out->value);
    }
    *out = (struct said){value, true};
    return ST_OK;
}

/* A number that the kind needs, from `least` on. */
static enum status read_needed(double *out, const json_t *rope, const char *key, const char *member,
                               enum rope_kind kind, double least, const char *where)
{
    char found[MODEL_SHOWN_BYTES];
    const json_t *value = json_member(rope, member);
    *out = json_number_value(value);
    if (!json_is_number(value) || !isfinite(*out) || !(*out >= least)) {
        FAIL(ST_FORMAT, "%s: %s.%s is %s, but the rope type \"%s\" needs a number of at least %g",
             where, key, member, json_describe(value, found, sizeof found), rope_kind_name(kind),
             least);
    }
    return ST_OK;
}

static enum status read_kind(struct rope_scaling *out, bool *is_typed, const json_t *rope,
                             const char *key, const char *where)
{
    static const char *const type_keys[] = {"rope_type", "type"};
    *is_typed = false;
    for (int i = 0; i < 2; i++) {
        const json_t *type = json_member(rope, type_keys[i]);
        if (!type) {
            continue;
        }
        char name[64];
        enum rope_kind kind =
            json_is_string(type) ? rope_kind_parse(json_string_value(type)) : ROPE_N;
        snprintf(name, sizeof name, "%s.%s", key, type_keys[i]);
        if (kind == ROPE_N) {
            return model_refuse(where, name, type, "\"default\", \"linear\" or \"llama3\"");
        }
        if (*is_typed && kind != out->kind) {
            FAIL(ST_FORMAT, "%s: %s is \"%s\", but rope_type is \"%s\"; keep one", where, name,
                 rope_kind_name(kind), rope_kind_name(out->kind));
        }
        out->kind = kind;
        *is_typed = true;
    }
    return ST_OK;
}

/* Without a type there may be nothing that could mean a stretched rotation. */
static enum status check_untyped(const json_t *rope, const char *key, const char *where)
{
    static const char *const plain[] = {"rope_theta", "type", "rope_type", "partial_rotary_factor"};
    json_t *object = (json_t *)(uintptr_t)rope; // jansson's iterators take no const
    for (void *it = json_object_iter(object); it; it = json_object_iter_next(object, it)) {
        const char *member = json_object_iter_key(it);
        bool is_plain = json_is_null(json_object_iter_value(it));
        for (size_t i = 0; i < sizeof plain / sizeof plain[0]; i++) {
            is_plain = is_plain || strcmp(member, plain[i]) == 0;
        }
        if (!is_plain) {
            char name[64];
            snprintf(name, sizeof name, "%s.%.32s", key, member);
            return model_refuse(where, name, json_object_iter_value(it),
                                "only rope_theta where no rope_type is given");
        }
    }
    return ST_OK;
}

static enum status read_scaling(struct rope_scaling *out, const json_t *rope, const char *key,
                                const char *where)
{
    struct rope_scaling s = {0};
    bool is_typed;
    TRY(read_kind(&s, &is_typed, rope, key, where));
    if (!is_typed) {
        return check_untyped(rope, key, where);
    }
    if (s.kind == ROPE_DEFAULT) {
        return ST_OK;
    }
    TRY(read_needed(&s.factor, rope, key, "factor", s.kind, 1, where));
    if (s.kind == ROPE_LLAMA3) {
        const double tiny = 1e-6; /* not 0: the rule divides by it */
        double original;
        TRY(read_needed(&s.low_freq_factor, rope, key, "low_freq_factor", s.kind, tiny, where));
        TRY(read_needed(&s.high_freq_factor, rope, key, "high_freq_factor", s.kind, tiny, where));
        TRY(read_needed(&original, rope, key, "original_max_position_embeddings", s.kind, 1,
                        where));
        if (!(s.high_freq_factor > s.low_freq_factor)) {
            FAIL(ST_FORMAT, "%s: %s.high_freq_factor is %g, expected more than low_freq_factor, %g",
                 where, key, s.high_freq_factor, s.low_freq_factor);
        }
        if (original > MODEL_CONTEXT_MAX || original != floor(original)) {
            FAIL(ST_FORMAT,
                 "%s: %s.original_max_position_embeddings is %g, expected an integer from 1 to %d",
                 where, key, original, (int)MODEL_CONTEXT_MAX);
        }
        s.original_context = (int32_t)original;
    }
    if (out->kind != ROPE_DEFAULT) {
        FAIL(ST_FORMAT, "%s: both rope_parameters and rope_scaling stretch the rotation; keep one",
             where);
    }
    *out = s;
    return ST_OK;
}

/* Which share of a head's dimensions rotates, as the definition has it: rounded down. */
static enum status set_rot_dim(struct model_config *out, const struct family *family, double share,
                               const json_t *json, const char *where)
{
    static const char key[] = "partial_rotary_factor";
    if (!family->partial && !(share == 1.0)) {
        const json_t *value = json_member(json, key);
        value = value ? value : json_member(json_member(json, "rope_parameters"), key);
        value = value ? value : json_member(json_member(json, "rope_scaling"), key);
        return model_refuse(where, key, value, "1.0 (all dimensions rotate)");
    }
    double dims = floor(share * out->head_dim);
    if (!(share > 0 && share <= 1) || dims < 2 || fmod(dims, 2) != 0) {
        FAIL(ST_FORMAT,
             "%s: partial_rotary_factor %g of a head's %d dimensions is %g, expected an even "
             "number from 2 to %d",
             where, share, out->head_dim, dims, out->head_dim);
    }
    out->rot_dim = (int32_t)dims;
    return ST_OK;
}

enum status model_read_rope(struct model_config *out, const struct family *family,
                            const json_t *json, const char *where)
{
    static const char *const objects[] = {"rope_parameters", "rope_scaling"};
    struct said theta = {0}, share = {0};
    TRY(read_said(&theta, json, "", "rope_theta", where));
    TRY(read_said(&share, json, "", "partial_rotary_factor", where));
    for (int i = 0; i < 2; i++) {
        const json_t *rope = json_member(json, objects[i]);
        char prefix[32];
        if (!rope) {
            continue;
        }
        if (!json_is_object(rope)) {
            return model_refuse(where, objects[i], rope, "null or an object with a rope_type");
        }
        TRY(read_scaling(&out->rope_scaling, rope, objects[i], where));
        snprintf(prefix, sizeof prefix, "%s.", objects[i]);
        TRY(read_said(&theta, rope, prefix, "rope_theta", where));
        TRY(read_said(&share, rope, prefix, "partial_rotary_factor", where));
    }
    out->rope_theta = theta.is_said ? theta.value : DEFAULT_THETA;
    if (!(out->rope_theta > 0) || !isfinite(out->rope_theta)) {
        FAIL(ST_FORMAT, "%s: rope_theta is %g, expected a number above 0", where, out->rope_theta);
    }
    return set_rot_dim(out, family, share.is_said ? share.value : family->rotary, json, where);
}
