"""`unionfs volume ls`, `inspect`, `rm` and `prune` print docker's output; completion; help."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.cli_calls import UNIONFS, refused
from tests.support.terminals import read_to_end
from tests.volumes.conftest import Store

COMMANDS = ("create", "ls", "inspect", "rm", "prune", "backup", "restore", "clone", "verify", "resize")


@pytest.fixture
def some(store: Store) -> Store:
    """Three named volumes, the second in use, and an anonymous one."""
    store.create("--label", "app=shop", "--label", "tier=db", "alpha")
    store.create("--label", "app=blog", "beta")
    store.create("-o", "type=tmpfs", "-o", "device=tmpfs", "gamma")
    store.ok("create")
    store.volumes().attach("beta", "user")
    return store


def _names(store: Store, *words: str) -> list[str]:
    return ["anonymous" if len(name) == 64 else name for name in store.ok("ls", "-q", *words).split()]


class TestLs:
    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ([], "anonymous alpha beta gamma"),
            (["name=a$", "anonymous=false"], "alpha beta gamma"),
            (["name=lph"], "alpha"),
            (["name=^be", "name=ta"], "beta"),
            (["label=app"], "alpha beta"),
            (["label=app=shop"], "alpha"),
            (["label=app", "label=tier"], "alpha"),
            (["label=app=shop", "label=app=blog"], ""),
            (["label!=app"], "anonymous gamma"),
            (["driver=local"], "anonymous alpha beta gamma"),
            (["driver=union"], ""),
            (["dangling=true"], "anonymous alpha gamma"),
            (["dangling=false"], "beta"),
            (["dangling=1"], "anonymous alpha gamma"),
            (["anonymous=true"], "anonymous"),
            (["anonymous=0", "dangling=true"], "alpha gamma"),
        ],
    )
    def test_filters_and_together(self, some: Store, filters: list[str], expected: str) -> None:
        words = [text for one in filters for text in ("-f", one)]
        assert sorted(_names(some, *words)) == sorted(expected.split())

    @pytest.mark.parametrize(
        ("word", "part"),
        [
            ("x", "KEY=VALUE"),
            ("size=1", "filter size"),
            ("dangling=maybe", "invalid value dangling=maybe; write true or false"),
            ("name=[", "regular expression"),
            ("=x", "KEY=VALUE"),
        ],
    )
    def test_bad_filters(self, some: Store, word: str, part: str) -> None:
        refused(some("ls", "-f", word), part)

    def test_until(self, some: Store) -> None:
        record = some.root / "volumes/alpha/volume.json"
        values = json.loads(record.read_text())
        record.write_text(json.dumps({**values, "created": 1_000_000_000}))
        for value in ("24h", "1h30m", "2020-01-31", "2020-01-31T10:00:00+01:00", "1000000001"):
            assert _names(some, "-f", f"until={value}") == ["alpha"], value
        assert _names(some, "-f", "until=2000-01-01") == []
        refused(some("ls", "-f", "until=yesterday"), "invalid time yesterday", "24h")
        (line,) = some.ok("prune", "-a", "--dry-run", "--filter", "until=24h").splitlines()[1:2]
        assert line == "alpha"

    def test_sizes(self, some: Store) -> None:
        (some.data("alpha") / "x").write_bytes(b"x" * 5000)
        assert some.ok("ls", "-s", "-f", "name=alpha").splitlines() == [
            "DRIVER  VOLUME NAME  SIZE", "local   alpha        5kB",
        ]  # fmt: skip
        (whole,) = json.loads(some.ok("ls", "--size", "-f", "name=alpha", "--json"))
        assert whole["Size"] == 5000

    def test_table(self, some: Store) -> None:
        lines = some.ok("ls").splitlines()
        assert lines[0].split() == ["DRIVER", "VOLUME", "NAME"]
        assert "local   alpha" in lines

    def test_formats(self, some: Store) -> None:
        only = ("-f", "name=alpha")
        where = str(some.data("alpha"))
        assert (
            some.ok("ls", *only, "--format", "{{.Name}}:{{.Driver}} {{ .Mountpoint }}")
            == f"alpha:local {where}\n"
        )
        assert some.ok("ls", *only, "--format", '{{.Label "app"}}/{{.Label "none"}}') == "shop/\n"
        assert some.ok("ls", *only, "--format", '{{index .Labels "tier"}}') == "db\n"
        assert some.ok("ls", *only, "--format", "{{json .Labels}}") == '"app=shop,tier=db"\n'
        assert some.ok("ls", *only, "--format", "{{.Labels}}") == "app=shop,tier=db\n"
        assert some.ok("ls", *only, "--format", "{{.Size}} {{.Status}}") == "N/A N/A\n"
        assert some.ok("ls", *only, "--format", "{{range $k, $v := .Labels}}{{$k}} {{end}}") == "app tier \n"
        assert some.ok("ls", *only, "--format", "{{if .Links}}used{{else}}free{{end}}") == "free\n"
        assert some.ok("ls", *only, "--format", "{{upper .Name}}\\t{{.Anonymous}}") == "ALPHA\tfalse\n"
        assert json.loads(some.ok("ls", *only, "--format", "{{json .}}"))["Name"] == "alpha"
        table = some.ok("ls", *only, "--format", "table {{.Name}}\t{{.Links}}").splitlines()
        assert [line.split() for line in table] == [["VOLUME", "NAME", "LINKS"], ["alpha", "0"]]
        (line,) = some.ok("ls", *only, "--format", "json").splitlines()
        # docker volume ls --format json, 24.0
        assert json.loads(line) == {
            "Availability": "N/A",
            "Driver": "local",
            "Group": "N/A",
            "Labels": "app=shop,tier=db",
            "Links": "0",
            "Mountpoint": where,
            "Name": "alpha",
            "Scope": "local",
            "Size": "N/A",
            "Status": "N/A",
        }
        (whole,) = json.loads(some.ok("ls", *only, "--json"))
        assert whole["Labels"] == {"app": "shop", "tier": "db"}

    @pytest.mark.parametrize(
        "template",
        [
            "{{range .Name}}{{end}}",
            "{{.Nme}}",
            "{{if .Name}}",
            "{{.Name",
            "x}}",
            "{{}}",
            "{{json}}",
            '{{index .Name "x"}}',
            "{{.Name.none}}",
            "{{template}}",
        ],
    )
    def test_templates_that_are_not_supported(self, some: Store, template: str) -> None:
        refused(some("ls", "--format", template), "template")

    @pytest.mark.parametrize(
        ("words", "reads"),
        [
            ((), False),
            (("-q",), False),
            (("--format", "table"), False),
            (("-q", "-f", "label=app"), False),
            (("-q", "-f", "dangling=true"), True),
            (("--json",), True),
            (("--format", "json"), True),
            (("--format", "{{.Name}} {{.Links}}"), True),
        ],
    )
    def test_users_are_read_only_where_they_matter(
        self, some: Store, words: tuple[str, ...], reads: bool
    ) -> None:
        # A symlink in a user's place cannot be read; it is reported to whoever reads the users.
        (some.root / "volumes/alpha/.user-0").symlink_to("/dev/null")
        done = some("ls", *words)
        assert done.returncode == 0
        assert ("cannot be read" in done.stderr) == reads, done.stderr

    def test_a_table_fits_the_terminal(self, some: Store) -> None:
        some.create("n" * 200)
        controller, terminal = pty.openpty()
        environment = {**os.environ, "UNIONFS_ROOT": str(some.root), "COLUMNS": "60", "TERM": "xterm"}
        done = subprocess.Popen([*UNIONFS, "volume", "ls"], stdout=terminal, env=environment)
        os.close(terminal)
        text = read_to_end(controller)
        assert done.wait() == 0
        lines = re.sub(r"\x1b\[[0-9;]*m|\r", "", text.decode()).split("\n")
        assert max(map(len, lines)) <= 60
        assert "".join("".join(lines).split()).count("n" * 200) == 1  # nothing is truncated


class TestInspect:
    def test_docker_s_keys(self, some: Store) -> None:
        (found,) = json.loads(some.ok("inspect", "gamma"))
        assert found.pop("CreatedAt").startswith("20")
        assert found == {
            "Driver": "local",
            "Labels": {},
            "Mountpoint": str(some.data("gamma")),
            "Name": "gamma",
            "Options": {"type": "tmpfs", "device": "tmpfs"},
            "Scope": "local",
            "Status": {"mounted": False},
            "UsageData": {"RefCount": 0, "Size": -1},
            "Users": [],
        }
        (found,) = json.loads(some.ok("inspect", "beta"))
        assert found["UsageData"]["RefCount"] == 1
        assert found["Users"] == ["user"]

    def test_size_counts_bytes_and_each_inode_once(self, some: Store) -> None:
        data = some.data("alpha")
        (data / "one").write_bytes(bytes(5000))
        os.link(data / "one", data / "two")
        (data / "dir").mkdir()
        (data / "dir/three").write_bytes(b"x" * 7)
        with (data / "hole").open("wb") as file:
            file.truncate(1 << 40)
        (found,) = json.loads(some.ok("inspect", "--size", "alpha"))
        assert found["UsageData"]["Size"] == 5007

    def test_several_and_some_missing(self, some: Store) -> None:
        done = some("inspect", "alpha", "none", "beta")
        assert done.returncode == 1
        assert [one["Name"] for one in json.loads(done.stdout)] == ["alpha", "beta"]
        assert "no volume none" in done.stderr
        assert (
            some.ok("inspect", "-f", "{{.Name}} {{.UsageData.RefCount}}", "alpha", "beta")
            == "alpha 0\nbeta 1\n"
        )


class TestRemoval:
    def test_rm_goes_on_after_an_error(self, some: Store) -> None:
        done = some("rm", "none", "alpha", "beta", "gamma", "alpha")
        assert (done.returncode, done.stdout) == (1, "alpha\ngamma\n")
        assert "no volume none" in done.stderr
        assert "in use by user" in done.stderr
        assert some.ok("rm", "-f", "none", "a/b") == ""

    def test_prune_takes_anonymous_ones_only(self, some: Store) -> None:
        (anonymous,) = some.ok("ls", "-q", "-f", "anonymous=true").split()
        (some.data(anonymous) / "file").write_bytes(bytes(3000))
        assert some.ok("prune", "--dry-run") == f"Would delete:\n{anonymous}\n\nReclaimable space: 3kB\n"
        assert some.data(anonymous).exists()
        assert some.ok("prune", "-f") == f"Deleted Volumes:\n{anonymous}\n\nTotal reclaimed space: 3kB\n"
        assert _names(some) == ["alpha", "beta", "gamma"]
        assert some.ok("prune", "-f") == "Total reclaimed space: 0B\n"

    def test_prune_all_spares_those_in_use(self, some: Store) -> None:
        assert "alpha" not in some.ok("prune", "-a", "-f", "--filter", "label!=app").split()
        assert _names(some) == ["alpha", "beta"]
        assert some.ok("prune", "-f", "--filter", "all=true").split()[2] == "alpha"
        assert _names(some) == ["beta"]

    @pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 1), ("", 1)])
    def test_prune_asks(self, store: Store, answer: str, left: int) -> None:
        store.ok("create")
        done = subprocess.run(
            [*UNIONFS, "volume", "prune"],
            input=answer,
            capture_output=True,
            text=True,
            env={**os.environ, "UNIONFS_ROOT": str(store.root)},
            check=False,
        )
        assert len(store.volumes().all()) == left
        assert done.returncode == left
        assert "WARNING! This will remove anonymous volumes" in done.stderr
        assert ("nothing was removed" in done.stderr) == bool(left)


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example(self, store: Store, command: str) -> None:
        text = store.ok(command, "--help")
        assert "Example" in text
        assert f"unionfs volume {command}" in text
        assert max(map(len, text.splitlines())) <= 80

    def test_bad_calls_say_where_help_is(self, store: Store) -> None:
        for command in COMMANDS:
            refused(store(command, "--nonsense"), "--nonsense", f"see `unionfs volume {command} --help`")
        refused(store("nonsense"), "nonsense", "--help")
        refused(store("backup"), "missing argument")


class TestCompletion:
    def test_names_of_volumes(self, some: Store) -> None:
        def complete(words: str) -> list[str]:
            environment = {
                **os.environ,
                "UNIONFS_ROOT": str(some.root),
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split(" ")) - 1),
                "_UNIONFS_COMPLETE": "bash_complete",
            }
            code = "import sys; sys.argv = ['unionfs']; from unionfs.cli.main import main; main()"
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
            )
            return [line.split(",")[1] for line in done.stdout.splitlines()]

        assert complete("unionfs volume rm al") == ["alpha"]
        assert complete("unionfs volume rm alpha bet") == ["beta"]
        assert complete("unionfs volume backup gam") == ["gamma"]
        assert complete("unionfs volume verify bet") == ["beta"]
        assert complete("unionfs volume res") == ["restore", "resize"] or complete("unionfs volume res") == [
            "resize",
            "restore",
        ]
        assert "sshfs" in complete("unionfs volume create -d s")

    def test_an_unreadable_registry_completes_nothing(self, store: Store, area: Path) -> None:
        (area / "root").write_text("no directory")
        from unionfs.cli.volume.common import complete_volumes

        class _Context:
            params = {"root": str(area / "root")}  # noqa: RUF012

        assert complete_volumes(_Context(), None, "") == []  # type: ignore[arg-type]
