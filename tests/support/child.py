"""How tests start the processes under test."""

# Goes before a command: the kernel kills the process when the thread that started it ends. With a preexec_fn in its
# place Python forks, and to copy the memory map of a worker of pytest takes ten times the CPU.
WITH_US = ("setpriv", "--pdeathsig", "KILL")
