"""The commands of the README's story of a reviewed agent run, as they are written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.branches.branching import Branching, differing, tree
from tests.mount.cli_calls import REPOSITORY

AGENT = """#!/bin/sh
set -e
sed -i s/Passwort/Password/ templates/login.html
echo 'b { color: red }' > static/app.css; echo done > notes.txt
"""


def story() -> list[str]:
    """The commands, without their comments."""
    text = (REPOSITORY / "README.md").read_text()
    (block,) = re.findall(r"^## Try something.*?\n\n((?:    .*\n)+)", text, re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


def test_the_readme_s_story(branching: Branching, area: Path) -> None:
    for name in ("templates", "static"):
        (branching.base / name).mkdir()
    (branching.base / "templates/login.html").write_text("<p>Passwort\n")
    (branching.base / "static/app.css").write_text("b { color: blue }\n")
    branching.base.rename(area / "site")
    # The area may be in /tmp, which is another one for the agent.
    unionfs = f'#!/bin/sh\nexec {sys.executable} -m unionfs "$@"\n'
    for path, text in ((area / "site/programs/agent", AGENT), (area / "programs/unionfs", unionfs)):
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(0o755)
    environment = {
        **os.environ, "HOME": str(area),
        "PATH": f"{area}/programs:{area}/site/programs:{os.environ['PATH']}",
        "UNIONFS_ROOT": str(branching.root), "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    site = area / "site"
    before, outputs = tree(site), []
    commands = story()
    assert commands[0] == "cd ~/site"
    for command in commands[1:]:
        done = subprocess.run(
            ["sh", "-c", command], cwd=site, env=environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        outputs.append(done.stdout + done.stderr)
        if " commit " in command:
            assert (site / "templates/login.html").read_text() == "<p>Password\n"
            assert (site / "static/app.css").read_text() == "b { color: blue }\n"
        else:
            assert differing(before, tree(site)) == {}, command
    tried, content, committed, undone, _ = outputs
    assert "A notes.txt\n" in tried
    assert "branch agent: 1 added, 2 changed" in tried
    assert "-<p>Passwort\n+<p>Password\n" in content
    assert committed == f"committed agent to {site}\n"
    assert undone == f"undid the commit of agent to {site}\n"
    assert not (branching.root / "branches/agent").exists()
