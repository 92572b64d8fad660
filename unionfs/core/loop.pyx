"""The loop on /dev/fuse: reads requests and answers those that need no decision, between two turns of other tasks.

- Waking up costs far more than answering, so when no request is pending it polls for a short time; how soon
  the next one came determines how long.
- Neither reading nor polling lets other tasks run, so `Channel.next` returns every two milliseconds.
- The interpreter lock is released while it polls.
"""

from cpython.bytearray cimport PyByteArray_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, ENOENT
from libc.errno cimport errno as c_errno
from libc.stdint cimport int64_t
from posix.unistd cimport read

from unionfs.core.answers cimport Answers
from unionfs.core.clock cimport now_ns
from unionfs.core.idling cimport Idling

cdef extern from "<sched.h>" nogil:
    int sched_yield()

#: What `Channel.next` returns besides the size of a request: wait until the device is readable; let other tasks
#: run.
WAIT = 0
FAIR = -1

cdef enum:
    C_WAIT = 0
    C_FAIR = -1
    FAIR_NS = 2_000_000
    MAX_SPIN_NS = 100_000
    MIN_SPIN_NS = 5_000
    # From then on it polls only while no other process wants the CPU. sched_yield(2) makes each read take longer, so
    # the next request of a program that has a CPU of its own should arrive before.
    ALONE_NS = 15_000


def new_buffer(Py_ssize_t size):
    """A buffer of ``size`` bytes of any content. Its pages take memory only when data has been read into them."""
    return PyByteArray_FromStringAndSize(NULL, size)


cdef class Channel:
    """The device of one mount, from which requests are read one at a time."""

    cdef int fd
    cdef Answers answers
    cdef Idling idling
    cdef object watched, buffer
    cdef unsigned char[::1] view
    cdef int64_t fair_until, spin, waiting_since

    def __init__(self, int fd, Answers answers not None, watched, Idling idling=None):
        """``watched``: whether requests are measured, so that `next` returns all of them. ``idling`` keeps CPUs
        awake."""
        self.fd, self.answers, self.watched, self.idling = fd, answers, watched, idling
        self.spin = MIN_SPIN_NS

    @property
    def polls_ns(self):
        """How long it polls now, in nanoseconds."""
        return self.spin

    @property
    def holds(self):
        """Whether CPUs are kept awake, until :meth:`let_go`."""
        return self.idling is not None and self.idling.held

    def let_go(self):
        """Let CPUs become idle."""
        if self.idling is not None:
            self.idling.let_go()

    def read_into(self, buffer not None):
        """Read requests into a buffer from now on. One must fit the largest request."""
        self.view = buffer
        self.buffer = buffer

    def answer(self, Py_ssize_t size):
        """Answer the request in the buffer; returns False if Python must."""
        return bool(self.answers.answer(<const char *>&self.view[0], size))

    def again(self, message, memo):
        """Answer a request that was put aside; see `Answers.again`."""
        return self.answers.again(message, memo)

    def memo_of_last(self):
        """The memo of the request in the buffer; see `Answers.memo_of_last`."""
        return self.answers.memo_of_last()

    def renew_memo(self):
        """See `Answers.renew_memo`."""
        self.answers.renew_memo()

    def puts_aside(self):
        """From now on put requests aside that need slow layers."""
        self.answers.puts_aside()

    def rested(self):
        """Record that other tasks have run."""
        self.fair_until = now_ns() + FAIR_NS

    def waited(self):
        """The device is readable, after `next` returned WAIT."""
        # Whether the request would have arrived during a longer poll.
        if now_ns() - self.waiting_since < MAX_SPIN_NS:
            self.spin = min(self.spin * 2, MAX_SPIN_NS)
        else:
            self.spin = max(self.spin // 2, MIN_SPIN_NS)
        self.rested()

    def next(self):
        """Answer requests until Python must do something: the size of a request in the buffer, WAIT or FAIR.

        Raises ``OSError`` of read(2): see fs/fuse/dev.c, fuse_dev_do_read.
        """
        cdef ssize_t size
        cdef int64_t spin_end = 0, now = now_ns()
        cdef char *buffer = <char *>&self.view[0]
        cdef size_t room = self.view.shape[0]
        while True:
            if now > self.fair_until:
                return C_FAIR
            size = read(self.fd, buffer, room)
            if size < 0 and c_errno == EAGAIN:
                now = now_ns()
                spin_end = min(now + self.spin, self.fair_until)
                with nogil:
                    size = self.polled(buffer, room, spin_end)
                if size < 0 and c_errno == EAGAIN:
                    now = now_ns()
                    if now >= self.fair_until:
                        return C_FAIR
                    self.waiting_since = now
                    return C_WAIT
            if size < 0:
                if c_errno == ENOENT or c_errno == EINTR:
                    now = now_ns()
                    continue  # the request was cancelled during the read
                raise OSError(c_errno, "the device cannot be read")
            if self.idling is not None:
                self.idling.request(now)
            if self.watched() or not self.answers.answer(buffer, size):
                return size
            now = now_ns()

    cdef ssize_t polled(self, char *buffer, size_t room, int64_t until) noexcept nogil:
        cdef ssize_t size
        cdef int64_t now, polite = now_ns() + ALONE_NS
        while True:
            size = read(self.fd, buffer, room)
            now = now_ns()
            if size >= 0 or c_errno != EAGAIN or now >= until:
                return size
            if now >= polite:
                sched_yield()
