"""Builds the compiled core, the launcher and the init of containers; everything else is in pyproject.toml.

UNIONFS_CORE: words for a special build: ``trace`` (line tracing, for coverage and profilers), ``asan``
(AddressSanitizer; needs LD_PRELOAD of libasan). Both keep assertions and check bounds.
"""

import os
import subprocess
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# isort: split
# That of setuptools.
from distutils.ccompiler import new_compiler
from distutils.command.build_scripts import build_scripts
from distutils.command.install_data import install_data
from distutils.errors import CCompilerError
from distutils.sysconfig import customize_compiler

CORE = Path("unionfs/core")
words = os.environ.get("UNIONFS_CORE", "").split()
checked = bool(words)
workers = os.cpu_count() or 1
directives = {
    "language_level": 3,
    "boundscheck": checked,
    "initializedcheck": checked,
    "cdivision": True,
    "linetrace": "trace" in words,
    "binding": True,
    "embedsignature": False,
}
compile_args = ["-O2", "-fno-strict-aliasing", "-Wall", "-Wno-unused-function"]
link_args = []
macros = [("CYTHON_TRACE", "1")] if "trace" in words else []
if "asan" in words:
    compile_args += ["-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"]
    link_args += ["-fsanitize=address"]

LAUNCHER = "launcher/fuse-unionfs.c"
INIT = "launcher/unionfs-init.c"


def build_program(source: str, directory: str, *link: str) -> None:
    """Compile a program of one file. Raises CCompilerError."""
    compiler = new_compiler()
    customize_compiler(compiler)
    hardening = ["-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"]
    objects = compiler.compile(
        [source], "build/launcher", extra_postargs=["-O2", "-Wall", "-Wextra", *hardening]
    )
    compiler.mkpath(directory)
    compiler.link_executable(objects, Path(source).stem, directory, extra_postargs=list(link))


class BuildLauncher(build_scripts):
    """Compiles the command `fuse-unionfs`, in place of copying a script."""

    def run(self) -> None:
        build_program(LAUNCHER, self.build_dir)


class BuildExtensions(build_ext):
    """Also builds the init of containers, which is static; without a static C library there is none."""

    def run(self) -> None:
        super().run()
        place = Path("unionfs/containers")
        try:
            build_program(INIT, str(place if self.inplace else Path(self.build_lib) / place), "-static")
        except CCompilerError as error:
            self.warn(f"OCI runtimes cannot be used: {error}")


class InstallManual(install_data):
    """Makes the man pages from the commands of the built package, and installs them."""

    def run(self) -> None:
        # An installation for development uses the source, and `python -m unionfs.cli.manual` makes the pages.
        if "editable_wheel" not in self.distribution.commands:
            library = os.path.abspath(self.get_finalized_command("build").build_lib)
            pages = Path("build/man")
            subprocess.run(
                [sys.executable, "-m", "unionfs.cli.manual", str(pages.absolute())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([library, *sys.path])},
                cwd=library,
                check=True,
            )
            self.data_files = [
                (f"share/man/{section.name}", sorted(map(str, section.iterdir())))
                for section in sorted(pages.iterdir())
            ]
        super().run()


setup(
    scripts=[LAUNCHER],
    cmdclass={
        "build_ext": BuildExtensions, "build_scripts": BuildLauncher, "install_data": InstallManual
    },
    # Without any, the command is not run.
    data_files=[("share/man/man1", [])],
    ext_modules=cythonize(
        [
            Extension(
                ".".join(path.with_suffix("").parts),
                [str(path)],
                extra_compile_args=compile_args,
                extra_link_args=link_args,
                define_macros=macros,
            )
            for path in sorted(CORE.glob("*.pyx"))
        ],
        compiler_directives=directives,
        # Cython.Coverage looks for the C files beside the sources.
        build_dir=None if "trace" in words else "build/cython",
        force=checked,
        nthreads=workers,
    ),
    options={"build_ext": {"parallel": workers}},
)
