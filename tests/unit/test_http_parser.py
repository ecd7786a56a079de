"""common.http.parser, rule by rule; each case names the section of RFC 9110 or 9112 that it comes from.

Every stream is also read in two pieces, cut at every byte, and byte by byte: the result must be the same.
"""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import h11
import pytest
from _pytest.mark.structures import ParameterSet

from common.errors import HttpError
from common.http.connection import CONTINUE
from common.http.exchange import Client, Exchange
from common.http.parser import Head, Limits, Request, RequestParser
from tests.fuzz.http1_oracle import Outcome, read, single_bytes
from tests.support.least import least

ROOMY = Limits()
GET = b"GET /good HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"0\r\n\r\n"
X = (b"host", b"x")


def request(line: bytes, *fields: bytes, body: bytes = b"") -> bytes:
    return b"".join(part + b"\r\n" for part in (line, *fields)) + b"\r\n" + body


def get(target: bytes, *fields: bytes) -> bytes:
    return request(b"GET " + target + b" HTTP/1.1", b"Host: x", *fields)


def post(*fields: bytes, body: bytes = b"", version: bytes = b"HTTP/1.1") -> bytes:
    return request(b"POST / " + version, b"Host: x", *fields, body=body)


def coded(*codings: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    return post(*(b"Transfer-Encoding: " + coding for coding in codings), body=LAST, version=version)


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


def read_in_every_way(stream: bytes, limits: Limits = ROOMY) -> Outcome:
    whole = read([stream], limits)
    assert read(single_bytes(stream), limits) == whole
    for cut in range(1, len(stream)):
        assert read([stream[:cut], stream[cut:]], limits) == whole
    return whole


def single_request(stream: bytes, limits: Limits = ROOMY) -> Request:
    parser = RequestParser(limits)
    parser.receive_data(stream)
    found = parser.next_request()
    assert found is not None
    return found


def case(name: str, *values: object) -> ParameterSet:
    return pytest.param(*values, id=name)


ACCEPTED = [
    # name, stream, and what of the request is as follows
    case("9112-3 request line", get(b"/process"), {"method": b"GET", "target": b"/process", "path": b"/process"}),
    case(
        "9110-9.1 method is any token, in its case",
        request(b"m-Search! / HTTP/1.1", b"Host: x"),
        {"method": b"m-Search!"},
    ),
    case("9112-2.2 empty lines before a request line", b"\r\n" * 100 + get(b"/"), {"path": b"/"}),
    case("9112-2.3 HTTP/1.0", request(b"GET / HTTP/1.0"), {"http10": True, "keep_alive": False}),
    case(
        "9110-6.2 minor version above 1 is 1",
        request(b"GET / HTTP/1.2", b"Host: x"),
        {"http10": False, "keep_alive": True},
    ),
    # Targets
    case("9112-3.2.1 query", get(b"/a?b=c?/&d[]=e"), {"path": b"/a", "query": b"b=c?/&d[]=e"}),
    case("9112-3.2.1 query of any form", get(b"/a?%zz<\xe9>#b"), {"path": b"/a", "query": b"%zz<\xe9>#b"}),
    case("9112-3.2.1 empty query", get(b"/a?"), {"path": b"/a", "query": b""}),
    case("9110-4.2.3 percent-encoded path is the same path", get(b"/%70roces%73"), {"path": b"/process"}),
    case("3986-2.1 encoded slash and NUL stay data", get(b"/a%2Fb%00"), {"path": b"/a/b\x00", "target": b"/a%2Fb%00"}),
    case("3986-3.3 empty segments stay", get(b"//process"), {"path": b"//process"}),
    case("3986-3.3 all pchar", get(b"/-._~!$&'()*+,;=:@"), {"path": b"/-._~!$&'()*+,;=:@"}),
    case("9112-3.2.2 absolute form", get(b"http://x/process?a"), {"path": b"/process", "query": b"a"}),
    case("9112-3.2.2 absolute form overrides Host", get(b"HTTPS://[::1]:8000/process"), {"path": b"/process"}),
    case("9112-3.2.2 absolute form counts, not Host", get(b"http://y:8/a"), {"path": b"/a", "host": b"y:8"}),
    case("9112-3.2.2 absolute form without path", get(b"http://x"), {"path": b"/", "target": b"http://x"}),
    case("9112-3.2.2 absolute form with query only", get(b"http://x:80?a"), {"path": b"/", "query": b"a"}),
    case("9112-3.2.4 asterisk form", request(b"OPTIONS * HTTP/1.1", b"Host: x"), {"path": b"*"}),
    case("9112-3.2.4 OPTIONS of a path", request(b"OPTIONS /a HTTP/1.1", b"Host: x"), {"path": b"/a"}),
    # Host
    case("9112-3.2 Host with port", request(b"GET / HTTP/1.1", b"Host: camera.example:8000"), {}),
    case("9112-3.2 Host with an IPv6 address", request(b"GET / HTTP/1.1", b"host:[2001:db8::1.2.3.4]:8000"), {}),
    case("9112-3.2 Host with an empty port", request(b"GET / HTTP/1.1", b"Host: x:"), {}),
    case("9112-3.2 empty Host", request(b"GET / HTTP/1.1", b"Host:"), {}),
    # Fields
    case(
        "9112-5 white space around a value is not part of it",
        get(b"/", b"X:\t a\tb  c \t"),
        {"headers": (X, (b"x", b"a\tb  c"))},
    ),
    case("9112-5 a value may be empty", get(b"/", b"X:", b"Y: \t"), {"headers": (X, (b"x", b""), (b"y", b""))}),
    case("9110-5.1 field names in any case", get(b"/", b"CONTENT-type: a"), {"content_type": b"a"}),
    case("9110-5.1 a field name is any token", get(b"/", b"!#$%&'*+-.^_`|~09: a"), {}),
    case("9110-5.3 other fields may repeat", get(b"/", b"X: a", b"X: b"), {"headers": (X, (b"x", b"a"), (b"x", b"b"))}),
    case("9110-5.5 obs-text in a value", get(b"/", b"X: \x80\xff"), {"headers": (X, (b"x", b"\x80\xff"))}),
    case(
        "design: the fields that the service acts on",
        get(b"/", b"Content-Encoding: gzip", b'Idempotency-Key: "k"', b"Authorization: Bearer t"),
        {"content_encoding": b"gzip", "idempotency_key": b'"k"', "authorization": b"Bearer t", "content_type": None},
    ),
    # Connection
    case("9112-9.3 1.1 keeps alive", get(b"/"), {"keep_alive": True}),
    case("9112-9.6 close", get(b"/", b"Connection: close"), {"keep_alive": False}),
    case("9110-7.6.1 options are a list, in any case", get(b"/", b"Connection: a,\tCLOSE ,"), {"keep_alive": False}),
    case("9110-7.6.1 over several lines", get(b"/", b"Connection: a", b"Connection: close"), {"keep_alive": False}),
    case(
        "9110-7.6.1 in the first of several", get(b"/", b"Connection: close", b"Connection: a"), {"keep_alive": False}
    ),
    case("9112-9.3 close wins", get(b"/", b"Connection: keep-alive, close"), {"keep_alive": False}),
    case("9112-9.3 no option has close in it", get(b"/", b"Connection: closed, x-close"), {"keep_alive": True}),
    case("9112-9.3 1.0 with keep-alive", request(b"GET / HTTP/1.0", b"Connection: Keep-Alive"), {"keep_alive": True}),
    case(
        "9112-9.3 1.0 close wins", request(b"GET / HTTP/1.0", b"Connection: keep-alive, close"), {"keep_alive": False}
    ),
    case("9110-7.8 Upgrade is ignored", get(b"/", b"Connection: upgrade", b"Upgrade: h2c"), {"keep_alive": True}),
    # Content
    case("9112-6.3 no content", post(), {"body": b"", "content_length": 0, "chunked": False}),
    case(
        "9112-6.3 Content-Length",
        post(b"Content-Length: 3", body=b"\r\n\x00"),
        {"body": b"\r\n\x00", "content_length": 3},
    ),
    case("9112-6.3 in 1.0", post(b"Content-Length: 2", body=b"{}", version=b"HTTP/1.0"), {"body": b"{}"}),
    case("9110-8.6 zero", post(b"Content-Length: 0"), {"body": b""}),
    case("9110-8.6 leading zeros", post(b"Content-Length: 002", body=b"{}"), {"body": b"{}"}),
    case("9112-6 content on GET", get(b"/", b"Content-Length: 2") + b"{}", {"body": b"{}"}),
    case(
        "9112-7.1 chunked",
        chunked(b"5\r\nhello\r\n0a\r\n\r\n23456789\r\n" + LAST),
        {"body": b"hello\r\n23456789", "chunked": True},
    ),
    case("9112-7.1 chunked, empty", chunked(LAST), {"body": b"", "content_length": 0}),
    case(
        "9112-7.1 sizes in both cases, with zeros",
        chunked(b"a\r\n0123456789\r\n00A\r\n0123456789\r\n000\r\n\r\n"),
        {"body": b"0123456789" * 2},
    ),
    case("9112-7.1 chunks may look like framing", chunked(b"5\r\n0\r\n\r\n\r\n" + LAST), {"body": LAST}),
    case("9112-7 coding name in any case", post(b"transfer-encoding: Chunked", body=LAST), {"chunked": True}),
    case("9112-7.1.1 extensions", chunked(b'1;a;b=c;d="\\"; e=\\\\\t\xff"\r\nx\r\n0;last\r\n\r\n'), {"body": b"x"}),
    case("9112-7.1.1 bad white space in extensions", chunked(b"1 ; a\t=  b ;c\r\nx\r\n0\t;d\r\n\r\n"), {"body": b"x"}),
    case(
        "9112-7.1.2 trailers are dropped",
        chunked(b"1\r\nx\r\n0\r\nDigest: a\r\nX:\r\n\r\n"),
        {"body": b"x", "headers": (X, (b"transfer-encoding", b"chunked"))},
    ),
    # Expect
    case(
        "9110-10.1.1 100-continue",
        post(b"Expect: 100-Continue", b"Content-Length: 1", body=b"x"),
        {"expect_continue": True},
    ),
    case(
        "9110-10.1.1 100-continue, chunked",
        post(b"Expect: 100-continue", b"Transfer-Encoding: chunked", body=LAST),
        {"expect_continue": True},
    ),
    case("9110-10.1.1 nothing to wait for", post(b"Expect: 100-continue"), {"expect_continue": False}),
    case(
        "9110-10.1.1 ignored in 1.0",
        post(b"Expect: x", b"Content-Length: 1", body=b"x", version=b"HTTP/1.0"),
        {"expect_continue": False},
    ),
]

CONTROLS = [byte for byte in range(32) if byte not in b"\t\r\n"] + [127]

REFUSED = [
    # name, status, stream
    # Request line
    case("9112-2.2 white space before a request line", 400, b" " + GET),
    case("9112-2.2 bare LF before a request line", 400, b"\n" + GET),
    case("9112-2.2 bare LF ends a request line", 400, b"GET / HTTP/1.1\nHost: x\r\n\r\n"),
    case("9112-2.2 bare LF ends a field line", 400, b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n"),
    case("9112-2.2 bare LF ends a head", 400, b"GET / HTTP/1.1\r\nHost: x\r\n\n"),
    case("9112-2.2 bare CR ends a field line", 400, b"GET / HTTP/1.1\r\nHost: x\rX: y\r\n\r\n"),
    case("9112-2.2 bare CR in a request line", 400, b"GET /\r HTTP/1.1\r\nHost: x\r\n\r\n"),
    case("9112-2.2 two CR before LF", 400, b"GET / HTTP/1.1\r\r\nHost: x\r\n\r\n"),
    case("9112-3 two spaces", 400, request(b"GET  / HTTP/1.1", b"Host: x")),
    case("9112-3 two spaces before the version", 400, request(b"GET /  HTTP/1.1", b"Host: x")),
    case("9112-3 space after the version", 400, request(b"GET / HTTP/1.1 ", b"Host: x")),
    case("9112-3 tab for space", 400, request(b"GET\t/ HTTP/1.1", b"Host: x")),
    case("9112-3 no-break space", 400, request(b"GET\xa0/ HTTP/1.1", b"Host: x")),
    case("9112-3 no target", 400, request(b"GET HTTP/1.1", b"Host: x")),
    case("9112-3 no method", 400, request(b" / HTTP/1.1", b"Host: x")),
    case("9112-3 space in the target", 400, get(b"/a b")),
    case("9110-5.6.2 method is not a token", 400, request(b"G(T / HTTP/1.1", b"Host: x")),
    case("9110-5.6.2 method with non-ASCII", 400, request(b"G\xc3\x89T / HTTP/1.1", b"Host: x")),
    case("9112-3 a response", 400, request(b"HTTP/1.1 200 OK", b"Host: x")),
    case("9112-3 a TLS hello", 400, bytes.fromhex("16030100c8010000c40303")),
    # Version
    case("9112-2.3 HTTP/0.9", 505, request(b"GET / HTTP/0.9", b"Host: x")),
    case("9112-2.3 HTTP/2.0", 505, request(b"GET / HTTP/2.0", b"Host: x")),
    case("9113-3.4 preface of HTTP/2", 505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    case("9112-2.3 version in lower case", 400, request(b"GET / http/1.1", b"Host: x")),
    case("9112-2.3 version without minor", 400, request(b"GET / HTTP/2", b"Host: x")),
    case("9112-2.3 version with two digits", 400, request(b"GET / HTTP/1.10", b"Host: x")),
    case("9112-2.3 version with a comma", 400, request(b"GET / HTTP/1,1", b"Host: x")),
    case("9112-2.3 another protocol", 400, request(b"GET / ICY/1.1", b"Host: x")),
    case("9112-3 HTTP/0.9 without version", 400, request(b"GET /")),
    # Target
    case("9112-3.2 target is not a path", 400, get(b"process")),
    case("9112-3.2 fragment", 400, get(b"/a#b")),
    case("9112-3.2 non-ASCII", 400, get(b"/caf\xc3\xa9")),
    case("3986-2.1 percent at the end", 400, get(b"/a%")),
    case("3986-2.1 percent and one digit", 400, get(b"/a%4")),
    case("3986-2.1 percent without hex", 400, get(b"/%zz")),
    case("3986-3.3 quote in path", 400, get(b'/"')),
    case("3986-3.3 backslash in path", 400, get(b"/a\\b")),
    case("9112-3.2.2 another scheme", 400, get(b"ftp://x/")),
    case("9110-4.2.1 absolute form without host", 400, get(b"http:///a")),
    case("9110-4.2.1 absolute form with port only", 400, get(b"http://:80/")),
    case("9110-4.2.4 absolute form with userinfo", 400, get(b"http://user@x/")),
    case("9112-3.2.2 absolute form with a bad port", 400, get(b"http://x:123456/")),
    case("9112-3.2.2 absolute form with a bad path", 400, get(b"http://x/%")),
    case("9112-3.2.2 absolute form with fragment", 400, get(b"http://x#a")),
    case("9112-3.2.3 authority form without CONNECT", 400, get(b"x:80")),
    case("9112-3.2.4 asterisk without OPTIONS", 400, get(b"*")),
    case("9112-3.2.4 asterisk and more", 400, request(b"OPTIONS *a HTTP/1.1", b"Host: x")),
    case("9110-9.3.6 CONNECT", 501, request(b"CONNECT x:443 HTTP/1.1", b"Host: x")),
    # Host
    case("9112-3.2 no Host", 400, request(b"GET / HTTP/1.1")),
    case("9112-3.2 no Host with absolute form", 400, request(b"GET http://x/ HTTP/1.1")),
    case("9112-3.2 two Hosts", 400, request(b"GET / HTTP/1.1", b"Host: x", b"Host: y")),
    case("9112-3.2 the same Host twice", 400, request(b"GET / HTTP/1.1", b"Host: x", b"host: x")),
    case("9112-3.2 two Hosts in 1.0", 400, request(b"GET / HTTP/1.0", b"Host: x", b"Host: y")),
    *(
        case(f"9112-3.2 Host {host.decode('latin-1')}", 400, request(b"GET / HTTP/1.1", b"Host: " + host))
        for host in (
            b'a b|a,b|http://x|x/|u@x|:80|x:80:80|x:http|x:-1|[::1|::1|[x]|[]|x\x80|%|x%4|x?|x#|"x"|x:123456|[::1]x'
        ).split(b"|")
    ),
    # Fields
    case("9112-5.1 space before the colon", 400, get(b"/", b"X : y")),
    case("9112-5.1 tab before the colon", 400, get(b"/", b"Content-Length\t: 0")),
    case("9112-5.1 no colon", 400, get(b"/", b"X")),
    case("9112-5.1 no name", 400, get(b"/", b": y")),
    case("9110-5.1 name is not a token", 400, get(b"/", b"X@Y: z")),
    case("9110-5.1 name with non-ASCII", 400, get(b"/", b"X\xe9: z")),
    case("9112-2.2 white space before the first field", 400, request(b"GET / HTTP/1.1", b" X: y", b"Host: x")),
    case("9112-5.2 folded line", 400, get(b"/", b"X: a", b" b")),
    case("9112-5.2 folded line by tab", 400, get(b"/", b"X: a", b"\tb: c")),
    case("9112-5.2 folded empty line", 400, get(b"/", b"X: a", b" ")),
    *(case(f"9110-5.5 control {c:#04x} in a value", 400, get(b"/", b"X: a%cb" % c)) for c in CONTROLS),
    *(case(f"9110-5.5 control {c:#04x} at its end", 400, get(b"/", b"X: a%c" % c)) for c in CONTROLS),
    *(case(f"9110-5.1 control {c:#04x} in a name", 400, get(b"/", b"X%c: a" % c)) for c in [*CONTROLS, 9]),
    *(case(f"9112-3 control {c:#04x} in the target", 400, get(b"/a%c" % c)) for c in [*CONTROLS, 9]),
    *(
        case(f"9110-5.3 two {name.decode()}", 400, post(name + b": " + value, name.lower() + b": " + value))
        for name, value in (
            (b"Content-Type", b"application/json"),
            (b"Content-Encoding", b"gzip"),
            (b"Idempotency-Key", b"k"),
            (b"Authorization", b"Bearer t"),
            (b"Expect", b"100-continue"),
        )
    ),
    # Content-Length
    *(
        case(f"9110-8.6 Content-Length {value!r}", 400, post(b"Content-Length:" + value, body=b"12345"))
        for value in (b'| |+5|-5|-0|0x5|5 5|5,5|5, 5|5,|,5|5;|5.0|5e0|1_0|five|"5"|\xb2|\xd9\xa5|5\x0b|\x0c5').split(
            b"|"
        )
    ),
    case("9112-6.3 two Content-Length", 400, post(b"Content-Length: 5", b"Content-Length: 6", body=b"123456")),
    case(
        "9112-6.3 the same Content-Length twice", 400, post(b"Content-Length: 5", b"Content-Length: 5", body=b"12345")
    ),
    case("9110-8.6 Content-Length over 64 bits", 413, post(b"Content-Length: 18446744073709551621", body=b"12345")),
    case("9110-8.6 Content-Length of 5,000 digits", 413, post(b"Content-Length: " + b"9" * 5000)),
    case("9110-8.6 Content-Length of 8 MiB and a byte, before the body", 413, post(b"Content-Length: 8388609")),
    # Transfer-Encoding
    case("9112-6.3 with Content-Length", 400, post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=LAST)),
    case(
        "9112-6.3 with Content-Length before it",
        400,
        post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=LAST),
    ),
    case("9112-6.1 in HTTP/1.0", 400, coded(b"chunked", version=b"HTTP/1.0")),
    case("9112-6.1 another coding before chunked", 501, coded(b"gzip, chunked")),
    case("9112-6.1 unknown coding before chunked", 501, coded(b"x;a=b ,chunked")),
    case("9112-6.1 chunked twice", 400, coded(b"chunked, chunked")),
    case("9112-6.1 chunked in two fields", 400, coded(b"chunked", b"chunked")),
    case("9112-6.1 two fields", 400, coded(b"gzip", b"chunked")),
    *(
        case(f"9112-6.3 last coding is not chunked: {value!r}", 400, coded(value))
        for value in (
            b'|identity|gzip|chunked, gzip|xchunked|chunkedx|chunked,|chunked;a=b|"chunked"|chunked\x0b|'
            b"\x0cchunked|chun ked"
        ).split(b"|")
    ),
    case("9112-5.1 Transfer-Encoding with a space after it", 400, post(b"Transfer-Encoding : chunked", body=LAST)),
    # Chunks
    *(
        case(f"9112-7.1 chunk size line {line!r}", 400, chunked(line + b"hello\r\n" + LAST))
        for line in (
            b"\r\n|5\n|5\r\r\n|0x5\r\n|+5\r\n|-5\r\n| 5\r\n|5 \r\n|5\t\r\n|5,\r\n|5g\r\n|5_\r\n|\xb2\r\n|"
            b"5.0\r\n|5\x00\r\n"
        ).split(b"|")
    ),
    *(
        case(f"9112-7.1.1 chunk extension {ext!r}", 400, chunked(b"5" + ext + b"\r\nhello\r\n" + LAST))
        for ext in (
            b';|; |;;a|;a=|;=a|;a b|;a=b c|; a="b|;a="b"c|;a="\n"|;a\x00|;a\xff|;a=b=c|;a\n|;a\rb|;a="\r\n"| a|;a '
        ).split(b"|")
    ),
    case("9112-7.1 chunk size over 64 bits", 400, chunked(b"10000000000000005\r\nhello\r\n" + LAST)),
    case("9112-7.1 chunk size of 2**64 - 1", 413, chunked(b"ffffffffffffffff\r\nhello")),
    case("9112-7.1 chunk longer than its size", 400, chunked(b"4\r\nhello\r\n" + LAST)),
    case("9112-7.1 chunk shorter than its size", 400, chunked(b"6\r\nhello\r\n" + LAST)),
    case("9112-7.1 bare LF after a chunk", 400, chunked(b"5\r\nhello\n" + LAST)),
    case("9112-7.1 bare CR after a chunk", 400, chunked(b"5\r\nhello\r" + LAST)),
    case("9112-7.1 bare LF after the last chunk", 400, chunked(b"5\r\nhello\r\n0\n\r\n")),
    case("9112-7.1 bare LF ends it", 400, chunked(b"5\r\nhello\r\n0\r\n\n")),
    case("9112-7.1.2 malformed trailer", 400, chunked(b"0\r\nX\r\n\r\n")),
    case("9112-7.1.2 white space before the colon of a trailer", 400, chunked(b"0\r\nX : y\r\n\r\n")),
    case("9112-7.1.2 folded trailer", 400, chunked(b"0\r\nX: y\r\n z\r\n\r\n")),
    case("9112-7.1.2 control character in a trailer", 400, chunked(b"0\r\nX: \x00\r\n\r\n")),
    case("9112-7.1.2 bare LF in the trailers", 400, chunked(b"0\r\nX: y\nZ: z\r\n\r\n")),
    case("9112-7.1.2 bare CR in the trailers", 400, chunked(b"0\r\nX: y\rZ: z\r\n\r\n")),
    case("9110-6.5.1 Content-Length in the trailers", 400, chunked(b"0\r\nContent-Length: 0\r\n\r\n")),
    case("9110-6.5.1 Transfer-Encoding in the trailers", 400, chunked(b"0\r\ntransfer-encoding: chunked\r\n\r\n")),
    # Expect
    case("9110-10.1.1 another expectation", 417, post(b"Expect: 200-ok", b"Content-Length: 1")),
    case("9110-10.1.1 and another", 417, post(b"Expect: 100-continue, x", b"Content-Length: 1")),
    case("9110-10.1.1 empty expectation", 417, post(b"Expect:", b"Content-Length: 1")),
]


@pytest.mark.parametrize(("stream", "expected"), ACCEPTED)
def test_accepts(stream: bytes, expected: dict[str, object]) -> None:
    found = single_request(stream)
    values = {"body": found.body, **asdict(found.head)}
    assert {name: values[name] for name in expected} == expected
    assert read_in_every_way(stream) == Outcome(((found.head, found.body),), None, found.head.keep_alive)


@pytest.mark.parametrize(("stream", "_"), ACCEPTED)
def test_no_prefix_of_a_request_is_taken_for_it(stream: bytes, _: object) -> None:
    for length in range(len(stream)):
        outcome = read([stream[:length]], ROOMY)
        assert (outcome.requests, outcome.status) == ((), None)
        assert outcome.idle == (stream[:length].strip(b"\r\n") == b"" and length % 2 == 0)


@pytest.mark.parametrize(("stream", "expected"), ACCEPTED)
def test_requests_before_and_after_are_apart(stream: bytes, expected: dict[str, object]) -> None:
    found = single_request(stream)
    outcome = read([GET + stream + GET], ROOMY)
    assert [head.path for head, _ in outcome.requests] == [b"/good", found.head.path, b"/good"][
        : 3 if found.head.keep_alive else 2
    ]
    assert outcome.status is None


@pytest.mark.parametrize(("status", "stream"), REFUSED)
def test_refuses(status: int | None, stream: bytes) -> None:
    assert len(stream) > 5000 or read_in_every_way(stream) == Outcome((), status, False)
    assert read([stream], ROOMY) == Outcome((), status, False)


@pytest.mark.parametrize(("status", "stream"), REFUSED)
def test_requests_before_a_bad_one_are_answered_none_after(status: int | None, stream: bytes) -> None:
    outcome = read([GET, GET + stream + GET, GET], ROOMY)
    assert [head.path for head, _ in outcome.requests] == [b"/good", b"/good"]
    assert outcome.status == status


@pytest.mark.parametrize("bad", [b"\n", b"\rX", b"\r\r", *(b"%c" % control for control in CONTROLS)])
@pytest.mark.parametrize(
    "beginning", [b"", b"GET", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x", b"GET / HTTP/1.1\r\nHost"]
)
def test_a_bad_byte_is_refused_before_the_head_is_complete(beginning: bytes, bad: bytes) -> None:
    """No head may have such a byte."""
    assert read_in_every_way(beginning + bad) == Outcome((), 400, False)


def test_a_bare_lf_after_content_that_ends_in_cr_is_refused() -> None:
    """It is not a line end."""
    first = post(b"Content-Length: 2", body=b"0\r")
    for rest in (b"\n", b"\n\r\n" + GET, b"\n" + GET[:-1], b"\n" + b"a" * 20_000):
        outcome = read([first + rest], ROOMY)
        assert (len(outcome.requests), outcome.status) == (1, 400)
        assert read(single_bytes(first + rest), ROOMY) == outcome


def test_rfc_9112_2_2_empty_lines_stand_before_any_request() -> None:
    assert len(read_in_every_way((b"\r\n" * 4 + GET) * 5).requests) == 5


def test_a_cached_head_is_judged_by_its_own_parsers_limits() -> None:
    stream = post(b"Content-Length: 5", body=b"hello")
    assert read([stream], Limits()).status is None
    assert read([stream], Limits(body_bytes=4)).status == 413
    assert read([stream], Limits(headers=1)).status == 431


# Limits

TIGHT = Limits(target_bytes=20, head_bytes=150, headers=4, body_bytes=10, chunk_overhead_bytes=30)
LONG_TARGET = b"/" + b"a" * 20
LINE_BYTES = 20 + 64


@pytest.mark.parametrize(
    ("status", "stream"),
    [
        case("target at its limit", None, get(LONG_TARGET[:20])),
        case("target above it", 414, get(LONG_TARGET)),
        case("target above it, no end in sight", 414, b"GET /" + b"a" * (LINE_BYTES - 3)),
        case(
            "request line at its limit is judged by its end",
            400,
            request(b"GET / " + b"a" * (LINE_BYTES - 6), b"Host: x"),
        ),
        case("request line above it", 414, request(b"GET / " + b"a" * (LINE_BYTES - 5), b"Host: x")),
        case("bad byte before the limit of the request line", 400, b"GET /" + b"a" * 60 + b"\x00" + b"a" * 100),
        case("bad byte after it", 414, b"GET /" + b"a" * 100 + b"\x00"),
        case("bare CR across it", 414, b"GET /" + b"a" * (LINE_BYTES - 4) + b"\rX"),
        case("bare CR before it", 400, b"GET /" + b"a" * (LINE_BYTES - 5) + b"\rX"),
        case("head at its limit", None, get(b"/", b"X: " + b"a" * (150 - len(get(b"/", b"X: "))))),
        case("head above it", 431, get(b"/", b"X: " + b"a" * (151 - len(get(b"/", b"X: "))))),
        case("head above it, no end in sight", 431, get(b"/")[:-2] + b"X: " + b"a" * 150),
        case("bad byte before the limit of the head", 400, get(b"/")[:-2] + b"X: \x00" + b"a" * 150),
        case("bare CR across it", 431, get(b"/")[:-2] + b"X: " + b"a" * (147 - len(get(b"/")[:-2])) + b"\rX"),
        case("bare CR before it", 400, get(b"/")[:-2] + b"X: " + b"a" * (146 - len(get(b"/")[:-2])) + b"\rX"),
        case("bad byte after it", 431, get(b"/")[:-2] + b"X: " + b"a" * 150 + b"\x00"),
        case("fields at their limit", None, get(b"/", b"A:", b"B:", b"C:")),
        case("fields above it", 431, get(b"/", b"A:", b"B:", b"C:", b"D:")),
        case("content at its limit", None, post(b"Content-Length: 10", body=b"a" * 10)),
        case("content above it, before it comes", 413, post(b"Content-Length: 11")),
        case("chunks at its limit", None, chunked(b"6\r\naaaaaa\r\n4\r\naaaa\r\n" + LAST)),
        case("chunks above it, before they come", 413, chunked(b"6\r\naaaaaa\r\n5\r\n")),
        case("long chunk extension", None, chunked(b"0;" + b"a" * 24 + b"\r\n\r\n")),
        case("chunk extension at its limit", None, chunked(b"0;" + b"a" * 26 + b"\r\n\r\n")),
        case("too long chunk extension", 413, chunked(b"0;" + b"a" * 27 + b"\r\n\r\n")),
        case("too long chunk extension, no end in sight", 413, chunked(b"0;" + b"a" * 29)),
        case("after much data too", 413, chunked(b"a\r\naaaaaaaaaa\r\n0;" + b"a" * 27 + b"\r\n\r\n")),
        case("many chunk extensions", 413, chunked(b"1;aaaaaa\r\na\r\n" * 4 + LAST)),
        case("many small chunks", None, chunked(b"1\r\na\r\n" * 5 + LAST)),
        case("too many small chunks", 413, chunked(b"1\r\na\r\n" * 6 + LAST)),
        case("trailers at their limit", None, chunked(b"0\r\n" + b"A: " + b"a" * 23 + b"\r\n\r\n")),
        case("trailers above it", 431, chunked(b"0\r\n" + b"A: " + b"a" * 20 + b"\r\nB:\r\n\r\n")),
        case("trailers above it, no end in sight", 431, chunked(b"0\r\n" + b"A: " + b"a" * 28)),
    ],
)
def test_limits_hold_to_the_byte(status: int | None, stream: bytes) -> None:
    assert read_in_every_way(stream, TIGHT).status == status


def test_data_buys_an_eighth_of_chunk_framing_but_no_trailers() -> None:
    chunks = b"".join(b"30\r\n%048d\r\n" % i for i in range(1000))
    limits = Limits(chunk_overhead_bytes=100)
    assert read([chunked(chunks + LAST)], limits).status is None
    assert read([chunked(chunks + b"0\r\n" + b"X: y\r\n" * 20 + b"\r\n")], limits).status == 431


# What it costs


def pieces_of(stream: bytes, size: int) -> list[bytes]:
    return [stream[i : i + size] for i in range(0, len(stream), size)]


@pytest.mark.parametrize(
    ("stream", "size", "limits"),
    [
        case("8 MiB of content in 2,000 pieces", post(b"Content-Length: 8388608", body=bytes(8388608)), 4200, Limits()),
        case(
            "8 MiB in one chunk in 2,000 pieces",
            chunked(b"800000\r\n" + bytes(8388608) + b"\r\n" + LAST),
            4200,
            Limits(),
        ),
        case("100 KiB of content byte by byte", post(b"Content-Length: 102400", body=bytes(102400)), 1, Limits()),
        case("64 KiB of head byte by byte", get(b"/", b"X: " + b"a" * 65536), 1, Limits(head_bytes=70000)),
        case(
            "64 KiB of target byte by byte", get(b"/" + b"a" * 65536), 1, Limits(head_bytes=70000, target_bytes=70000)
        ),
        case(
            "64 KiB of chunk extension byte by byte",
            chunked(b"0;" + b"a" * 65536 + b"\r\n\r\n"),
            1,
            Limits(chunk_overhead_bytes=70000),
        ),
        case(
            "10,000 chunks of 100 bytes", chunked((b"64\r\n" + b"a" * 100 + b"\r\n") * 10_000 + LAST), 65536, Limits()
        ),
        case("16 KiB of spaces in a field", get(b"/", b"X:" + b" " * 16000 + b"a"), 65536, Limits()),
        case("2,000 pipelined requests in one piece", GET * 2000, 65536, Limits()),
    ],
)
def test_time_is_linear_in_the_size_of_a_request(stream: bytes, size: int, limits: Limits) -> None:
    pieces = pieces_of(stream, size)
    best = least(lambda: timed(lambda: read(pieces, limits)), 1.5)
    assert best < 1.5, "quadratic work takes several seconds, linear work a tenth of one"


def timed(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


@pytest.mark.parametrize(
    "stream",
    [
        case("field", b"GET / HTTP/1.1\r\nHost: x\r\nX:" + b" " * 16000 + b"\x01\r\n\r\n"),
        case("field name", get(b"/", b" " * 16000 + b"\xff:")),
        case("target", get(b"/" + b"%41" * 2700 + b"%")),
        case("chunk extension", chunked(b"1" + b" ;a = b" * 2300 + b" =\r\n")),
        case("quoted chunk extension", chunked(b'1;a="' + b"\\\\" * 8000 + b"\x00\r\n")),
        case("transfer codings", post(b"Transfer-Encoding: " + b"a," * 8000)),
        case("connection options", post(b"Connection: " + b"a, " * 5000, b"Content-Length: x")),
    ],
)
def test_no_input_makes_a_pattern_backtrack(stream: bytes) -> None:
    assert least(lambda: timed(lambda: read([stream], ROOMY)), 0.1) < 0.1


def test_memory_grows_with_what_has_arrived_only() -> None:
    tracemalloc.start()
    try:
        parsers = [RequestParser(ROOMY) for _ in range(100)]
        for parser in parsers:
            parser.receive_data(post(b"Content-Length: 8388608", body=b"a" * 100))
            assert parser.next_request() is None
        assert tracemalloc.get_traced_memory()[0] < 100 * 2000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [65536, 1 << 23])
@pytest.mark.parametrize("rest", [b"G", GET[:-1], post(b"Content-Length: 9", body=b"x"), chunked(b"9\r\nx")])
def test_a_small_rest_does_not_keep_a_large_piece_in_memory(size: int, rest: bytes) -> None:
    tracemalloc.start()
    try:
        pieces = pieces_of(post(b"Content-Length: 1000000", body=b"8" * 1_000_000) + rest, size)
        parser = RequestParser(ROOMY)
        while pieces:
            parser.receive_data(pieces.pop(0))
            while parser.next_request() is not None:
                pass
        assert not parser.idle
        assert tracemalloc.get_traced_memory()[0] < 20_000
    finally:
        tracemalloc.stop()


def test_a_large_body_is_copied_once_when_it_is_complete() -> None:
    stream = post(b"Content-Length: 8388608", body=bytes(8388608))
    pieces = pieces_of(stream, 65536)
    tracemalloc.start()
    try:
        read(pieces, ROOMY)
        assert tracemalloc.get_traced_memory()[1] < 2.3 * 8388608
    finally:
        tracemalloc.stop()


def progress(parser: RequestParser) -> tuple[object, bool, int]:
    return parser.head, parser.idle, parser.buffered_bytes


def test_buffered_bytes_and_head_tell_how_far_it_has_come() -> None:
    parser = RequestParser(ROOMY)
    assert parser.idle
    parser.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\n")
    assert parser.next_request() is None
    assert progress(parser) == (None, False, 26)
    parser.receive_data(b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert parser.next_request() is None
    head, *rest = progress(parser)
    assert isinstance(head, Head)
    assert head.expect_continue
    assert rest == [False, 0]
    parser.receive_data(b"hell")
    assert parser.next_request() is None
    assert parser.buffered_bytes == 4
    parser.receive_data(b"o\r")
    found = parser.next_request()
    assert found is not None
    assert found.body == b"hello"
    assert progress(parser) == (None, False, 1)


def test_chunks_count_as_buffered_bytes() -> None:
    parser = RequestParser(ROOMY)
    parser.receive_data(chunked(b"5\r\nhello\r\n5\r\nwor"))
    assert parser.next_request() is None
    assert parser.head is not None
    assert parser.buffered_bytes == 8


def test_no_error_repeats_what_the_client_sent() -> None:
    for parameters in REFUSED:
        stream = parameters.values[1]
        assert isinstance(stream, bytes)
        parser = RequestParser(ROOMY)
        parser.receive_data(stream.replace(b"X", b"EVIL"))
        with pytest.raises(HttpError) as caught:
            parser.next_request()
        assert "evil" not in caught.value.detail.lower()
        assert "\n" not in caught.value.detail


# Responses


def encode(
    status: int,
    body: bytes = b"",
    extra: bytes = b"",
    keep_alive: bool = True,
    method: str = "GET",
    http10: bool = False,
) -> tuple[bytes, ...]:
    version, option = ("1.0", "keep-alive") if http10 else ("1.1", "x")
    head = single_request(f"{method} / HTTP/{version}\r\nHost: x\r\nConnection: {option}\r\n\r\n".encode()).head
    exchange = Exchange(cast(Client, None), head, 0.0)
    exchange.close = not keep_alive
    exchange.response = status, body, b"application/json", extra
    return exchange.encode(b"Tue, 15 Nov 1994 08:12:31 GMT")


def response(*args: Any, **kwargs: Any) -> bytes:
    return b"".join(encode(*args, **kwargs))


def test_response_is_these_bytes() -> None:
    assert response(200, b"{}", b"X: y\r\n") == (
        b"HTTP/1.1 200 OK\r\nDate: Tue, 15 Nov 1994 08:12:31 GMT\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\nX: y\r\n\r\n{}"
    )


def test_a_large_body_is_written_without_a_copy() -> None:
    body = bytes(100_000)
    assert encode(200, body)[-1] is body


def test_rfc_9110_9_3_2_an_answer_to_head_has_no_body() -> None:
    assert response(200, b"{}", method="HEAD") == response(200, b"{}")[:-2]


def test_rfc_9112_9_3_keep_alive_is_sent_to_1_0_clients() -> None:
    """`Connection: close` is sent to clients of both versions."""
    for status, http10 in itertools.product((200, 204), (False, True)):
        assert b"\r\nConnection: close\r\n" in response(status, keep_alive=False, http10=http10)
        assert (b"\r\nConnection: keep-alive\r\n" in response(status, http10=http10)) == http10
    assert response(200, http10=True).startswith(b"HTTP/1.1 "), "RFC 9110 section 2.5: our own version"


def test_rfc_9110_section_8_6_no_content_has_no_length() -> None:
    assert (
        response(204, b"ignored", b"Allow: GET\r\n")
        == b"HTTP/1.1 204 No Content\r\nDate: Tue, 15 Nov 1994 08:12:31 GMT\r\nAllow: GET\r\n\r\n"
    )


@pytest.mark.parametrize("status", [200, 204, 400, 404, 413, 431, 503, 505])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("keep_alive", [False, True])
@pytest.mark.parametrize("body", [b'{"detail":"x"}', bytes(100_000)], ids=["small", "large"])
def test_h11_reads_our_responses_to_their_last_byte(status: int, method: str, keep_alive: bool, body: bytes) -> None:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(response(status, body, keep_alive=keep_alive, method=method))
    head = client.next_event()
    assert isinstance(head, h11.Response)
    assert head.status_code == status
    received = b""
    while isinstance(event := client.next_event(), h11.Data):
        received += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert received == (b"" if method == "HEAD" or status == 204 else body)
    assert client.trailing_data == (b"", False)
    assert (client.their_state is h11.DONE) == keep_alive


def test_continue_is_an_interim_response() -> None:
    client = h11.Connection(h11.CLIENT)
    client.send(
        h11.Request(
            method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "1"), ("Expect", "100-continue")]
        )
    )
    client.receive_data(CONTINUE)
    event = client.next_event()
    assert isinstance(event, h11.InformationalResponse)
    assert event.status_code == 100
