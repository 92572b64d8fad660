"""A volume plugin for docker, small and strict: `python plugin_server.py DIRECTORY ADDRESS [OPTION...]`.

ADDRESS is the path of a unix socket, or a TCP port. The plugin stores its volumes in DIRECTORY, and writes
every request to DIRECTORY/log. Options: `refuse=REQUEST` answers that request with an error,
`no-volume-driver` implements another type of plugin, `late` reports the mountpoint only by Path, `garbage`
answers with invalid JSON, `cert=FILE` serves TLS.
"""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import ssl
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

HOME = Path(sys.argv[1])
OPTIONS = sys.argv[3:]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    volumes: dict[str, dict[str, Any]] = {}  # noqa: RUF012

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        text = self.rfile.read(length)
        request = self.path.removeprefix("/")
        with (HOME / "log").open("a") as log:
            log.write(json.dumps([request, json.loads(text) if text.strip() else None]) + "\n")
        try:
            if f"refuse={request}" in OPTIONS:
                raise ValueError("it was told to refuse.")
            values, code = self.answer(request, json.loads(text) if text.strip() else {}), 200
        except Exception as error:
            values, code = {"Err": str(error)}, 500
        data = b"garbage" if "garbage" in OPTIONS else json.dumps(values).encode() + b"\n"
        self.send_response(code)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, request: str, values: dict[str, Any]) -> dict[str, Any]:
        """The protocol as documented by docker."""
        if request == "Plugin.Activate":
            return {"Implements": ["NetworkDriver" if "no-volume-driver" in OPTIONS else "VolumeDriver"]}
        if request == "VolumeDriver.Capabilities":
            return {"Capabilities": {"Scope": "global"}}
        if request == "VolumeDriver.List":
            return {"Volumes": [], "Err": ""}
        name = values["Name"]
        path = HOME / "volumes" / name
        if request == "VolumeDriver.Create":
            if unknown := set(values.get("Opts") or {}) - {"colour"}:
                raise ValueError(f"unknown option {sorted(unknown)[0]}")
            path.mkdir(parents=True)
            self.volumes[name] = {"users": set()}
            return {"Err": ""}
        volume = self.volumes[name]
        mountpoint = str(path) if volume["users"] or request == "VolumeDriver.Mount" else ""
        if request == "VolumeDriver.Mount":
            volume["users"].add(values["ID"])
            return {"Mountpoint": "" if "late" in OPTIONS else mountpoint, "Err": ""}
        if request == "VolumeDriver.Unmount":
            volume["users"].remove(values["ID"])
            return {"Err": ""}
        if request == "VolumeDriver.Remove":
            if volume["users"]:
                raise ValueError("it is mounted")
            shutil.rmtree(path)
            del self.volumes[name]
            return {"Err": ""}
        if request == "VolumeDriver.Path":
            return {"Mountpoint": mountpoint, "Err": ""}
        assert request == "VolumeDriver.Get"
        return {"Volume": {"Name": name, "Mountpoint": mountpoint, "Status": {"colour": "blue"}}, "Err": ""}

    def log_message(self, *arguments: object) -> None:
        pass

    def address_string(self) -> str:
        return "client"


class _Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class _Tcp(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True


def main() -> None:
    """Serve until killed."""
    server: socketserver.BaseServer
    if sys.argv[2].startswith("/"):
        server = _Unix(sys.argv[2], _Handler)
    else:
        tcp = _Tcp(("127.0.0.1", int(sys.argv[2])), _Handler)
        cert = next((option[5:] for option in OPTIONS if option.startswith("cert=")), None)
        if cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert)
            tcp.socket = context.wrap_socket(tcp.socket, server_side=True)
        print(tcp.server_address[1], flush=True)
        server = tcp
    print("up", flush=True)
    sys.stdout.close()
    os.close(1)
    server.serve_forever()


if __name__ == "__main__":
    main()
