"""The templates of `--format`; the expected texts are those of Go's text/template and of docker."""

from __future__ import annotations

import pytest

from unionfs.cli.template import Joined, render, render_rows
from unionfs.errors import UserError

VOLUME = {
    "Name": "db", "Size": "N/A", "Links": 2, "Anonymous": False, "Mountpoint": "",
    "Labels": Joined(b="2", a="1"), "Options": {"size": "1g"}, "Users": ["x", "y"], "Nothing": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{.Name}} {{ .Size }}", "db N/A"),
        ("{{.Labels}} {{.Options}} {{.Users}}", "b=2,a=1 map[size:1g] [x y]"),
        ("{{.Anonymous}} {{.Links}} {{.Nothing}}", "false 2 <no value>"),
        ('{{.Label "a"}}/{{.Label "none"}}/{{index .Labels "b"}}', "1//2"),
        ("{{if .Mountpoint}}there{{else}}not{{end}}", "not"),
        ("{{if .Anonymous}}a{{else if .Labels}}l{{else}}n{{end}}.", "l."),
        ("{{if and .Links (not .Anonymous)}}x{{end}}", "x"),
        ("{{if or .Mountpoint .Anonymous}}x{{end}}", ""),
        ('{{if eq .Name "other" "db"}}x{{end}}{{if gt .Links 1}}y{{end}}', "xy"),
        ("{{range $key, $value := .Labels}}{{$key}}:{{$value}} {{end}}", "a:1 b:2 "),
        ("{{range .Users}}<{{.}}>{{end}}", "<x><y>"),
        ("{{range $i, $u := .Users}}{{if $i}}, {{end}}{{$u}}{{end}}", "x, y"),
        ("{{range .Users}}{{$.Name}}{{end}}", "dbdb"),
        ("{{range .Nothing}}x{{else}}none{{end}}", "none"),
        ("{{range .Users}}{{else}}none{{end}}", ""),
        ("{{with .Options}}{{.size}}{{.absent}}{{end}}", "1g<no value>"),
        ("{{$x := .Name}}{{$x}}{{upper $x | lower | title}}", "dbDb"),
        ('{{join .Users "+"}} {{len .Users}} {{len .Name}}', "x+y 2 2"),
        ('{{index (split "a:b" ":") 1}}', "b"),
        ("{{json .Labels}}{{json .Options}}{{json .Nothing}}", '"b=2,a=1"{"size":"1g"}null'),
        ("a {{- .Name -}} b", "adbb"),
        ("a{{/* nothing */}}b", "ab"),
        ('{{.Name}}\\t{{"q\\n"}}{{`raw`}}', "db\tq\nraw"),
    ],
)
def test_rendered(template: str, expected: str) -> None:
    assert render(template, VOLUME) == expected


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{.Nmae}}", "unknown field .Nmae"),
        ("{{.Name.First}}", "unknown field .Name.First"),
        ("{{nothing .Name}}", "unknown function nothing"),
        ("{{if .Name}}", "no {{end}}"),
        ("{{end}}", "{{end}} is in no"),
        ("{{else}}", "{{else}} is in no"),
        ("{{.Name", "not closed"),
        ("}}", "has no {{"),
        ("{{}}", "a value is missing"),
        ("{{(.Name}}", "not closed by )"),
        ("{{.Name %}}", "cannot be read"),
        ("{{range .Name}}{{end}}", "cannot go over 'db'"),
        ("{{$x}}", "$x is not set"),
        ("{{index .Name 1}}", "has no keys"),
        ("{{len 1}}", "function len"),
        ('{{.Name "x"}}', "takes no arguments"),
        ('{{"x" .Name}}', "cannot be called"),
    ],
)
def test_refused(template: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        render(template, VOLUME)
    assert part in str(caught.value)


def test_tables() -> None:
    rows = render_rows("table {{.Name}}\t{{.Labels}}", [VOLUME], {"Name": "NAME", "Labels": "LABELS"})
    assert rows == [["NAME", "LABELS"], ["db", "b=2,a=1"]]
