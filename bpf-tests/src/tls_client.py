"""A peer that speaks TLS in ways that no proxy does. Takes its order as JSON, says what it saw as JSON."""

import json
import socket
import ssl
import sys
import time

order = json.loads(sys.argv[1])


def report(**seen):
    print(json.dumps(seen), flush=True)
    sys.exit(0)


context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.load_verify_locations(order["roots"])
context.load_cert_chain(order["chain"], order["key"])
version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[order["tls"]]
context.minimum_version = context.maximum_version = version
if order["alpn"]:
    context.set_alpn_protocols(order["alpn"])

stage = "connect"
try:
    plain = socket.create_connection((order["host"], order["port"]), timeout=20)
    stage = "handshake"
    stream = context.wrap_socket(plain, server_hostname=order["server_name"])
    stage = "data"
    names = stream.getpeercert().get("subjectAltName", ())
    uri = next((value for kind, value in names if kind == "URI"), None)
    if order["live"]:
        stream.sendall(b"!")
        stream.recv(1)
        print("up", flush=True)
        while True:
            stream.sendall(b"!")
            if not stream.recv(1):
                report(stage=stage, end="end of stream", uri=uri)
            time.sleep(0.02)
    first = stream.recv(4096)
    report(stage=stage, end="data" if first else "end of stream", said=first.decode("latin-1"), uri=uri,
           version=stream.version(), alpn=stream.selected_alpn_protocol())
except OSError as error:
    report(stage=stage, end=getattr(error, "reason", None) or type(error).__name__, said="")
