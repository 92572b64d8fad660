"""Virtual machines for the tests: an image with Debian's own kernel, built once, and QEMU to run it."""
