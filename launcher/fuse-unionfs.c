/* The command fuse-unionfs: hands its call to a process that has everything imported.
 *
 * Starting Python and importing the daemon takes most of the time of a mount. So the call goes to the *resident*
 * (unionfs/daemon/resident.py), a process of the same user in the same namespaces, which forks the daemon. If there is
 * none, it is started, and stays. Whatever goes wrong before the resident has accepted the call, this process becomes
 * the command in Python itself, `unionfs --launched-as PROGRAM ARGUMENT...`, with the same result.
 *
 * It is built into one file, without a library, and trusts only a runtime directory and a socket of its own user.
 * The messages are described in unionfs/daemon/handover.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

#define MAGIC 0x31534655u /* "UFS1" */
#define ACCEPT_MS 5000    /* until a running resident accepts a call */
#define START_MS 20000    /* until one that is being started does */
#define STEP_MS 5
#define SETTING "UNIONFS_RESIDENT_SECONDS"

/* The fds of a resident that is started: unionfs/daemon/resident.py */
enum { CONNECTION = 3, DIRECTORY = 4, LOCK = 5 };

struct header {
    uint32_t magic, length, arguments, variables, umask;
};

extern char **environ;

static char self[PATH_MAX];     /* this program, symlinks resolved */
static char sibling[PATH_MAX];  /* the command `unionfs` beside it */
static char identity[64];       /* of this file: another after an upgrade */
static char name[40];           /* of the resident's files in the runtime directory */
static char **arguments;

/* Become the command in Python. */
static void run_here(void)
{
    size_t count = 0;
    while (arguments[count])
        count++;
    char **words = calloc(count + 4, sizeof *words);
    if (words) {
        const char *program = strrchr(arguments[0], '/');
        words[0] = sibling;
        words[1] = "--launched-as";
        words[2] = (char *)(program ? program + 1 : arguments[0]);
        memcpy(words + 3, arguments + 1, count * sizeof *words); /* with the NULL */
        if (*sibling)
            execv(sibling, words);
        if (!*sibling || errno == ENOENT) {
            words[0] = "unionfs";
            execvp("unionfs", words);
        }
    }
    dprintf(2, "fuse-unionfs: the command unionfs cannot be started (%s): it belongs beside %s; install unionfs again.\n",
            strerror(errno), *self ? self : "fuse-unionfs");
    exit(1);
}

static uint64_t mixed(uint64_t hash, const void *data, size_t size) /* FNV-1a */
{
    for (const unsigned char *at = data; size--; at++)
        hash = (hash ^ *at) * 0x100000001b3u;
    return hash;
}

/* Find this file, the command beside it, and the name of the resident of this installation in these namespaces. */
static int find_names(void)
{
    static const char *const kinds[] = {"user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"};
    struct stat st;
    ssize_t size = readlink("/proc/self/exe", self, sizeof self - 1);
    if (size <= 0)
        return -1;
    self[size] = 0;
    char *end = strrchr(self, '/');
    if (!end || (size_t)(end - self) + sizeof "/unionfs" > sizeof sibling)
        return -1;
    memcpy(sibling, self, end - self);
    strcpy(sibling + (end - self), "/unionfs");
    if (access(sibling, X_OK) != 0) {
        *sibling = 0;
        return -1;
    }
    if (stat(self, &st) != 0)
        return -1;
    snprintf(identity, sizeof identity, "%lx.%lx.%lx.%lx.%lx", (long)st.st_dev, (long)st.st_ino, (long)st.st_size,
             (long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    uint64_t hash = mixed(0xcbf29ce484222325u, self, size);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char path[32];
        snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i]);
        uint64_t number = stat(path, &st) == 0 ? st.st_ino : 0;
        if (number == 0 && i < 2)
            return -1; /* without /proc */
        hash = mixed(hash, &number, sizeof number);
    }
    snprintf(name, sizeof name, "resident-%016lx", (unsigned long)hash);
    return 0;
}

/* Open one runtime directory, and check it as RuntimeDirectory of unionfs/daemon/runtime.py does. */
static int open_directory(const char *path)
{
    struct stat st;
    mkdir(path, 0700);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) != 0 || st.st_uid != geteuid() || st.st_mode & 022 || fchmod(fd, 0700) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Open the runtime directory: the first usable of `candidates()` in unionfs/daemon/runtime.py, in the same order. */
static int runtime_directory(void)
{
    char path[PATH_MAX];
    unsigned long uid = geteuid();
    unsigned long inside, outside, count;
    int initial = 1, fd;
    FILE *map = fopen("/proc/self/uid_map", "re");
    if (map) {
        unsigned long mapped = uid;
        for (int line = 0; fscanf(map, "%lu %lu %lu", &inside, &outside, &count) == 3; line++) {
            initial = initial && line == 0 && inside == 0 && outside == 0 && count == 4294967295u;
            if (inside <= uid && uid < inside + count)
                mapped = outside + uid - inside;
        }
        fclose(map);
        uid = mapped;
    }
    if (geteuid() == 0 && initial) {
        fd = open_directory("/run/unionfs");
        return fd >= 0 ? fd : open_directory("/tmp/unionfs-0");
    }
    const char *chosen = getenv("XDG_RUNTIME_DIR");
    if (chosen && *chosen == '/' && snprintf(path, sizeof path, "%s/unionfs", chosen) < (int)sizeof path &&
        (fd = open_directory(path)) >= 0)
        return fd;
    snprintf(path, sizeof path, "/run/user/%lu", uid);
    struct stat st;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) {
        strcat(path, "/unionfs");
        if ((fd = open_directory(path)) >= 0)
            return fd;
    }
    if (initial || uid != 0) {
        snprintf(path, sizeof path, "/tmp/unionfs-%lu", uid);
        if ((fd = open_directory(path)) >= 0 || initial)
            return fd;
    }
    if (stat("/proc/self/ns/user", &st) != 0)
        return -1;
    snprintf(path, sizeof path, "/tmp/unionfs-%lu-userns-%lu", uid, (unsigned long)st.st_ino);
    return open_directory(path);
}

/* Connect to the resident; -1 if there is none, or it is not this user's. */
static int connect_to(int directory)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t size = sizeof peer;
    snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s.sock", directory, name);
    /* Non-blocking: with a full queue it fails instead of waiting for a resident that is stopped. */
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.uid != geteuid()) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Move fds to CONNECTION, DIRECTORY and LOCK, close all others, and become the resident. */
static void become_resident(int connection, int directory, int lock)
{
    sigset_t none;
    int high[3] = {fcntl(connection, F_DUPFD_CLOEXEC, 16), fcntl(directory, F_DUPFD_CLOEXEC, 16),
                   fcntl(lock, F_DUPFD_CLOEXEC, 16)};
    int null = open("/dev/null", O_RDWR);
    if (null < 0 || chdir("/") != 0)
        _exit(127);
    for (int fd = 0; fd < 3; fd++) {
        dup2(null, fd);
        if (dup2(high[fd], CONNECTION + fd) < 0)
            _exit(127);
    }
    syscall(SYS_close_range, LOCK + 1, ~0u, 0);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execl(sibling, sibling, "--resident", name, identity, NULL);
    _exit(127);
}

/* Start a resident whose first connection is this call, or connect to the one that another call starts meanwhile. */
static int start(int directory, int *fresh)
{
    char path[64];
    struct stat st;
    int lock = -1, pair[2], fd;
    snprintf(path, sizeof path, "%s.lock", name);
    for (int waited = 0; waited < START_MS; waited += STEP_MS) {
        if (lock < 0)
            lock = openat(directory, path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
        if (lock < 0 || fstat(lock, &st) != 0 || !S_ISREG(st.st_mode) || st.st_uid != geteuid())
            return -1;
        if (flock(lock, LOCK_EX | LOCK_NB) == 0) {
            if (fstat(lock, &st) == 0 && st.st_nlink > 0)
                break;
            close(lock); /* its resident has removed it */
            lock = -1;
            continue;
        }
        if ((fd = connect_to(directory)) >= 0) {
            close(lock);
            return fd;
        }
        poll(NULL, 0, STEP_MS);
    }
    if (lock < 0)
        return -1;
    if ((fd = connect_to(directory)) >= 0) {
        close(lock);
        return fd;
    }
    if (flock(lock, LOCK_EX | LOCK_NB) != 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
        close(lock);
        return -1;
    }
    pid_t child = fork();
    if (child == 0) {
        /* A grandchild in a session of its own: nobody waits for it. */
        if (setsid() < 0 || (child = fork()) != 0)
            _exit(child < 0);
        become_resident(pair[1], directory, lock);
    }
    close(pair[1]);
    close(lock); /* the resident holds it until it listens */
    if (child < 0 || waitpid(child, NULL, 0) < 0) {
        close(pair[0]);
        return -1;
    }
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
    *fresh = 1;
    return pair[0];
}

static int send_all(int fd, const void *data, size_t size, int *fds, size_t count)
{
    char control[CMSG_SPACE(4 * sizeof(int))] = {0};
    while (size) {
        struct iovec part = {(void *)data, size};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        if (count) {
            message.msg_control = control;
            message.msg_controllen = CMSG_SPACE(count * sizeof *fds);
            struct cmsghdr *head = CMSG_FIRSTHDR(&message);
            head->cmsg_level = SOL_SOCKET;
            head->cmsg_type = SCM_RIGHTS;
            head->cmsg_len = CMSG_LEN(count * sizeof *fds);
            memcpy(CMSG_DATA(head), fds, count * sizeof *fds);
        }
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            struct pollfd ready = {fd, POLLOUT, 0};
            if (poll(&ready, 1, START_MS) <= 0)
                return -1;
            continue;
        }
        if (sent < 0 && errno != EINTR)
            return -1;
        if (sent > 0) {
            data = (const char *)data + sent;
            size -= sent;
            count = 0;
        }
    }
    return 0;
}

/* Send the call: the header; then identity, arguments and environment, each ending in a zero byte. */
static int send_call(int fd)
{
    struct header header = {.magic = MAGIC};
    header.umask = umask(077);
    umask(header.umask);
    size_t length = strlen(identity) + 1;
    for (; arguments[header.arguments]; header.arguments++)
        length += strlen(arguments[header.arguments]) + 1;
    for (; environ[header.variables]; header.variables++)
        length += strlen(environ[header.variables]) + 1;
    char *text = malloc(length), *end = text;
    if (!text || length > UINT32_MAX)
        return -1;
    header.length = length;
    end = stpcpy(end, identity) + 1;
    for (char **word = arguments; *word; word++)
        end = stpcpy(end, *word) + 1;
    for (char **word = environ; *word; word++)
        end = stpcpy(end, *word) + 1;
    int sent = send_all(fd, &header, sizeof header, NULL, 0) == 0 && send_all(fd, text, length, NULL, 0) == 0;
    free(text);
    return sent ? 0 : -1;
}

/* Receive one byte, and an fd if one comes with it. Returns 0 at the end of the connection. */
static int receive(int fd, int *handle)
{
    char byte, control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t size;
    do
        size = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    while (size < 0 && errno == EINTR);
    if (size <= 0)
        return 0;
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    if (head && head->cmsg_type == SCM_RIGHTS && handle)
        memcpy(handle, CMSG_DATA(head), sizeof *handle);
    return (unsigned char)byte;
}

/* End as a process that this signal ends. */
static void die_by(int number)
{
    sigset_t one;
    signal(number, SIG_DFL);
    raise(number);
    sigemptyset(&one);
    sigaddset(&one, number);
    sigprocmask(SIG_UNBLOCK, &one, NULL);
    exit(128 + number);
}

/* Hand the call over and exit with its code. Returns 'N' if it is to be run here, 'S' if the resident is outdated. */
static int hand_over(int fd, int fresh)
{
    static const int forwarded[] = {SIGINT, SIGTERM, SIGHUP};
    sigset_t wanted, before;
    struct pollfd ready = {fd, POLLIN, 0};
    int process = -1, last = 0;
    if (send_call(fd) != 0 || poll(&ready, 1, fresh ? START_MS : ACCEPT_MS) <= 0)
        return 'N';
    int answer = receive(fd, &process);
    if (answer != 'A' || process < 0)
        return answer == 'S' ? 'S' : 'N';
    sigemptyset(&wanted);
    for (size_t i = 0; i < sizeof forwarded / sizeof *forwarded; i++) {
        struct sigaction action;
        sigaction(forwarded[i], NULL, &action);
        if (action.sa_handler != SIG_IGN)
            sigaddset(&wanted, forwarded[i]);
    }
    sigprocmask(SIG_BLOCK, &wanted, &before);
    int signals = signalfd(-1, &wanted, SFD_CLOEXEC);
    /* Only now: a resident that does not answer must not keep open what the caller's caller waits for. */
    int files[4] = {open(".", O_PATH | O_DIRECTORY | O_CLOEXEC), 0, 1, 2};
    if (signals < 0 || files[0] < 0 || send_all(fd, "G", 1, files, 4) != 0) {
        sigprocmask(SIG_SETMASK, &before, NULL);
        return 'N';
    }
    for (;;) {
        struct pollfd sources[2] = {{fd, POLLIN, 0}, {signals, POLLIN, 0}};
        if (poll(sources, 2, -1) < 0)
            continue;
        if (sources[1].revents & POLLIN) {
            struct signalfd_siginfo found;
            if (read(signals, &found, sizeof found) == sizeof found) {
                last = found.ssi_signo;
                syscall(SYS_pidfd_send_signal, process, last, NULL, 0);
            }
        }
        if (!sources[0].revents)
            continue;
        answer = receive(fd, NULL);
        if (answer == 'R') {
            poll(&ready, 1, START_MS);
            int code = receive(fd, NULL);
            if (code == 0 && last) {
                /* The mount was usable before the daemon noticed the signal, and it ends now. */
                struct pollfd ended = {process, POLLIN, 0};
                poll(&ended, 1, START_MS);
                dprintf(2, "fuse-unionfs: mounting was interrupted; try again.\n");
                code = 1;
            }
            exit(code);
        }
        if (answer == 'N') {
            sigprocmask(SIG_SETMASK, &before, NULL);
            return 'N';
        }
        if (last)
            die_by(last);
        dprintf(2, "fuse-unionfs: the process that was mounting was killed; try again.\n");
        exit(1);
    }
}

int main(int argc, char **argv)
{
    const char *setting = getenv(SETTING);
    arguments = argv;
    if (argc < 1)
        return 1;
    for (int fd = 0; fd < 3; fd++) /* no later file gets the number of a standard stream */
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            return 1;
    if (find_names() != 0 || getauxval(AT_SECURE) || (setting && strcmp(setting, "0") == 0))
        run_here();
    int directory = runtime_directory();
    /* An outdated resident ends, and another one is started. */
    for (int waited = 0; directory >= 0 && waited < ACCEPT_MS; waited += STEP_MS) {
        int fresh = 0, fd = connect_to(directory);
        if (fd < 0)
            fd = start(directory, &fresh);
        if (fd < 0 || hand_over(fd, fresh) != 'S' || fresh)
            break;
        close(fd);
        poll(NULL, 0, STEP_MS);
    }
    run_here();
}
