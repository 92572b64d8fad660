"""The holder: a process that keeps the open files of a daemon, and starts another daemon when that one dies.

It is a child of the daemon that shares its table of open files (CLONE_FILES, clone(2)) but not its memory. So all that
the daemon has open outlives it, under the same numbers: the device, the layers, the locks, the files without a name;
and nothing needs to be sent when one is opened. The memory that the child has from the daemon is given back at once:
what remains is code, a stack, and `State`, some tens of kilobytes.

When the daemon dies, the holder starts another one by fork and execve(2), with a copy of the table. That one has a
holder of its own before it ends this one. After too many deaths within a minute, the holder answers all requests with
EIO.

No function here that runs in the child may use the interpreter, allocate, or use another thread's locks.
"""

import os

from libc.errno cimport EAGAIN, EINTR, ENOENT
from libc.errno cimport errno as c_errno
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport strlen, strncmp, strstr
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap
from posix.signal cimport SIG_BLOCK, SIG_SETMASK, sigemptyset, sigfillset, sigprocmask, sigset_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport _exit, close, execve, read, write

from unionfs.core.state cimport DEATHS, Head, State

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_clone, SYS_getdents64

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)
    int setsid()

cdef extern from "<sched.h>" nogil:
    unsigned long CLONE_FILES

cdef extern from "<signal.h>" nogil:
    int SIGCHLD

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
    int PR_SET_NAME

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *start, size_t size, int advice)
    int MADV_DONTNEED

cdef extern from "<time.h>" nogil:
    int nanosleep(const timespec *time, timespec *left)

cdef enum:
    TEXT = 8192  # of `state`
    MINUTE = 60_000
    NO_PAUSE = 2
    FIRST_PAUSE = 100
    LONGEST_PAUSE = 10_000
    MOST_ARGUMENTS = 64
    MOST_VARIABLES = 1024
    # Around the thread's own variables, among them errno
    OWN = 1 << 16
    LONGEST_REQUEST = (1 << 20) + 65536
    EIO = 5
    NOTIFY_RESEND = 7
    OPCODE_FORGET = 2
    OPCODE_INTERRUPT = 36
    OPCODE_BATCH_FORGET = 42

cdef struct line_reader:
    int fd
    size_t size, at
    char text[4096]

cdef struct in_header:
    uint32_t length, opcode
    uint64_t unique

cdef struct out_header:
    uint32_t length
    int32_t error
    uint64_t unique


def start(State state not None, int watched, int device):
    """Start the holder of this process, of which ``watched`` is a pidfd; returns its pid. ``device``: the fd of
    /dev/fuse. Raises ``OSError``."""
    cdef long pid
    cdef Head *head = state.head
    with nogil:
        pid = syscall(SYS_clone, CLONE_FILES | <unsigned long>SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            hold(head, watched, device)
    if pid < 0:
        raise OSError(c_errno, os.strerror(c_errno))
    return pid


cdef void hold(Head *head, int watched, int device) noexcept nogil:
    """Run the holder; never returns."""
    cdef sigset_t every
    cdef long pid
    cdef int tries = 0  # all but the first ended before they had a holder
    setsid()
    sigfillset(&every)
    sigprocmask(SIG_BLOCK, &every, NULL)
    prctl(PR_SET_NAME, b"unionfs-holder", 0, 0, 0)
    give_memory_back()
    await_death(watched)
    while not head.ended:
        if head.exchanged:
            head.exchanged = 0
        elif too_often(head, tries):
            head.failed = 1
        tries += 1
        pid = syscall(SYS_clone, <unsigned long>SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            begin_anew(head)
        if pid < 0 or waitpid(<int>pid, NULL, 0) < 0:
            sleep_for(FIRST_PAUSE)
        if head.failed:  # the last one has only logged that
            refuse_all(device)
            break
    _exit(0)


cdef void await_death(int watched) noexcept nogil:
    cdef pollfd waited
    waited.fd, waited.events, waited.revents = watched, POLLIN, 0
    while poll(&waited, 1, -1) <= 0:
        pass


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
            number = <int>number_in(entries + at + 19, 10, NULL)
            if number > 2:
                fcntl(number, F_SETFD, 0)
            at += (<unsigned short *>(entries + at + 16))[0]
    close(fd)


# -- memory ---------------------------------------------------------------------------------------------------


cdef void give_memory_back() noexcept nogil:
    """Give back the private memory that this process has from its parent, but for what it goes on to use: its stack,
    the thread's own variables, and those of libc and of this module. See proc_pid_maps(5)."""
    cdef line_reader maps
    cdef char line[1024]
    cdef char *at
    cdef size_t start, end, own = <size_t>&c_errno, here
    here = <size_t>&line
    maps.fd = open(b"/proc/self/maps", O_RDONLY | O_CLOEXEC)
    maps.size = maps.at = 0
    if maps.fd < 0:
        return
    while next_line(&maps, line, sizeof(line)):
        start = number_in(line, 16, &at)
        end = number_in(at + 1, 16, &at)
        if strncmp(at, b" rw-p", 5) != 0 or start <= here < end or is_used(at):
            continue
        if start < own + OWN and own - OWN < end:
            if own - OWN > start:
                give_back(start, own - OWN)
            if own + OWN < end:
                give_back(own + OWN, end)
        else:
            give_back(start, end)
    close(maps.fd)


cdef size_t number_in(char *text, size_t base, char **rest) noexcept nogil:
    """The number at the beginning of a text, and what follows; strtoul(3) depends on the locale's memory."""
    cdef size_t number = 0
    while True:
        if c'0' <= text[0] <= c'9':
            number = number * base + <size_t>(text[0] - c'0')
        elif base == 16 and c'a' <= text[0] <= c'f':
            number = number * base + <size_t>(text[0] - c'a' + 10)
        else:
            if rest != NULL:
                rest[0] = text
            return number
        text += 1


cdef bint is_used(const char *line) noexcept nogil:
    """Whether it is the memory of code that goes on to run; ``line``: the rest of the mapping's line."""
    if strstr(line, b"[") != NULL:
        return strstr(line, b"[heap]") == NULL
    return (
        strstr(line, b"/libc.so") != NULL or strstr(line, b"/libc-") != NULL or strstr(line, b"/ld-") != NULL
        or strstr(line, b"/holder.") != NULL
    )


cdef void give_back(size_t start, size_t end) noexcept nogil:
    cdef size_t first = (start + 4095) & ~<size_t>4095, last = end & ~<size_t>4095
    if first < last:
        madvise(<void *>first, last - first, MADV_DONTNEED)


cdef bint next_line(line_reader *reader, char *line, size_t room) noexcept nogil:
    """The next line of a file, cut off if it is longer; False at the end."""
    cdef size_t length = 0
    cdef ssize_t size
    cdef char letter
    while True:
        if reader.at == reader.size:
            size = read(reader.fd, reader.text, sizeof(reader.text))
            if size <= 0:
                return False
            reader.size, reader.at = size, 0
        letter = reader.text[reader.at]
        reader.at += 1
        if letter == c'\n':
            line[length] = 0
            return True
        if length + 1 < room:
            line[length] = letter
            length += 1


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
