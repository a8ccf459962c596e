/* pmpd run --replay: a recorded run once more, by its recorded plans, and what differs. All of it
 * is the work of rank 0; the decoding itself is an ordinary run under the policy `replay`.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_REPLAY_H
#define PMPD_EXPERIMENTS_REPLAY_H

#include <stdbool.h>

#include "core/prompts.h"
#include "core/recorded.h"
#include "core/settings.h"
#include "experiments/resume.h"

struct replay {
    const char *path; /* borrowed: the run file */
    struct recorded run;
    /* "" or what tells the finished replay in output.dir from other ones: part of the resume key,
     * so that a replay goes on where it was killed, but a finished one is decoded again. */
    char earlier[64];
};

/* Errors: recorded_read's. */
MUST_CHECK enum status replay_open(struct replay **out, const char *path);
void replay_close(struct replay **r);

/* The recorded settings as a configuration file, but for the policy, which is the replay, and
 * output.dir, which is "replay" in the run file's folder. *text: mem_free. Errors:
 * settings_parse's; ST_USER: the path is too long for a setting. */
MUST_CHECK enum status replay_configuration(const struct replay *r, char **text);
/* After --set has changed them. Errors: ST_USER: another policy, or an output.dir that is the
 * recorded run's or holds the run file of a run that is no replay. */
MUST_CHECK enum status replay_check_settings(struct replay *r, const struct settings *s);
/* It must be the same model and the same prompt file, wherever they lie. Errors: ST_USER. */
MUST_CHECK enum status replay_check_digests(const struct replay *r, const char *model_digest,
                                            const char *prompts_digest);
/* Encoded prompts are the recorded ones, and each has a plan or is known to have failed; there may
 * be fewer than were recorded. Errors: ST_USER. */
MUST_CHECK enum status replay_check_prompts(const struct replay *r, const struct prompts *prompts);
/* Prompts that failed in the recorded run have no plan: they fail here without being tried. */
void replay_leave_out(const struct replay *r, struct resume_state *resume);

/* Compares the replay's run file with the recorded one, prints a table (or JSON) and one sentence
 * on why there is a difference or none. Errors: ST_DIFFERS: not equal, or not as equal as two runs
 * are that compute in another way (tokens and levels the same, values within rounding). */
MUST_CHECK enum status replay_compare(const struct replay *r, const char *run_file, bool json);

#endif
