"""Looks a name up without pause, in threads, each time from a socket of its own, until FILE exists.

lookups.py SERVER NAME ADDRESS FILE

As resolvers do it, a query that is not answered within a second is asked once more, after a tenth of a second if its
connection broke. Says now and then, and at its end, how many were answered right at once, how many at the second try,
and how many not at all or wrong; and when what is still looked up was begun, in milliseconds.
"""

import os
import random
import socket
import struct
import sys
import threading
import time

SERVER, NAME, ADDRESS, FILE = sys.argv[1:]
QUESTION = b"".join(bytes([len(p)]) + p.encode() for p in NAME.split(".")) + b"\0\0\1\0\1"
THREADS = 4
counts = [0, 0, 0]
begun = [time.monotonic()] * THREADS
lock = threading.Lock()


def ask(kind):
    query = random.randbytes(2) + struct.pack(">5H", 0x0100, 1, 0, 0, 0) + QUESTION
    stream = kind == 0
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as s:
        s.settimeout(1)
        if stream:
            s.connect((SERVER, 53))
            s.sendall(struct.pack(">H", len(query)) + query)
            f = s.makefile("rb")
            answer = f.read(struct.unpack(">H", f.read(2))[0])
        elif kind == 1:
            s.connect((SERVER, 53))
            s.send(query)
            answer = s.recv(4096)
        else:
            s.sendto(query, (SERVER, 53))
            answer, server = s.recvfrom(4096)
            assert server == (SERVER, 53), server
    assert answer[:2] == query[:2] and answer[3] & 0x0F == 0, answer
    assert socket.inet_aton(ADDRESS) in answer, answer


def look_up(kind):
    for attempt in range(2):
        try:
            ask(kind)
            return attempt
        except Exception as error:
            print("not answered:", kind, repr(error), flush=True)
            if not isinstance(error, TimeoutError):
                time.sleep(0.1)
    return 2


def work(number):
    asked = number
    while not os.path.exists(FILE):
        asked += 1
        begun[number] = time.monotonic()
        result = look_up(asked % 3)
        with lock:
            counts[result] += 1
            if sum(counts) % 20 == 0:
                print(*counts, int(min(begun) * 1000), flush=True)


threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*counts, int(time.monotonic() * 1000), flush=True)
