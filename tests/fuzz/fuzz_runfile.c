/* A run file that was good once: the input is a list of changes to it. Things go, or become of
 * other types and shapes; tables lose columns, get other rows, and cells other numbers. HDF5 writes
 * the file, so that only our reading is tried.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/json.h"
#include "core/mem.h"
#include "core/recorded.h"
#include "core/runfile.h"
#include "experiments/replay.h"
#include "tests/fuzz/fuzz.h"
#include "tests/gen.h"

enum { TEXT_BYTES = 32, VALUES = 72, CHANGES_MAX = 8, ROW_BYTES_MAX = 1024, MEMBERS_MAX = 32 };

/* ---- the good file ---- */

static char *base;
static size_t base_bytes;

static void make_base(void)
{
    struct prompt prompt[2] = {{.id = "a", .task = "t", .split = "s"}, {.id = "b"}};
    struct prompts prompts = {.n = 2, .prompt = prompt};
    struct level_table levels = {
        .n = 2, .level = {{.text = "4", .avg_bits = 4}, {.text = "2", .avg_bits = 2}}};
    struct turn_record turns[2] = {
        {.n_prompt_tok = 3, .n_new_tok = 3, .n_steps = 2, .n_switches = 2},
        {.n_prompt_tok = 2, .n_new_tok = 2, .n_steps = 1, .n_switches = 1, .prefill_level = 1}};
    struct step_record steps[3] = {{.level = 1}, {.step = 1}, {.turn = 1, .level = 1}};
    struct plan_switch switches[3] = {{0, 1}, {1, 0}, {0, 1}};
    struct pass_record passes[1] = {{.kind = PASS_DECODE, .time_us = 5}};
    float features[4] = {1, 2, 3, 4};
    struct finished_record finished = {.n_turns = 2,
                                       .n_steps = 3,
                                       .n_switches = 3,
                                       .n_passes = 1,
                                       .n_feature_tok = 1,
                                       .feature_dim = 2,
                                       .turns = turns,
                                       .steps = steps,
                                       .switches = switches,
                                       .passes = passes,
                                       .features = features};
    struct failed_prompt failed = {.ordinal = 1, .attempts = 2, .reason = "why"};
    struct run_fact facts[2] = {{"program", "pmpd"}, {"product", "one"}};
    struct run_contents run = {.prompts = &prompts,
                               .levels = &levels,
                               .n_finished = 1,
                               .finished = &finished,
                               .n_failed = 1,
                               .failed = &failed,
                               .n_facts = 2,
                               .facts = facts,
                               .config_text = "decode.slots = 1;"};
    INVARIANT(runfile_write(fuzz_path("run.h5"), &run) == ST_OK);
    base = gen_read_file(fuzz_path("run.h5"), &base_bytes);
    INVARIANT(base != NULL); // for all inputs; reachable, so no leak
}

/* ---- any type, shape and contents ---- */

/* Ids below zero are ignored. */
static void close_all(hid_t a, hid_t b, hid_t c)
{
    const hid_t ids[] = {a, b, c};
    for (int i = 0; i < 3; i++) {
        if (ids[i] >= 0) {
            H5Idec_ref(ids[i]);
        }
    }
}

static hid_t text_type(bool variable, bool utf8)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, variable ? H5T_VARIABLE : TEXT_BYTES);
    H5Tset_cset(type, utf8 ? H5T_CSET_UTF8 : H5T_CSET_ASCII);
    return type;
}

static hid_t any_type(struct fuzz_bytes *b)
{
    uint8_t what = fuzz_u8(b);
    const hid_t plain[] = {H5T_STD_I64LE, H5T_IEEE_F64LE,  H5T_STD_U8LE,  H5T_IEEE_F32BE,
                           H5T_STD_B16LE, H5T_STD_REF_OBJ, H5T_STD_I32BE, H5T_STD_U64LE};
    hid_t one = plain[what / 8 % 8];
    hsize_t dims[2] = {2, 3};
    hid_t row = -1;
    switch (what % 8) {
    case 0:
        return text_type(true, what & 8);
    case 1:
        return text_type(false, what & 8);
    case 2:
        row = H5Tcreate(H5T_COMPOUND, 16);
        H5Tinsert(row, "prompt", 0, one);
        return row;
    case 3:
        return H5Tarray_create2(one, 2, dims);
    case 4:
        return H5Tvlen_create(one);
    case 5:
        return H5Tcreate(H5T_OPAQUE, 5);
    default:
        return H5Tcopy(one);
    }
}

static hid_t any_space(struct fuzz_bytes *b)
{
    uint8_t what = fuzz_u8(b);
    hsize_t dims[3] = {fuzz_u8(b) % VALUES, what / 4 % 4, 2};
    int rank = what % 4;
    return rank == 0 ? H5Screate(what & 128 ? H5S_NULL : H5S_SCALAR)
                     : H5Screate_simple(rank, dims, NULL);
}

/* Writes into a dataset or an attribute what the type's memory can be given safely. */
static void fill(struct fuzz_bytes *b, hid_t object, bool is_attribute, hid_t type, hid_t space)
{
    static char text[TEXT_BYTES + 1], *texts[8 * VALUES];
    static unsigned char values[8 * VALUES * TEXT_BYTES];
    hssize_t n = H5Sget_simple_extent_npoints(space);
    bool variable = H5Tis_variable_str(type) > 0;
    H5T_class_t class = H5Tget_class(type);
    if (n < 1 || n > 8 * VALUES || H5Tget_size(type) > TEXT_BYTES ||
        (class != H5T_INTEGER && class != H5T_FLOAT && class != H5T_STRING)) {
        return; // what HDF5 fills it with: zeros
    }
    for (size_t i = 0; i < TEXT_BYTES; i++) {
        text[i] = (char)fuzz_u8(b);
    }
    for (size_t i = 0; i < (size_t)n; i++) {
        texts[i] = text;
        memcpy(values + i * TEXT_BYTES, text, TEXT_BYTES);
    }
    const void *buf = variable ? (const void *)texts : (const void *)values;
    if (is_attribute) {
        H5Awrite(object, type, buf);
    } else {
        H5Dwrite(object, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, buf);
    }
}

/* A name that need not be UTF-8. */
static const char *any_name(struct fuzz_bytes *b)
{
    static char name[200];
    size_t n = 1 + fuzz_u8(b) % 8, times = n == 8 ? 20 : 1;
    for (size_t i = 0; i < n * times; i++) {
        uint8_t c = i < n ? fuzz_u8(b) : (uint8_t)name[i % n];
        name[i] = c == '/' || c == '\0' || c == '.' ? 'x' : (char)c;
    }
    name[n * times] = '\0';
    return name;
}

/* ---- changes ---- */

static void put_attribute(struct fuzz_bytes *b, hid_t object, const char *name)
{
    hid_t type = any_type(b), space = any_space(b);
    H5Adelete(object, name);
    hid_t attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    if (attribute >= 0) {
        fill(b, attribute, true, type, space);
    }
    close_all(attribute, space, type);
}

static void put_set(struct fuzz_bytes *b, hid_t parent, const char *name)
{
    hid_t type = any_type(b), space = any_space(b);
    H5Ldelete(parent, name, H5P_DEFAULT);
    hid_t set = H5Dcreate2(parent, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    if (set >= 0) {
        fill(b, set, false, type, space);
    }
    close_all(set, space, type);
}

/* One number of a table. */
static void put_cell(struct fuzz_bytes *b, hid_t file, const char *name)
{
    hid_t set = H5Dopen2(file, name, H5P_DEFAULT), type = -1, space = -1, one = -1, memory = -1;
    int n_members = 0;
    hsize_t n = 0, row = 0, count = 1;
    if (set >= 0) {
        type = H5Dget_type(set);
        space = H5Dget_space(set);
        n_members = H5Tget_class(type) == H5T_COMPOUND ? H5Tget_nmembers(type) : 0;
    }
    unsigned member = fuzz_u8(b), small = fuzz_u8(b);
    int32_t value = small < 250 ? (int32_t)small % 10 - 2 : (int32_t)fuzz_u32(b);
    if (n_members > 0 && H5Sget_simple_extent_ndims(space) == 1 &&
        H5Sget_simple_extent_dims(space, &n, NULL) == 1 && n > 0) {
        char *key = H5Tget_member_name(type, member % (unsigned)n_members);
        row = small / 10 % n;
        memory = H5Screate_simple(1, &count, NULL);
        one = H5Tcreate(H5T_COMPOUND, sizeof value);
        H5Tinsert(one, key, 0, H5T_NATIVE_INT32);
        H5Sselect_hyperslab(space, H5S_SELECT_SET, &row, NULL, &count, NULL);
        H5Dwrite(set, one, memory, space, H5P_DEFAULT, &value); // texts refuse
        H5free_memory(key);
    }
    close_all(memory, one, space);
    close_all(type, set, -1);
}

/* The table's type with one column gone, of another type, or as it was. */
static hid_t changed_type(struct fuzz_bytes *b, hid_t type)
{
    uint8_t what = fuzz_u8(b);
    int n = H5Tget_nmembers(type);
    hid_t changed = H5Tcreate(H5T_COMPOUND, ROW_BYTES_MAX);
    for (int i = 0; i < n && i < MEMBERS_MAX; i++) {
        char *key = H5Tget_member_name(type, (unsigned)i);
        hid_t own = H5Tget_member_type(type, (unsigned)i), other = -1;
        bool here = i == what % (n + 1);
        if (here && what & 64) {
            other = any_type(b);
        }
        if (!here || what & 64) {
            H5Tinsert(changed, key, (size_t)i * TEXT_BYTES, other >= 0 ? other : own);
        }
        close_all(own, other, -1);
        H5free_memory(key);
    }
    return changed;
}

/* The table again with other columns or another number of rows, perhaps more than there is memory
 * for: nothing is stored of them. Old rows are kept,
 * new ones are zero. */
static void put_table(struct fuzz_bytes *b, hid_t file, const char *name)
{
    static unsigned char rows[VALUES * ROW_BYTES_MAX];
    hid_t old = H5Dopen2(file, name, H5P_DEFAULT), type = -1, space = -1, memory = -1, set = -1;
    hid_t create = H5Pcreate(H5P_DATASET_CREATE), changed = -1, slab = -1;
    hsize_t n_old = 0, n = 0, one = 1, kept = 0;
    uint8_t size = fuzz_u8(b);
    if (old >= 0) {
        type = H5Dget_type(old);
        space = H5Dget_space(old);
    }
    if (old < 0 || H5Tget_class(type) != H5T_COMPOUND ||
        H5Sget_simple_extent_dims(space, &n_old, NULL) != 1 || n_old > VALUES) {
        goto done;
    }
    memory = H5Tget_native_type(type, H5T_DIR_DEFAULT);
    changed = changed_type(b, type);
    n = n_old;
    if (size >= 240) {
        n = (hsize_t)1 << (size % 16 * 4);
    } else if (size >= 128) {
        n = size < 224 ? size % 8u : VALUES - size % 16u;
    }
    H5Pset_chunk(create, 1, &one);
    slab = H5Screate_simple(1, &n, NULL);
    kept = n <= VALUES ? n : n_old;
    if (memory < 0 || H5Tget_size(memory) > ROW_BYTES_MAX) {
        goto done;
    }
    memset(rows, 0, sizeof rows);
    H5Dread(old, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, rows);
    H5Ldelete(file, name, H5P_DEFAULT);
    set = H5Dcreate2(file, name, changed, slab, H5P_DEFAULT, create, H5P_DEFAULT);
    if (set >= 0 && kept > 0) {
        hsize_t first = 0;
        hid_t some = H5Screate_simple(1, &kept, NULL);
        H5Sselect_hyperslab(slab, H5S_SELECT_SET, &first, NULL, &kept, NULL);
        H5Dwrite(set, memory, some, slab, H5P_DEFAULT, rows);
        H5Idec_ref(some);
    }
    H5Dvlen_reclaim(memory, space, H5P_DEFAULT, rows);
done:
    close_all(set, slab, create);
    close_all(changed, memory, space);
    close_all(type, old, -1);
}

static void change(struct fuzz_bytes *b, hid_t file)
{
    static const char *const names[] = {"levels",
                                        "prompts",
                                        "steps",
                                        "plans",
                                        "plan_switches",
                                        "failed",
                                        "passes",
                                        "decisions",
                                        "kv_features",
                                        "kv_features/prompt",
                                        "metrics",
                                        "metrics/n_prompts",
                                        "metrics/decode_s",
                                        "provenance",
                                        "provenance/config",
                                        "."};
    uint8_t what = fuzz_u8(b);
    const char *name = names[what / 16];
    hid_t object = -1;
    switch (what % 16) {
    case 0:
        H5Ldelete(file, name, H5P_DEFAULT);
        return;
    case 1:
        put_set(b, file, name);
        return;
    case 2:
    case 3:
        put_table(b, file, name);
        return;
    case 4:
    case 5:
        object = H5Oopen(file, name, H5P_DEFAULT);
        if (object >= 0) {
            static const char *const keys[] = {"unit", "format", "format_version", "program"};
            uint8_t key = fuzz_u8(b);
            put_attribute(b, object, key % 8 < 4 ? keys[key % 8] : any_name(b));
        }
        close_all(object, -1, -1);
        return;
    case 6:
        object = H5Gopen2(file, name, H5P_DEFAULT);
        if (object >= 0) {
            put_set(b, object, any_name(b));
        }
        close_all(object, -1, -1);
        return;
    default: // most of what is checked are numbers
        put_cell(b, file, name);
    }
}

/* ---- what was accepted ---- */

static void check_recorded(const struct recorded *r, bool with_steps)
{
    INVARIANT(r->n_levels >= 0 && r->n_levels <= LEVEL_TABLE_MAX && r->n_turns >= 0);
    for (int32_t i = 0; i < r->n_levels; i++) {
        INVARIANT(memchr(r->level[i], '\0', sizeof r->level[i]) != NULL);
    }
    for (int64_t i = 0; i < r->n_turns; i++) {
        const struct recorded_turn *u = &r->turns[i];
        INVARIANT(u->prefill_level >= 0 && u->prefill_level < r->n_levels);
        INVARIANT(recorded_find(r, u->prompt, u->turn) == u);
        for (int32_t k = 0; k < u->n_switches; k++) {
            INVARIANT(u->switches[k].level >= 0 && u->switches[k].level < r->n_levels);
            INVARIANT(u->switches[k].step > (k ? u->switches[k - 1].step : -1));
        }
        for (int32_t k = 0; with_steps && k < u->n_tokens; k++) {
            INVARIANT(u->tokens[k].level >= 0 && u->tokens[k].level < r->n_levels);
        }
        INVARIANT(!with_steps || (u->id && u->n_tokens >= 1 && u->n_prompt_tok >= 1));
    }
    for (int64_t i = 0; i < r->n_failed; i++) {
        INVARIANT(r->failed[i] >= 0);
    }
    INVARIANT(strlen(r->digest) == DIGEST_TEXT - 1);
    INVARIANT(!with_steps || (r->config && recorded_fact(r, "program")));
}

/* A run that is compared with itself is equal, whatever it holds. */
static void check_replay(bool as_json)
{
    static FILE *nowhere; // for all inputs
    FILE *out = stdout;
    struct replay *r = NULL;
    char *text = NULL;
    nowhere = nowhere ? nowhere : fopen("/dev/null", "w");
    INVARIANT(nowhere != NULL);
    if (fuzz_ok(replay_open(&r, fuzz_path("run.h5")))) {
        check_recorded(&r->run, true);
        if (fuzz_ok(replay_configuration(r, &text))) {
            stdout = nowhere;
            INVARIANT(fuzz_ok(replay_compare(r, fuzz_path("run.h5"), as_json)));
            stdout = out;
        }
        mem_free(text);
        replay_close(&r);
    }
}

static void check_described(bool as_json)
{
    char *text = NULL;
    json_t *json = NULL;
    if (fuzz_ok(runfile_describe(&text, fuzz_path("run.h5"), as_json))) {
        INVARIANT(text[0] != '\0');
        INVARIANT(!as_json || fuzz_ok(json_read_text(&json, text, strlen(text), "described")));
        mem_free(text);
    }
    json_release(&json);
}

static void check_plans(void)
{
    struct recorded r;
    if (fuzz_ok(recorded_read(&r, fuzz_path("run.h5"), false))) {
        check_recorded(&r, false);
    }
    recorded_free(&r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_bytes b = {data, data + size};
    if (!base) {
        make_base();
        H5set_free_list_limits(-1, -1, -1, -1, -1, -1); // half a MiB per open file is kept
    }
    uint8_t how = fuzz_u8(&b);
    fuzz_put("run.h5", base, base_bytes);
    hid_t file = H5Fopen(fuzz_path("run.h5"), H5F_ACC_RDWR, H5P_DEFAULT);
    INVARIANT(file >= 0);
    for (int i = 0; i < CHANGES_MAX && b.at < b.end; i++) {
        change(&b, file);
    }
    H5Fclose(file);
    H5Eclear2(H5E_DEFAULT);
    if (how % 4 == 0) {
        check_described(how & 4);
    } else if (how % 4 == 1) {
        check_plans();
    } else {
        check_replay(how & 4);
    }
    INVARIANT(H5Fget_obj_count((hid_t)H5F_OBJ_ALL, H5F_OBJ_ALL) == 0); // nothing is left open
    return 0;
}
