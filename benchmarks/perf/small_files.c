/*
 * small_files create DIR COUNT           make DIR with COUNT files of 1 KiB, a hundred per directory
 * small_files read DIR COUNT MILLISEC    open, read and close each of them repeatedly for about that long,
 *                                        at least once; prints nanoseconds per file, and how often all were read
 * small_files lookup DIR COUNT STEP      get the attributes of name0000000, and of each STEP-th name after it
 * small_files absent DIR COUNT           the same for absent names
 * small_files add DIR COUNT              make COUNT empty files in DIR
 *
 * The first pass of read is not counted: it fills the caches. The last three print nanoseconds per name.
 */
#include <errno.h>
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

static void one_directory(const char *what, const char *directory, int count, int step) {
    char path[4096];
    struct stat status;
    double began = now();
    for (int number = 0; number < count; number++) {
        if (strcmp(what, "lookup") == 0) {
            snprintf(path, sizeof path, "%s/name%07d", directory, number * step);
            if (stat(path, &status) < 0) fail(path);
        } else if (strcmp(what, "absent") == 0) {
            snprintf(path, sizeof path, "%s/absent%07d", directory, number);
            if (stat(path, &status) == 0 || errno != ENOENT) fail(path);
        } else {
            snprintf(path, sizeof path, "%s/new%07d", directory, number);
            int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
            if (fd < 0) fail(path);
            close(fd);
        }
    }
    printf("%.1f\n", (now() - began) / count);
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    int count = atoi(argv[3]);
    if (strcmp(argv[1], "create") != 0 && strcmp(argv[1], "read") != 0) {
        one_directory(argv[1], argv[2], count, argc > 4 ? atoi(argv[4]) : 1);
        return 0;
    }
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
    double began = now(), passes = 0, took;
    do {
        read_all(count);
        passes++;
        took = now() - began;
    } while (took < atof(argv[4]) * 1e6);
    printf("%.1f %.0f\n", took / passes / count, passes);
    return 0;
}
