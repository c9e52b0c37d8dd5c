/* Preloaded into a Redis or Valkey server: after every fsync or fdatasync of its append-only file, the size that the
   file had when the call began stands in the file that SYNCED_SIZE names, as 8 bytes. What lies behind that size may
   be lost when the power goes. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_append_only_file(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, ".incr.aof") != NULL;
}

static int synced(int fd, const char *name) {
    int (*call)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    struct stat before;
    int is_known = fstat(fd, &before) == 0;
    int result = call(fd);
    if (result == 0 && is_known && is_append_only_file(fd)) {
        int64_t size = before.st_size;
        int out = open(getenv("SYNCED_SIZE"), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        if (out < 0 || pwrite(out, &size, sizeof size, 0) != sizeof size) abort();
        close(out);
    }
    return result;
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }
