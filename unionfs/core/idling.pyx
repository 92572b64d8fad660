"""Keeps CPUs from idle states that take long to leave, while requests come thick.

The client of a FUSE mount sleeps while its request is served. If its CPU becomes idle meanwhile, waking it takes 15
to 50 µs in a virtual machine and with deep idle states, more than the request itself. Holding a latency of 0 by
/dev/cpu_dma_latency (Documentation/power/pm_qos_interface.rst) makes idle CPUs poll instead. It works where there is a
cpuidle driver; in a virtual machine, haltpoll.

All idle CPUs poll, so it is held only during a burst of requests, on hosts with few CPUs, and not while more is
runnable than there are CPUs. The kernel ends it when the daemon dies.
"""

import os

from libc.stdint cimport int32_t
from libc.stdio cimport FILE, fclose, fopen, fscanf
from posix.unistd cimport close, write

DEVICE = "/dev/cpu_dma_latency"
#: With more CPUs it is never held.
MOST_CPUS = 16

cdef enum:
    # So many requests with less than that between two (ns) are a burst; each longer gap counts against some.
    THICK = 16
    THICKEST = 64
    LATE = 8
    GAP_NS = 300_000
    # How often to ask whether others want the CPUs (ns).
    BUSY_NS = 100_000_000
    # PM_QOS_CPU_LATENCY_DEFAULT_VALUE, include/linux/pm_qos.h
    ANY_LATENCY = 2_000_000_000

cdef int CPUS = os.cpu_count() or 1


cdef bint others_want_cpus() noexcept nogil:
    """Whether more tasks are runnable than there are CPUs; proc_loadavg(5)."""
    cdef FILE *file = fopen("/proc/loadavg", "re")
    cdef int running = 0, found
    if file == NULL:
        return True
    found = fscanf(file, "%*f %*f %*f %d/", &running)
    fclose(file)
    return found != 1 or running > CPUS


cdef class Idling:
    """Keeps CPUs awake for the requests of one mount."""

    # held: whether it does now.

    def __init__(self, device=DEVICE, int most_cpus=MOST_CPUS):
        """Does nothing where the device cannot be opened: only root may."""
        self.fd = -1
        if CPUS <= most_cpus:
            try:
                self.fd = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
            except OSError:
                pass

    @property
    def possible(self):
        """Whether it can."""
        return self.fd >= 0

    cdef void request(self, int64_t now) noexcept:
        """A request was read at ``now`` (ns)."""
        if self.fd < 0:
            return
        if now - self.last < GAP_NS:
            self.thick = min(self.thick + 1, THICKEST)
        else:
            self.thick = max(self.thick - LATE, 0)
        self.last = now
        if self.held:
            if self.thick == 0 or (now >= self.not_before and not self.may_hold(now)):
                self.release()
        elif self.thick >= THICK and now >= self.not_before and self.may_hold(now):
            self.held = self.set(0)

    cdef bint may_hold(self, int64_t now) noexcept:
        """Whether no others want the CPUs; asked again later."""
        self.not_before = now + BUSY_NS
        return not others_want_cpus()

    cdef bint set(self, int32_t latency) noexcept:
        return write(self.fd, &latency, sizeof(latency)) == sizeof(latency)

    cdef void release(self) noexcept:
        self.set(ANY_LATENCY)
        self.held, self.thick = False, 0

    def let_go(self):
        """The burst is over."""
        if self.held:
            self.release()

    def close(self):
        """Stop for good."""
        if self.fd >= 0:
            close(self.fd)
        self.fd, self.held = -1, False
