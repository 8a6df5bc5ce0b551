"""Asks the same of two servers and compares the answers byte for byte, but for the id.

compare.py COUNT DIRECT_ADDRESS DIRECT_PORT THROUGH_ADDRESS THROUGH_PORT
"""

import random
import socket
import struct
import sys

random.seed(7)
TYPES = [1, 28, 16, 15, 33, 12, 5, 6, 2, 255, 257, 65, 65280]
NAMES = (
    ["host%d.example.test" % n for n in range(50)]
    + ["text.example.test", "long.example.test", "mail.example.test", "alias.example.test"]
    + ["_sip._tcp.example.test", "5.2.0.192.in-addr.arpa", "nothing.example.test", "example.test"]
    + ["HoSt1.eXample.TEST", "deep.below.host2.example.test", "blocked.test"]
)


def name(text):
    return b"".join(bytes([len(p)]) + p.encode() for p in text.split(".")) + b"\0"


def query():
    flags = 0x0100 | random.choice([0, 0x10, 0x20])
    edns = random.choice([None, (512, 0), (1232, 0), (4096, 0x8000)])
    question = name(random.choice(NAMES)) + struct.pack(">2H", random.choice(TYPES), 1)
    message = struct.pack(">4H", flags, 1, 0, 0) + struct.pack(">H", 1 if edns else 0) + question
    if edns:
        option = struct.pack(">2H", 65001, 3) + b"abc" if random.random() < 0.2 else b""
        message += b"\0" + struct.pack(">2HIH", 41, edns[0], edns[1], len(option)) + option
    return message


def udp(server, message):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(6)
        s.connect(server)
        own = random.randbytes(2)
        s.send(own + message)
        answer = s.recv(65535)
        assert answer[:2] == own, (own, answer)
        return answer[2:]


def tcp(server, message):
    with socket.create_connection(server, 6) as s:
        own = random.randbytes(2)
        whole = own + message
        s.sendall(struct.pack(">H", len(whole)) + whole)
        f = s.makefile("rb")
        answer = f.read(struct.unpack(">H", f.read(2))[0])
        assert answer[:2] == own, (own, answer)
        return answer[2:]


count = int(sys.argv[1])
direct = (sys.argv[2], int(sys.argv[3]))
through = (sys.argv[4], int(sys.argv[5]))
same, truncated, over_tcp, largest = 0, 0, 0, 0
for number in range(count):
    message = query()
    ask = tcp if number % 10 == 0 else udp
    a, b = ask(direct, message), ask(through, message)
    # A server may give the records of one answer in another order each time.
    for _ in range(50):
        if a == b or len(a) != len(b):
            break
        a = ask(direct, message)
    if a != b:
        print("DIFFERENT", message.hex(), a.hex(), b.hex())
        break
    same += 1
    over_tcp += ask is tcp
    truncated += bool(a[0] & 0x02)
    largest = max(largest, len(a) + 2)
print(same, truncated, over_tcp, largest)
