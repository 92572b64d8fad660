"""What every request passes through, compiled by Cython; it imports nothing of the rest.

See docs/architecture.md for its modules. Each has a `.pyx` (the code), a `.pxd` (what other compiled modules
use of it) and a `.pyi` (its types, for the rest).
"""
