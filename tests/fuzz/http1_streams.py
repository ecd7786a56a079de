"""Hypothesis strategies: streams of HTTP/1.1 requests, right, wrong in one place, and damaged."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzz.http1_oracle import seeds

_METHODS = [b"GET", b"POST", b"HEAD", b"OPTIONS", b"M-SEARCH"]
_TARGETS = [b"/", b"/process", b"/process?a=b&c[]=%20", b"/%70rocess", b"http://x/process", b"HTTPS://x:443?q"]
_VERSIONS = [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2"]
_FIELDS = [
    b"Connection: close",
    b"Connection: keep-alive",
    b"connection: Keep-Alive, Upgrade",
    b"Upgrade: websocket",
    b"Content-Type:application/json",
    b"Expect: 100-continue",
    b"X-Empty:",
    b"X-Text:\t a \xff\tb ",
    b"Idempotency-Key: k",
]
_EXTENSIONS = [b"", b"", b"", b";a", b';a="b;\\""', b" ;a", b"; a = b"]
_TRAILERS = [b"", b"", b"X: y\r\n", b"X:\r\nY: z\r\n"]

# What can be wrong, and how. (b"%b" is the right value.)
_FAULTS = {
    "empty lines": [b"\r\n", b"\r\n" * 9, b"\n", b"\r", b" "],
    "method": [b"get", b"CONNECT", b"PRI", b"", b"G\x80T", b"A" * 300],
    "target": [
        *(
            b"*",
            b"",
            b"//",
            b"/a#b",
            b"/%",
            b"/%4g",
            b"/\xff",
            b"x:80",
            b"http://",
            b"http://u@x/",
            b"ftp://x/",
            b"/a b",
        ),
        b"/" + b"a" * 210,
    ],
    "version": [b"HTTP/2.0", b"HTTP/1", b"http/1.1", b"HTTP/1.10", b"HTTP/0.9", b""],
    "space": [b"  ", b"\t", b"", b"\xa0", b"\x0b"],
    "line end": [b"\n", b"\r", b"\r\r\n", b"\r\n ", b"\r\n\r\n", b"\x00\r\n"],
    "host": [
        *(b"", b"Host: x\r\nHost: x\r\n", b"Host: a b\r\n", b"Host: a,b\r\n", b"Host: http://x\r\n", b"Host: :80\r\n"),
        *(
            b"Host:\r\n",
            b"Host: [::1]:80\r\n",
            b"Host: u@x\r\n",
            b"Host : x\r\n",
            b"Host: x:\r\n",
            b"host: x:65536\r\n",
        ),
    ],
    "field": [
        *(b"X", b": a", b"X : a", b" X: a", b"X\x00: a", b"\xc3\xa9: a", b"(: a", b"X: \x00", b"X: \x7f", b"X: \x1b"),
        *(b"Expect: 200-ok", b"Expect: ", b"Content-Type: a\r\nContent-Type: b", b"X: " + b"a" * 900, b"\r\nX: a"),
        *(b"Connection: close\x0b", b"Connection: clos e", b"X: a\r\n b"),
    ],
    "length": [
        *(
            b"+%b",
            b"-%b",
            b"0%b",
            b"0x%b",
            b"%b, %b",
            b"%b,",
            b" %b ",
            b"%b;",
            b"%b.0",
            b"",
            b"%b\x0b",
            b"1_0",
            b"9" * 18,
        ),
        *(b"%b\r\nContent-Length: %b", b"%b\r\nTransfer-Encoding: chunked", b"1", b"600", b"9" * 30),
    ],
    "coding": [
        *(
            b"Chunked",
            b"gzip, chunked",
            b"chunked, chunked",
            b"chunked, gzip",
            b"identity",
            b"xchunked",
            b"chunked;q=1",
        ),
        *(b"\x0bchunked", b"", b"chunked,", b"chunked\r\nTransfer-Encoding: chunked", b"chunked\r\nContent-Length: 3"),
    ],
    "coding field": [b"Transfer-Encoding ", b"\tTransfer-Encoding", b"Transfer_Encoding", b"transfer-encoding", b"TE"],
    "size": [
        b"%B",
        b"0%b",
        b"0x%b",
        b"00000000000000000000%b",
        b"+%b",
        b"-%b",
        b" %b",
        b"",
        b"%b0",
        b"1",
        b"F" * 16,
        b"1" * 17,
    ],
    "extension": [b" ", b";", b";a=", b';a="\n"', b";\xff", b";a b", b";" + b"a" * 200, b'; a = "b', b"\x00", b",a"],
    "chunk end": [b"\n", b"\r", b"", b"x\r\n", b"\r\n\r\n", b"\r\r\n"],
    "trailer": [
        *(b"X : y\r\n", b"Content-Length: 1\r\n", b"transfer-encoding: chunked\r\n", b"Host: x\r\n", b" x\r\n", b"x\n"),
        *(b"\x00: y\r\n", b"X: " + b"a" * 200 + b"\r\n", b"X: a\r\n b\r\n"),
    ],
}


@st.composite
def request(draw: st.DrawFn) -> bytes:
    """One request with at most one fault, in one place."""
    framing = draw(st.sampled_from(["none", "length", "chunked", "chunked"]))
    fault = draw(st.sampled_from([None, None, None, *_FAULTS]))
    faulty_place = draw(st.integers(0, 3))  # which of several equal parts

    def part(name: str, right: bytes) -> bytes:
        nonlocal faulty_place
        if name == fault:
            faulty_place -= 1
            if faulty_place < 0:
                wrong = draw(st.sampled_from(_FAULTS[name]))
                faulty_place = 1000
                return wrong.replace(b"%b", right).replace(b"%B", right.upper())
        return right

    def line(text: bytes) -> bytes:
        return text + part("line end", b"\r\n")

    fields = [part("field", field) for field in draw(st.lists(st.sampled_from(_FIELDS), max_size=3))]
    body = b""
    if framing == "length":
        body = draw(st.binary(max_size=40))
        fields.append(b"Content-Length: " + part("length", b"%d" % len(body)))
    elif framing == "chunked":
        fields.append(part("coding field", b"Transfer-Encoding") + b": " + part("coding", b"chunked"))
        for data in [*draw(st.lists(st.binary(min_size=1, max_size=30), max_size=3)), b""]:
            size = part("size", b"%x" % len(data))
            body += size + part("extension", draw(st.sampled_from(_EXTENSIONS))) + part("chunk end", b"\r\n")
            body += (data or part("trailer", draw(st.sampled_from(_TRAILERS)))) + part("chunk end", b"\r\n")
    space = part("space", b" ")
    request_line = (
        part("method", draw(st.sampled_from(_METHODS)))
        + space
        + part("target", draw(st.sampled_from(_TARGETS)))
        + part("space", b" ")
        + part("version", draw(st.sampled_from(_VERSIONS)))
    )
    head = line(request_line) + part("host", b"Host: x\r\n") + b"".join(map(line, fields)) + b"\r\n"
    return part("empty lines", b"") + head + body


_SPLICES = [
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"\x00",
    b":",
    b";",
    b",",
    b"0",
    b"\r\n\r\n",
    b"\r\n ",
    b"%",
    b"\xff",
    b"#",
    b'"',
    b"",
]
_MUTATION = st.tuples(st.integers(0, 2**16), st.integers(0, 2), st.sampled_from(_SPLICES) | st.binary(max_size=2))


def _damaged(stream: bytes, mutations: list[tuple[int, int, bytes]]) -> bytes:
    for place, removed, splice in mutations:
        at = place % (len(stream) + 1)
        stream = stream[:at] + splice + stream[at + removed :]
    return stream


_pipeline = st.lists(request(), min_size=1, max_size=3).map(b"".join)
_mutations = st.lists(_MUTATION, min_size=1, max_size=3)

# What a connection can bring.
stream = st.one_of(
    _pipeline,
    _pipeline,
    st.builds(_damaged, _pipeline, _mutations),
    st.builds(_damaged, st.sampled_from(seeds()), _mutations),
    st.builds(_damaged, st.sampled_from(seeds()), _mutations),
    st.binary(max_size=40),
)
cuts = st.lists(st.integers(0, 2**16), max_size=3)
