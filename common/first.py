"""Signals that arrive during the imports. producer.py and consumer.py import this module before any other.

SIGHUP, whose default ends a process, is ignored until there is a handler: what it would reload is not loaded yet.
SIGINT ends the process without a traceback.

The kernel drops a signal for which PID 1 of a container has no handler (pid_namespaces(7)). Without one for SIGTERM, a
stop in the first third of a second would wait for the container engine's SIGKILL. Nothing has been accepted by then.
"""

import os
import signal
import sys

signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
