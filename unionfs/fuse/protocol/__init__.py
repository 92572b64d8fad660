"""The FUSE kernel protocol, ABI up to 7.45 (Linux 6.18), without any I/O: bytes in, values out.

    structs     the structures of the header, as a table
    flags       opcodes, flags, ioctls
    request     what every request is;  requests: one class for each opcode served
    decode      bytes -> request
    encode      answers -> buffers;     notify: notifications
    negotiate   INIT: offered flags, settings, privileges -> decision
    errors      ProtocolError, NegotiationRefused

Rules:
- No module here opens, reads, writes, sleeps or uses trio: a session does, and passes bytes.
- Facts are the kernel's, and each file names the source. A name of the header keeps its spelling.
- No module here depends on the union.

A session, in short:

    decode = decoder()
    request = decode(view, os.readv(fd, [buffer]))          # the first is an InitRequest
    decision = negotiate(request, settings, privileges)
    os.writev(fd, encode.init(request.unique, decision.reply))
    decode = decoder(decision.flags)
    ...
    os.writev(fd, encode.entry(request.unique, nodeid, 0, FOREVER, FOREVER, attr))
"""

from unionfs.fuse.protocol import encode, notify, requests
from unionfs.fuse.protocol.decode import Decode, decoder, receive_buffer_size
from unionfs.fuse.protocol.encode import FOREVER, NEVER, InitReply, Reply, Timeout
from unionfs.fuse.protocol.errors import NegotiationRefused, ProtocolError
from unionfs.fuse.protocol.flags import Init, Notify, Opcode
from unionfs.fuse.protocol.negotiate import SMALL_FILE, Decision, IoMode, Privileges, Settings, negotiate
from unionfs.fuse.protocol.request import Request, Unknown

__all__ = [
    "FOREVER",
    "NEVER",
    "SMALL_FILE",
    "Decision",
    "Decode",
    "Init",
    "InitReply",
    "IoMode",
    "NegotiationRefused",
    "Notify",
    "Opcode",
    "Privileges",
    "ProtocolError",
    "Reply",
    "Request",
    "Settings",
    "Timeout",
    "Unknown",
    "decoder",
    "encode",
    "negotiate",
    "notify",
    "receive_buffer_size",
    "requests",
]
