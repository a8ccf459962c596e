/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/replay.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "core/log.h"
#include "core/mem.h"

enum status replay_open(struct replay **out, const char *path)
{
    void *owned = NULL;
    TRY(mem_alloc_array(&owned, 1, sizeof **out));
    struct replay *r = owned;
    r->path = path;
    enum status st = recorded_read(&r->run, path, true);
    if (st != ST_OK) {
        mem_free(r);
        return st;
    }
    *out = r;
    return ST_OK;
}

void replay_close(struct replay **r)
{
    if (*r) {
        recorded_free(&(*r)->run);
        mem_free(*r);
    }
    *r = NULL;
}

/* ---- settings ---- */

/* "results/run" of "results/run/run.h5", "." of "run.h5" */
static void folder_of(char *folder, size_t bytes, const char *path)
{
    const char *slash = strrchr(path, '/');
    if (!slash) {
        snprintf(folder, bytes, ".");
    } else {
        snprintf(folder, bytes, "%.*s", slash == path ? 1 : (int)(slash - path), path);
    }
}

enum status replay_configuration(const struct replay *r, char **text)
{
    struct settings s;
    char name[SETTINGS_PATH_BYTES + 32], folder[SETTINGS_PATH_BYTES];
    snprintf(name, sizeof name, "%s:/provenance/config", r->path);
    settings_default(&s);
    TRY(settings_parse(&s, r->run.config, name));
    folder_of(folder, sizeof folder, r->path);
    if (strlen(r->path) + sizeof "/replay" > sizeof s.output.dir) {
        FAIL(ST_USER, "the path of the run file is longer than %d bytes: %.60s...",
             (int)(sizeof s.output.dir - sizeof "/replay"), r->path);
    }
    snprintf(s.service.rank, sizeof s.service.rank, "inline"); // any number of ranks
    s.service.lag = 1; // recorded plans are those that came to pass
    s.budget.average_bits = s.budget.ms_per_token = 0;
    snprintf(s.policy.replay, sizeof s.policy.replay, "%s", r->path);
    snprintf(s.output.dir, sizeof s.output.dir, "%.*s/replay",
             (int)(sizeof s.output.dir - sizeof "/replay"), folder);
    /* a run with one slot whose policy added tokens: the only case that slots do not tell */
    bool added = s.decode.slots == 1 && strcmp(recorded_fact(&r->run, "product"), "slots") == 0;
    snprintf(s.policy.name, sizeof s.policy.name, added ? "replay_slots" : "replay");
    return settings_print(text, &s, false);
}

/* A run file that stands where the replay's will be must be that of an earlier replay. */
static enum status check_earlier(struct replay *r, const char *dir)
{
    char path[SETTINGS_PATH_BYTES + 32];
    struct stat info;
    struct recorded earlier;
    snprintf(path, sizeof path, "%s/run.h5", dir);
    if (stat(path, &info) != 0) {
        return ST_OK;
    }
    bool is_replay = false;
    if (recorded_read(&earlier, path, true) == ST_OK) {
        is_replay = strncmp(recorded_fact(&earlier, "policy"), "replay", strlen("replay")) == 0;
        recorded_free(&earlier);
    }
    if (!is_replay) {
        FAIL(ST_USER,
             "%s is not the run file of a replay and would be replaced; give the replay a folder "
             "of its own: --set output.dir=FOLDER",
             path);
    }
    snprintf(r->earlier, sizeof r->earlier, " after %lld.%09ld", (long long)info.st_mtim.tv_sec,
             (long)info.st_mtim.tv_nsec);
    return ST_OK;
}

enum status replay_check_settings(struct replay *r, const struct settings *s)
{
    char folder[SETTINGS_PATH_BYTES];
    struct stat recorded, here;
    if (strcmp(s->policy.replay, r->path) != 0 ||
        (strcmp(s->policy.name, "replay") != 0 && strcmp(s->policy.name, "replay_slots") != 0)) {
        FAIL(ST_USER,
             "--replay repeats the recorded plans, so that policy.name and policy.replay cannot be "
             "set (policy.name = %s, policy.replay = %s)",
             s->policy.name, s->policy.replay);
    }
    folder_of(folder, sizeof folder, r->path);
    if (stat(folder, &recorded) == 0 && stat(s->output.dir, &here) == 0 &&
        recorded.st_dev == here.st_dev && recorded.st_ino == here.st_ino) {
        FAIL(ST_USER,
             "output.dir = %s is the folder of the recorded run; give the replay a folder of its "
             "own",
             s->output.dir);
    }
    TRY(check_earlier(r, s->output.dir));
    log_info("replaying %s into %s: model %s, prompts %s", r->path, s->output.dir, s->model.path,
             s->prompts.path);
    return ST_OK;
}

/* ---- inputs ---- */

enum status replay_check_digests(const struct replay *r, const char *model_digest,
                                 const char *prompts_digest)
{
    const char *model = recorded_fact(&r->run, "model_digest");
    const char *prompts = recorded_fact(&r->run, "prompts_digest");
    if (strcmp(model, model_digest) != 0) {
        FAIL(ST_USER,
             "%s was recorded with another model: its digest is %s, here it is %s; name the "
             "folder of the recorded model (then %s) with --set model.path=FOLDER",
             r->path, model, model_digest, recorded_fact(&r->run, "model_path"));
    }
    if (strcmp(prompts, prompts_digest) != 0) {
        FAIL(ST_USER,
             "%s was recorded with another prompt file: its digest is %s, here it is %s; name the "
             "recorded file (then %s) with --set prompts.path=FILE",
             r->path, prompts, prompts_digest, recorded_fact(&r->run, "prompts_path"));
    }
    return ST_OK;
}

static bool has_failed(const struct recorded *run, int64_t ordinal)
{
    for (int64_t i = 0; i < run->n_failed; i++) {
        if (run->failed[i] == ordinal) {
            return true;
        }
    }
    return false;
}

static enum status check_turn(const struct replay *r, const struct prompt *p, int32_t ordinal,
                              int32_t turn)
{
    const struct recorded_turn *u = recorded_find(&r->run, ordinal, turn);
    if (!u) {
        FAIL(ST_USER,
             "%s has no plan for prompt %d (%s), turn %d: were fewer prompts recorded "
             "(prompts.limit)?",
             r->path, ordinal, p->id, turn);
    }
    if (strcmp(u->id, p->id) != 0) {
        FAIL(ST_USER, "prompt %d is \"%s\" in %s and \"%s\" here: is prompts.split another?",
             ordinal, u->id, r->path, p->id);
    }
    int32_t n = p->n_ids[turn] + (turn > 0 ? 1 : 0); // a later turn reads the last token, too
    if (u->n_prompt_tok != n) {
        FAIL(ST_USER,
             "prompt %d (%s), turn %d has %d tokens in %s and %d here: was the model's tokenizer "
             "changed?",
             ordinal, p->id, turn, u->n_prompt_tok, r->path, n);
    }
    return ST_OK;
}

enum status replay_check_prompts(const struct replay *r, const struct prompts *prompts)
{
    for (int32_t i = 0; i < prompts->n; i++) {
        const struct prompt *p = &prompts->prompt[i];
        if (has_failed(&r->run, i)) {
            continue;
        }
        for (int32_t turn = 0; turn < p->n_turns; turn++) {
            TRY(check_turn(r, p, i, turn));
        }
        if (recorded_find(&r->run, i, p->n_turns)) {
            FAIL(ST_USER, "prompt %d (%s) has more turns in %s than the %d here", i, p->id, r->path,
                 p->n_turns);
        }
    }
    return ST_OK;
}

void replay_leave_out(const struct replay *r, struct resume_state *resume)
{
    for (int64_t i = 0; i < r->run.n_failed; i++) {
        int64_t ordinal = r->run.failed[i];
        struct resume_prompt *p = ordinal < resume->n ? &resume->prompts[ordinal] : NULL;
        if (p && !p->failed && !p->finished) {
            p->failed = true;
            p->failure = (struct failed_prompt){
                .ordinal = ordinal, .reason = "no plan to replay: it failed in the recorded run"};
            resume->n_failed++;
        }
    }
}
