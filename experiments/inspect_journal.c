/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/inspect_journal.h"

#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/trace.h"
#include "dist/journal.h"
#include "experiments/resume.h"

/* A prompt that broke something and is not finished. */
struct mark {
    int64_t ordinal;
    uint64_t key[2];
    bool failed;
    int32_t attempts;
    char reason[256];
};

struct view {
    struct resume_state starts; /* of no prompts: it counts starts and silent deaths */
    struct mark *marks;         /* (n_marks) owned */
    size_t n_marks;
    int64_t n_states;
    struct journal_state state; /* the last of them */
    const char *last;           /* how the last start ended */
    char reason[256];
};

/* The mark of a prompt, or NULL. */
static struct mark *find(const struct view *v, int64_t ordinal, const uint64_t key[2])
{
    for (size_t i = 0; i < v->n_marks; i++) {
        struct mark *m = &v->marks[i];
        if (m->ordinal == ordinal && m->key[0] == key[0] && m->key[1] == key[1]) {
            return m;
        }
    }
    return NULL;
}

static enum status add(struct view *v, int64_t ordinal, const uint64_t key[2], struct mark **out)
{
    *out = find(v, ordinal, key);
    if (!*out) {
        TRY(mem_grow_array((void **)&v->marks, v->n_marks, v->n_marks + 1, sizeof *v->marks));
        *out = &v->marks[v->n_marks++];
        **out = (struct mark){.ordinal = ordinal, .key = {key[0], key[1]}};
    }
    return ST_OK;
}

static enum status visit_end(struct view *v, const void *payload, size_t bytes)
{
    static const char *const words[] = {"done", "stopped", "error"};
    struct journal_end end;
    TRY(journal_unpack_end(&end, payload, bytes));
    v->last = end.how >= 0 && end.how < 3 ? words[end.how] : "?";
    memcpy(v->reason, end.reason, sizeof v->reason);
    return ST_OK;
}

static enum status visit(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    struct view *v = ctx;
    struct mark *m = NULL;
    TRY(resume_visit(&v->starts, kind, payload, bytes));
    if (kind == JOURNAL_RUN) {
        v->last = "silent"; // until something else is said
        v->reason[0] = '\0';
    } else if (kind == JOURNAL_FINISHED && v->n_marks > 0) {
        struct finished_record r;
        TRY(trace_unpack(&r, payload, bytes));
        m = find(v, r.ordinal, r.key);
        if (m) {
            *m = v->marks[--v->n_marks];
        }
        trace_free(&r);
    } else if (kind == JOURNAL_FAULT) {
        struct journal_fault fault;
        TRY(journal_unpack_fault(&fault, payload, bytes));
        TRY(add(v, fault.ordinal, fault.key, &m));
        memcpy(m->reason, fault.reason, sizeof m->reason);
        v->last = "fault";
        memcpy(v->reason, fault.reason, sizeof v->reason);
    } else if (kind == JOURNAL_FAILED) {
        struct journal_failed failed;
        TRY(journal_unpack_failed(&failed, payload, bytes));
        TRY(add(v, failed.ordinal, failed.key, &m));
        m->failed = true;
        m->attempts = failed.attempts;
        memcpy(m->reason, failed.reason, sizeof m->reason);
    } else if (kind == JOURNAL_STATE) {
        TRY(journal_unpack_state(&v->state, payload, bytes));
        v->n_states++;
    } else if (kind == JOURNAL_RETRY) {
        v->n_marks = 0;
    } else if (kind == JOURNAL_END) {
        TRY(visit_end(v, payload, bytes));
    }
    return ST_OK;
}

/* Text from a file: what is no UTF-8 becomes "?". */
static json_t *text_json(const char *text)
{
    json_t *j = json_string(text);
    return j ? j : json_string("?");
}

enum status inspect_journal(json_t **out, const char *dir)
{
    struct view v = {.last = "none"};
    enum status st = ST_OK;
    TRY_GOTO(st, journal_read(dir, visit, &v, NULL), done);
    json_t *failed = json_array(), *suspects = json_array();
    for (size_t i = 0; i < v.n_marks; i++) {
        const struct mark *m = &v.marks[i];
        json_t *j = json_pack("{s:I, s:o}", "prompt", (json_int_t)m->ordinal, "reason",
                              text_json(m->reason));
        if (m->failed) {
            json_object_set_new(j, "attempts", json_integer(m->attempts));
        }
        json_array_append_new(m->failed ? failed : suspects, j);
    }
    *out = json_pack("{s:i, s:I, s:o, s:o, s:i, s:s, s:o}", "starts", v.starts.n_epochs, "finished",
                     (json_int_t)v.starts.n_other, "failed", failed, "suspects", suspects,
                     "silent_deaths", resume_n_deaths(&v.starts), "last_start", v.last, "reason",
                     text_json(v.reason));
    if (v.n_states > 0) {
        json_object_set_new(*out, "budget",
                            json_pack("{s:I, s:f, s:f, s:f}", "dials", (json_int_t)v.n_states,
                                      "target", v.state.target, "last_dial", (double)v.state.dial,
                                      "account", v.state.account));
    }
done:
    mem_free(v.marks);
    resume_free(&v.starts);
    return st;
}

static long long number(const json_t *journal, const char *key)
{
    return (long long)json_integer_value(json_object_get(journal, key));
}

static void print_prompts(const json_t *journal, const char *key, const char *word)
{
    const json_t *list = json_object_get(journal, key);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *j = json_array_get(list, i);
        printf("  %-12s prompt %lld: %s\n", word, number(j, "prompt"),
               json_string_value(json_object_get(j, "reason")));
    }
}

void inspect_journal_print(const json_t *journal, const char *dir)
{
    const char *last = json_string_value(json_object_get(journal, "last_start"));
    const char *reason = json_string_value(json_object_get(journal, "reason"));
    bool silent = strcmp(last, "silent") == 0;
    printf("journal %s/journal.bin\n", dir);
    printf("  starts       %lld; the last: %s%s%s\n", number(journal, "starts"),
           silent ? "is running, or died without a word" : last, reason[0] ? ": " : "", reason);
    if (number(journal, "silent_deaths") > 0) {
        printf("  deaths       %lld without a word since the last finished prompt\n",
               number(journal, "silent_deaths"));
    }
    printf("  finished     %lld prompts\n", number(journal, "finished"));
    const json_t *budget = json_object_get(journal, "budget");
    if (budget) {
        printf("  budget       %lld dials set, the last %.3f for a target of %g\n",
               number(budget, "dials"), json_real_value(json_object_get(budget, "last_dial")),
               json_real_value(json_object_get(budget, "target")));
    }
    print_prompts(journal, "failed", "failed");
    print_prompts(journal, "suspects", "suspect");
}
