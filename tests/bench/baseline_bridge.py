"""mq-bridge, a message bridge in Rust with Python bindings: HTTP → AMQP, answered after the publisher confirm.

It is the fastest thing that a user can install instead. It does less: the body is not validated and not echoed, and the
message is not mandatory and has no id. The queue is the same quorum queue, declared before the start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from mq_bridge import Route, init_logging

# The best of the combinations tried: many small batches at once, and one acceptor, for two cores.
TUNED = {"batch_size": 64, "concurrency": 32}
TUNED_HTTP = {"workers": 1}

tuned = sys.argv[1:] == ["tuned"]
http = {"url": f"127.0.0.1:{os.environ['HTTP_PORT']}", "path": "/process"} | (TUNED_HTTP if tuned else {})
# Its URL parser reads a final slash as an empty vhost.
url = os.environ["AMQP_URL"].removesuffix("/") + "/%2f"
amqp = {"url": url, "queue": os.environ["QUEUE_NAME"], "no_declare_queue": True}
bench = {"input": {"http": http}, "output": {"amqp": amqp}} | (TUNED if tuned else {})

init_logging("error")
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
route = Route.from_config({"routes": {"bench": bench}}, "bench")
route.start()
stop.wait()
route.stop()
route.join()
