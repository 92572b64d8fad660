/*
 * small_files create DIR COUNT           make DIR with COUNT files of 1 KiB, a hundred in a directory
 * small_files read DIR COUNT MILLISEC    open, read and close each of them again and again for about that long,
 *                                        at least once; prints nanoseconds a file
 *
 * The first pass over all files is not counted: it fills the caches.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char (*names)[4096];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e9 + time.tv_nsec;
}

static void create(const char *directory, int count) {
    char data[1024];
    memset(data, 'x', sizeof data);
    if (mkdir(directory, 0755) < 0) fail(directory);
    for (int number = 0; number < count; number++) {
        if (number % 100 == 0) {
            char path[4096];
            snprintf(path, sizeof path, "%s/%02d", directory, number / 100);
            if (mkdir(path, 0755) < 0) fail(path);
        }
        int fd = open(names[number], O_WRONLY | O_CREAT | O_EXCL, 0644);
        if (fd < 0) fail(names[number]);
        if (write(fd, data, sizeof data) != sizeof data) fail(names[number]);
        if (close(fd) < 0) fail(names[number]);
    }
}

static void read_all(int count) {
    char data[4096];
    for (int number = 0; number < count; number++) {
        int fd = open(names[number], O_RDONLY);
        if (fd < 0) fail(names[number]);
        if (read(fd, data, sizeof data) <= 0) fail(names[number]);
        close(fd);
    }
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    int count = atoi(argv[3]);
    names = calloc(count, sizeof *names);
    if (!names) fail("calloc");
    for (int number = 0; number < count; number++)
        snprintf(names[number], sizeof *names, "%s/%02d/f%04d", argv[2], number / 100, number);
    if (strcmp(argv[1], "create") == 0) {
        create(argv[2], count);
        return 0;
    }
    if (argc < 5) return 2;
    read_all(count);
    double began = now(), passes = 0;
    do {
        read_all(count);
        passes++;
    } while (now() - began < atof(argv[4]) * 1e6);
    printf("%.1f\n", (now() - began) / passes / count);
    return 0;
}
