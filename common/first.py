"""Signals during the imports. producer.py and consumer.py import this first, so that none ends or escapes them.

SIGHUP, whose default ends a process, is ignored until there is a handler: what it would reload is not loaded yet.
SIGINT ends the process without a traceback.

The kernel drops a signal for which PID 1 of a container has no handler (pid_namespaces(7)): without this one, a stop in
the first third of a second waits for the container engine's SIGKILL. By then nothing has been accepted.
"""

import os
import signal
import sys

signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
