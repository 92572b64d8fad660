"""Virtual machines for the tests: an image with Debian's own kernel, made once, and QEMU that runs it."""
