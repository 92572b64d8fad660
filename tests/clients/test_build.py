"""make and a C compiler: a build whose decisions depend on the times of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.support import run, union_over

pytestmark = pytest.mark.usefixtures("root")

UNITS = 12

MAKEFILE = """\
CFLAGS = -O1 -MMD -MP
OBJECTS = $(patsubst %.c,build/%.o,$(wildcard *.c))

program: $(OBJECTS:build/main.o=) build/main.o libunits.a
\t$(CC) -o $@ build/main.o libunits.a

libunits.a: $(filter-out build/main.o,$(OBJECTS))
\trm -f $@
\tar rcs $@ $^

build/%.o: %.c | build
\t@echo compiling $<
\t$(CC) $(CFLAGS) -c -o $@ $<

build:
\tmkdir -p $@

-include $(OBJECTS:.o=.d)
"""


def make_project(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "Makefile").write_text(MAKEFILE)
    (path / "odd.h").write_text("#define ODD 1\n")
    (path / "even.h").write_text("#define EVEN 100\n")
    calls, declarations = [], []
    for number in range(UNITS):
        header, value = ("odd.h", "ODD") if number % 2 else ("even.h", "EVEN")
        (path / f"unit{number}.c").write_text(
            f'#include "{header}"\nint unit{number}(void) {{ return {value}; }}\n'
        )
        declarations.append(f"int unit{number}(void);")
        calls.append(f"unit{number}()")
    (path / "main.c").write_text(
        "#include <stdio.h>\n"
        + "\n".join(declarations)
        + '\nint main(void) { printf("%d\\n", '
        + " + ".join(calls)
        + "); return 0; }\n"
    )


def compiled(output: str) -> int:
    return output.count("compiling ")


@pytest.mark.parametrize("built_before", [False, True], ids=["sources", "built"])
def test_incremental_build(area: Path, session: str, built_before: bool) -> None:
    """In a lower with only sources, and in an already built one."""
    make_project(area / "lower/project")
    if built_before:
        run("make", "-j2", cwd=area / "lower/project")
    with union_over(area / "lower", area, session) as merged:
        project = merged / "project"
        assert compiled(run("make", "-j2", cwd=project)) == (0 if built_before else UNITS + 1)
        assert run(project / "program").strip() == str(UNITS // 2 * 101)
        assert "up to date" in run("make", cwd=project)

        (project / "odd.h").write_text("#define ODD 2\n")
        assert compiled(run("make", "-j2", cwd=project)) == UNITS // 2
        assert run(project / "program").strip() == str(UNITS // 2 * 102)

        run("touch", "unit3.c", cwd=project)
        assert compiled(run("make", cwd=project)) == 1
        run("touch", "-d", "2001-01-01", "unit4.c", cwd=project)
        assert compiled(run("make", cwd=project)) == 0

        run("rm", "-r", "build", "program", cwd=project)
        assert compiled(run("make", "-j2", cwd=project)) == UNITS + 1
        assert run(project / "program").strip() == str(UNITS // 2 * 102)
