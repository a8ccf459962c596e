/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE // malloc_trim
#include "experiments/bench/machine.h"

#include <malloc.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { LINE_BYTES = 512, MOST_NICE = -19, USUAL_CACHE = 32 << 20 };

/* The rest of the first line of a file that begins with key, after blanks and a colon. */
static bool find_line(const char *path, const char *key, char line[LINE_BYTES])
{
    FILE *f = fopen(path, "r");
    bool found = false;
    size_t n = strlen(key);
    while (f && !found && fgets(line, LINE_BYTES, f)) {
        if (strncmp(line, key, n) == 0) {
            found = true;
            const char *at = line + n + strspn(line + n, " \t:");
            memmove(line, at, strlen(at) + 1);
            line[strcspn(line, "\n")] = '\0';
        }
    }
    if (f) {
        fclose(f);
    }
    return found;
}

void machine_cpu(char text[MACHINE_TEXT_BYTES])
{
    char line[LINE_BYTES];
    bool found = find_line("/proc/cpuinfo", "model name", line);
    snprintf(text, MACHINE_TEXT_BYTES, "%.*s", MACHINE_TEXT_BYTES - 1, found ? line : "unknown");
}

/* The cache that this CPU's misses leave: sysconf adds up those of all the dies of some processors.
 */
size_t machine_cache_bytes(void)
{
    size_t bytes = 0;
    for (int i = 0, best = 0; i < 10; i++) {
        char path[96], line[LINE_BYTES];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", i);
        int level = find_line(path, "", line) ? atoi(line) : 0;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        if (level > best && find_line(path, "", line)) {
            best = level;
            bytes = (size_t)strtoull(line, NULL, 10) * 1024; /* "32768K" */
        }
    }
    long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return bytes > 0 ? bytes : l3 > 0 ? (size_t)l3 : USUAL_CACHE;
}

static size_t kilobytes(const char *path, const char *key)
{
    char line[LINE_BYTES];
    return find_line(path, key, line) ? (size_t)strtoull(line, NULL, 10) * 1024 : 0;
}

size_t machine_available_bytes(void)
{
    char line[LINE_BYTES];
    size_t bytes = kilobytes("/proc/meminfo", "MemAvailable");
    if (find_line("/sys/fs/cgroup/memory.max", "", line) && line[0] >= '0' && line[0] <= '9') {
        size_t most = (size_t)strtoull(line, NULL, 10), used = 0;
        used = find_line("/sys/fs/cgroup/memory.current", "", line)
                   ? (size_t)strtoull(line, NULL, 10)
                   : 0;
        size_t left = most > used ? most - used : 1;
        bytes = left < bytes ? left : bytes;
    }
    return bytes;
}

void machine_resident_bytes(size_t *now, size_t *highest)
{
    *now = kilobytes("/proc/self/status", "VmRSS");
    *highest = kilobytes("/proc/self/status", "VmHWM");
}

void machine_forget_highest(void)
{
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (f) {
        fprintf(f, "5"); /* proc(5): reset the peak */
        fclose(f);
    }
}

double machine_load(void)
{
    double load = 0;
    return getloadavg(&load, 1) == 1 ? load : -1;
}

/* The kernel answers when the text is flushed. */
static bool set_autogroup(int nice)
{
    FILE *f = fopen("/proc/self/autogroup", "w");
    bool good = f && fprintf(f, "%d", nice) > 0;
    return f && fclose(f) == 0 && good;
}

int machine_raise_share(char text[MACHINE_TEXT_BYTES])
{
    char line[LINE_BYTES];
    int before = 0;
    bool own_session = setsid() != (pid_t)-1 || getsid(0) == getpid();
    bool known = find_line("/proc/self/autogroup", "/autogroup-", line) &&
                 sscanf(line, "%*d nice %d", &before) == 1;
    bool group = (own_session || known) && set_autogroup(MOST_NICE);
    bool process = setpriority(PRIO_PROCESS, 0, MOST_NICE) == 0;
    const char *what = own_session ? "a session of its own" : "the session it was started in";
    if (group || process) {
        snprintf(text, MACHINE_TEXT_BYTES, "raised: nice %d for %s%s%s", MOST_NICE,
                 group ? "the autogroup of " : "the process", group ? what : "",
                 group && process ? " and for the process" : "");
    } else {
        snprintf(text, MACHINE_TEXT_BYTES, "not raised: the system refused nice %d (run as root)",
                 MOST_NICE);
    }
    return own_session || !group ? MOST_NICE : before;
}

void machine_lower_share(int before)
{
    if (before != MOST_NICE) {
        set_autogroup(before);
    }
}

void machine_trim(void)
{
    malloc_trim(0);
}
