/* A slow disk: fsync and fdatasync take FAULT_FSYNC_MS milliseconds longer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

static void wait_first(void) {
    const char *given = getenv("FAULT_FSYNC_MS");
    long left_ms = given ? atol(given) : 0;
    struct timespec pause = {left_ms / 1000, left_ms % 1000 * 1000000};
    nanosleep(&pause, NULL);
}

/* The next one in line, so that several of these libraries can be preloaded. */
static int next_sync(const char *name, int fd) {
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return sync(fd);
}

int fsync(int fd) {
    wait_first();
    return next_sync("fsync", fd);
}

int fdatasync(int fd) {
    wait_first();
    return next_sync("fdatasync", fd);
}
