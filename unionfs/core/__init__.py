"""What every request passes through, compiled by Cython; it imports nothing of the rest.

See docs/architecture.md for its modules. Each has a `.pyx` (the code), a `.pxd` (what other compiled modules
use of it) and a `.pyi` (its types, for the rest).

It relies on the interpreter lock. Its modules do not declare that they need none, so a free-threaded Python
switches the lock on when it imports them, with a warning.
"""
