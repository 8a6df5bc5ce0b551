"""Consul 1.8.7 as a newer one would answer: upstreams with fields that 1.8.7 does not know. Everything else goes through.

The fields are registered as an upstream's `Config`, which Consul keeps as it is, and are moved to where they belong.
Arguments: the port to serve at, and that of Consul.
"""

import http.client
import http.server
import json
import sys

HERE, CONSUL = (int(argument) for argument in sys.argv[1:])
FIELDS = ("LocalBindSocketPath", "LocalBindSocketMode")


def newer(services):
    for service in services.values():
        for upstream in service.get("Proxy", {}).get("Upstreams") or []:
            config = upstream.get("Config") or {}
            for field in FIELDS:
                if field in config:
                    upstream[field] = config.pop(field)
                    upstream["LocalBindPort"] = 0
    return services


class Front(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def go(self):
        length = int(self.headers.get("Content-Length", 0))
        consul = http.client.HTTPConnection("127.0.0.1", CONSUL)
        consul.request(self.command, self.path, self.rfile.read(length), dict(self.headers))
        answer = consul.getresponse()
        body = answer.read()
        if answer.status == 200 and self.path.startswith("/v1/agent/services"):
            body = json.dumps(newer(json.loads(body))).encode()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = go


server = http.server.ThreadingHTTPServer(("127.0.0.1", HERE), Front)
server.daemon_threads = True
server.serve_forever()
