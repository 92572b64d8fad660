"""The holder: a process that keeps the open files of a daemon, and starts another daemon when that one dies.

It is forked from the daemon before that opens anything, and shares its table of open files (CLONE_FILES, clone(2)). So
all that the daemon opens outlives it, under the same numbers: the device, the layers, the locks, the files without a
name; and nothing needs to be sent when one is opened.

When the daemon dies, the holder forks another one, with a copy of the table: it has the interpreter and all modules, and
so it serves soon. If two of them die before they have a holder of their own in charge, or if the installed version is
to serve, the next one is started by execve(2). After too many deaths within a minute, the holder answers all requests
with EIO.

Where no other daemon can go on with a mount, the holder closes all files (``Head.device`` is -1), and each daemon that
it starts mounts the union anew; the holder stays in charge.

Of two holders, that of the daemon which took over and that which started it, one is in charge, `Head.holder`.

A daemon that is killed is dead when its first thread is, which is the parent of the holder: other threads may be in a
call that a filesystem's server has and does not answer. They return into no program any more.

The holder waits in here, with all signals blocked, and no function of the waiting uses the interpreter.
"""

import os

from libc.errno cimport EAGAIN, EINTR, ENOENT
from libc.errno cimport errno as c_errno
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport strlen
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap
from posix.signal cimport SIG_BLOCK, SIG_SETMASK, sigaddset, sigemptyset, sigfillset, sigprocmask, sigset_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport _exit, close, execve, fork, getpid, read, write

from unionfs.core.state cimport DEATHS, Head, State

cdef extern from "Python.h":
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Parent()
    void PyOS_AfterFork_Child()

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_clone, SYS_close_range, SYS_getdents64

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)
    int setsid()

cdef extern from "<sched.h>" nogil:
    unsigned long CLONE_FILES

cdef extern from "<signal.h>" nogil:
    int SIGCHLD, SIGUSR1
    int sigwaitinfo(const sigset_t *signals, void *information)

cdef extern from "<fcntl.h>" nogil:
    int O_RDONLY, O_CLOEXEC, O_DIRECTORY, F_SETFD
    int open(const char *path, int flags, ...)
    int fcntl(int fd, int command, ...)

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events, revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    short POLLIN

cdef extern from "<sys/wait.h>" nogil:
    int waitpid(int pid, int *status, int options)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    int PR_SET_NAME, PR_GET_NAME, PR_SET_PDEATHSIG

cdef extern from "<time.h>" nogil:
    int nanosleep(const timespec *time, timespec *left)

cdef enum:
    TEXT = 8192  # of `state`
    MINUTE = 60_000
    NO_PAUSE = 2
    FIRST_PAUSE = 100
    LONGEST_PAUSE = 10_000
    SERVED = 10_000
    MOST_ARGUMENTS = 64
    MOST_VARIABLES = 1024
    NAME = 16
    LONGEST_REQUEST = (1 << 20) + 65536
    EIO = 5
    NOTIFY_RESEND = 7
    OPCODE_FORGET = 2
    OPCODE_INTERRUPT = 36
    OPCODE_BATCH_FORGET = 42

cdef struct in_header:
    uint32_t length, opcode
    uint64_t unique

cdef struct out_header:
    uint32_t length
    int32_t error
    uint64_t unique


def share():
    """Fork a child that shares the table of open files; returns its pid, 0 in the child. Only a process with one thread
    may call it. Raises ``OSError``."""
    cdef long pid
    cdef int code
    PyOS_BeforeFork()
    pid = syscall(SYS_clone, CLONE_FILES | <unsigned long>SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        PyOS_AfterFork_Child()
        return 0
    code = c_errno
    PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(code, os.strerror(code))
    return pid


def hold(State state not None, int watched):
    """Be the holder of the process of which ``watched`` is a pidfd. Returns in another daemon."""
    cdef sigset_t every, before
    cdef char name[NAME]
    setsid()
    sigfillset(&every)
    sigprocmask(SIG_BLOCK, &every, &before)
    prctl(PR_GET_NAME, name, 0, 0, 0)
    prctl(PR_SET_NAME, b"unionfs-holder", 0, 0, 0)
    await_death(watched)
    if state.head.device < 0:
        close_all_but(state.fd)
    start_others(state.head)
    prctl(PR_SET_NAME, name, 0, 0, 0)
    sigprocmask(SIG_SETMASK, &before, NULL)


cdef void start_others(Head *head) noexcept:
    """Start one daemon after the other while this holder is in charge. Returns in a daemon alone."""
    cdef int pid, tries = 0  # all but the first died before they had a holder in charge
    cdef bint anew
    cdef int64_t began
    while head.holder == getpid() and not head.ended:
        anew = tries > 1 or head.exchanged
        if head.exchanged:
            head.exchanged = 0
        elif too_often(head, tries):
            head.failed = 1
        tries += 1
        began = now_ms()
        PyOS_BeforeFork()
        pid = fork()
        if pid == 0:
            if anew:
                begin_anew(head)
            PyOS_AfterFork_Child()
            return
        PyOS_AfterFork_Parent()
        if pid < 0 or waitpid(pid, NULL, 0) < 0:
            sleep_for(FIRST_PAUSE)
        if head.device < 0 and now_ms() - began > SERVED:  # its mount had this holder
            tries = 0
        if head.failed:  # the last one has only logged that
            refuse_all(head.device)
            break
    _exit(0)


cdef void await_death(int watched) noexcept nogil:
    """Wait until the first thread of the daemon has ended. The signal is blocked."""
    cdef pollfd waited
    cdef sigset_t told
    sigemptyset(&told)
    sigaddset(&told, SIGUSR1)
    prctl(PR_SET_PDEATHSIG, SIGUSR1, 0, 0, 0)
    waited.fd, waited.events, waited.revents = watched, POLLIN, 0
    if poll(&waited, 1, 0) <= 0:  # else it has ended before the signal was asked for
        while sigwaitinfo(&told, NULL) != SIGUSR1:
            pass
    prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)


cdef void close_all_but(int kept) noexcept nogil:
    """Close all files but the standard ones and ``kept``, an fd above those."""
    syscall(SYS_close_range, 3, kept - 1, 0)
    syscall(SYS_close_range, kept + 1, ~<unsigned int>0, 0)


cdef int64_t now_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000 + now.tv_nsec // 1_000_000


cdef void sleep_for(int64_t milliseconds) noexcept nogil:
    cdef timespec time
    time.tv_sec, time.tv_nsec = milliseconds // 1000, milliseconds % 1000 * 1_000_000
    nanosleep(&time, NULL)


cdef bint too_often(Head *head, int tries) noexcept nogil:
    """Record a death. Returns whether it is one too many within a minute, else pauses the longer the more there were,
    or the more daemons did not get as far as serving."""
    cdef int64_t now = now_ms(), pause
    cdef uint32_t index, recent = 0
    head.deaths[head.count % DEATHS] = now
    head.count += 1
    head.died += 1
    for index in range(<uint32_t>DEATHS):
        if head.deaths[index] and now - head.deaths[index] < MINUTE:
            recent += 1
    if head.limit and recent >= head.limit:
        return True
    if not head.limit:  # deaths are expected
        recent = 0
    if tries > <int>recent:
        recent = <uint32_t>tries
    if recent > NO_PAUSE:
        pause = <int64_t>FIRST_PAUSE << min(recent - NO_PAUSE - 1, <uint32_t>10)
        sleep_for(pause if pause < LONGEST_PAUSE else LONGEST_PAUSE)
    return False


# -- another daemon -------------------------------------------------------------------------------------------


cdef void begin_anew(Head *head) noexcept nogil:
    """Become another daemon; never returns."""
    cdef char *arguments[MOST_ARGUMENTS + 1]
    cdef char *variables[MOST_VARIABLES + 1]
    cdef char *text = <char *>head + TEXT + head.text
    cdef sigset_t none
    keep_files_open()
    split(text, head.arguments, arguments, MOST_ARGUMENTS)
    split(text + head.arguments, head.variables, variables, MOST_VARIABLES)
    sigemptyset(&none)
    sigprocmask(SIG_SETMASK, &none, NULL)
    if arguments[0] != NULL:
        execve(arguments[0], arguments, variables)
    _exit(127)


cdef void split(char *text, size_t size, char **words, size_t most) noexcept nogil:
    cdef char *end = text + size
    cdef size_t count = 0
    while text < end and count < most:
        words[count] = text
        count += 1
        text += strlen(text) + 1
    words[count] = NULL


cdef void keep_files_open() noexcept nogil:
    """Let execve(2) keep all open files: the other daemon closes those that it does not need."""
    cdef char entries[8192]
    cdef long size, at
    cdef int fd = open(b"/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC), number
    if fd < 0:
        return
    while True:
        size = syscall(SYS_getdents64, fd, entries, sizeof(entries))
        if size <= 0:
            break
        at = 0
        while at < size:  # struct linux_dirent64, getdents(2)
            number = number_in(entries + at + 19)
            if number > 2:
                fcntl(number, F_SETFD, 0)
            at += (<unsigned short *>(entries + at + 16))[0]
    close(fd)


cdef int number_in(const char *text) noexcept nogil:
    """The number that a text is; 0 if it is none."""
    cdef int number = 0
    while c'0' <= text[0] <= c'9':
        number = number * 10 + (text[0] - c'0')
        text += 1
    return number


# -- the end --------------------------------------------------------------------------------------------------


cdef void refuse_all(int device) noexcept nogil:
    """Answer every request with EIO, until the mount is gone."""
    cdef void *mapped = mmap(NULL, LONGEST_REQUEST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef in_header *request = <in_header *>mapped
    cdef out_header answer
    cdef pollfd waited
    cdef ssize_t size
    if mapped == MAP_FAILED:
        return
    answer.length, answer.error, answer.unique = sizeof(answer), NOTIFY_RESEND, 0
    write(device, &answer, sizeof(answer))
    while True:
        size = read(device, mapped, LONGEST_REQUEST)
        if size < 0:
            if c_errno == EAGAIN:
                waited.fd, waited.events, waited.revents = device, POLLIN, 0
                poll(&waited, 1, -1)
            elif c_errno != EINTR and c_errno != ENOENT:
                return
            continue
        if request.opcode in (OPCODE_FORGET, OPCODE_BATCH_FORGET, OPCODE_INTERRUPT):
            continue
        answer.length, answer.error, answer.unique = sizeof(answer), -EIO, request.unique
        write(device, &answer, sizeof(answer))
