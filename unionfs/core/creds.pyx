"""Creating files as another user while keeping the daemon's capabilities; see `sys.creds`."""

from libc.string cimport memcpy

cdef extern from "<sys/fsuid.h>" nogil:
    int setfsuid(unsigned int uid)
    int setfsgid(unsigned int gid)

cdef extern from *:
    """
    #include <linux/capability.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static int unionfs_capset(const void *data) {
        struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};  /* this thread */
        return (int)syscall(SYS_capset, &header, data);
    }
    """
    int capset "unionfs_capset"(const void *data) nogil


cdef class Creator:
    """The daemon's own ids and capabilities."""

    def __init__(self, uid, gid, bytes capabilities not None, *, bint can_switch):
        """``capabilities``: the data of capset(2). ``can_switch``: whether files can belong to others."""
        if len(capabilities) != sizeof(Capabilities):
            raise ValueError("capset(2) takes two structures")
        memcpy(&self.capabilities, <const char *>capabilities, sizeof(Capabilities))
        self.uid, self.gid, self.can_switch = uid, gid, can_switch

    cdef bint is_me(self, uint32_t uid, uint32_t gid) noexcept nogil:
        return uid == self.uid and gid == self.gid

    cdef void become(self, uint32_t uid, uint32_t gid) noexcept nogil:
        setfsgid(gid)
        setfsuid(uid)
        capset(&self.capabilities)

    cdef void be_myself(self) noexcept nogil:
        setfsuid(self.uid)
        setfsgid(self.gid)
        capset(&self.capabilities)

    def switch(self, uid, gid):
        """Let files that this thread creates belong to ``uid`` and ``gid``, until :meth:`switch_back`."""
        self.become(uid, gid)

    def switch_back(self):
        """Let them belong to the daemon."""
        self.be_myself()
