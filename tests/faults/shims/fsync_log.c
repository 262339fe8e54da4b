/* After every fsync and fdatasync: a line "<bytes> <path>" in the file FAULT_FSYNC_LOG, with the size of before. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static void note(int fd, long long bytes) {
    const char *log = getenv("FAULT_FSYNC_LOG");
    char link[64], path[PATH_MAX], line[PATH_MAX + 32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (log == NULL || length < 0) return;
    path[length] = 0;
    int size = snprintf(line, sizeof line, "%lld %s\n", bytes, path);
    /* One write, so that a kill leaves whole lines. */
    int out = open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (out < 0 || write(out, line, size) != size) abort();
    close(out);
}

static int sync_and_note(const char *name, int fd) {
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    struct stat before;
    int known = fstat(fd, &before) == 0;
    int result = sync(fd);
    if (result == 0 && known) note(fd, before.st_size);
    return result;
}

int fsync(int fd) { return sync_and_note("fsync", fd); }

int fdatasync(int fd) { return sync_and_note("fdatasync", fd); }
