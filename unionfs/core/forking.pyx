"""A process that forks one for each connection to its socket.

The waiting process runs no Python between two forks, so that all forked ones start with the same content in the same
pages, and it does not copy those that it shares with them.
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint32_t
from posix.types cimport gid_t, pid_t, uid_t
from posix.unistd cimport close, fork, geteuid, read

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Parent()
    void PyOS_AfterFork_Child()

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum: SIG_SETMASK, SIG_BLOCK, SIGCHLD, SIGINT, SIGTERM
    int sigemptyset(sigset_t *signals)
    int sigaddset(sigset_t *signals, int number)
    int sigprocmask(int how, const sigset_t *new, sigset_t *old)

cdef extern from "<sys/signalfd.h>" nogil:
    enum: SFD_CLOEXEC, SFD_NONBLOCK
    int signalfd(int fd, const sigset_t *signals, int flags)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    struct pollfd:
        int fd
        short events
        short revents
    int ppoll(pollfd *files, unsigned long count, const timespec *timeout, const sigset_t *mask)

cdef extern from "<sys/wait.h>" nogil:
    enum: WNOHANG
    pid_t waitpid(pid_t pid, int *status, int options)
    bint WIFEXITED(int status)
    int WEXITSTATUS(int status)

cdef extern from "<sys/socket.h>" nogil:
    struct ucred:
        pid_t pid
        uid_t uid
        gid_t gid
    enum: SOL_SOCKET, SO_PEERCRED, SOCK_CLOEXEC
    int accept4(int fd, void *address, uint32_t *size, int flags)
    int getsockopt(int fd, int level, int option, void *value, uint32_t *size)

#: What `Forking.next` returns instead of a connection.
IDLE = -1
REFUSED = -2

cdef enum:
    C_IDLE = -1
    C_REFUSED = -2


cdef class Forking:
    """Forks a process for each connection of this user; others are closed."""

    cdef int listener, first, ended, refusing
    cdef readonly long forked
    """How many processes."""
    cdef sigset_t before, waiting

    def __init__(self, int listener, int first, int refusing):
        """``listener``: a non-blocking socket; ``first``: a connection that is there already.

        ``refusing``: an exit code of a forked process, see ``next``.
        """
        cdef sigset_t child, handled
        sigemptyset(&child)
        sigaddset(&child, SIGCHLD)
        self.listener, self.first, self.refusing = listener, first, refusing
        self.ended = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK)
        if self.ended < 0:
            raise OSError(errno, os.strerror(errno))
        # These come while it waits, so that none is left unnoticed until the next connection.
        handled = child
        sigaddset(&handled, SIGINT)
        sigaddset(&handled, SIGTERM)
        sigprocmask(SIG_BLOCK, &handled, &self.before)
        self.waiting = self.before
        sigaddset(&self.waiting, SIGCHLD)

    def next(self, int timeout):
        """Wait for a connection, and fork. Returns in the forked process the fd of its connection.

        Here it returns IDLE after ``timeout`` milliseconds without a connection, or REFUSED when a forked process has
        ended with that exit code. Signal handlers may raise exceptions.
        """
        cdef pollfd files[2]
        cdef timespec limit
        limit.tv_sec, limit.tv_nsec = timeout // 1000, timeout % 1000 * 1_000_000
        cdef int connection = self.first
        self.first = -1
        while True:
            if connection >= 0 and self.fork_for(connection):
                return connection
            connection = -1
            files[0].fd, files[0].events, files[0].revents = self.listener, POLLIN, 0
            files[1].fd, files[1].events, files[1].revents = self.ended, POLLIN, 0
            if ppoll(files, 2, &limit, &self.waiting) < 0:
                if errno != EINTR:
                    raise OSError(errno, os.strerror(errno))
                PyErr_CheckSignals()
                continue
            if files[1].revents and self.reap():
                return C_REFUSED
            if files[0].revents:
                connection = accept4(self.listener, NULL, NULL, SOCK_CLOEXEC)
            elif not files[1].revents:
                return C_IDLE

    cdef bint fork_for(self, int connection) except -1:
        cdef ucred peer
        cdef uint32_t size = sizeof(ucred)
        cdef pid_t pid
        if getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 or peer.uid != geteuid():
            close(connection)
            return False
        PyOS_BeforeFork()
        pid = fork()
        if pid == 0:
            sigprocmask(SIG_SETMASK, &self.before, NULL)
            PyOS_AfterFork_Child()
            close(self.ended)
            return True
        PyOS_AfterFork_Parent()
        self.forked += 1
        # If there is no process, the other end finds that out now.
        close(connection)
        return False

    cdef bint reap(self) noexcept:
        """Whether one of the processes that have ended had the code."""
        cdef char data[4096]
        cdef int status = 0
        cdef bint found = False
        while read(self.ended, data, sizeof(data)) > 0:
            pass
        while waitpid(-1, &status, WNOHANG) > 0:
            found = found or (WIFEXITED(status) and WEXITSTATUS(status) == self.refusing)
        return found
