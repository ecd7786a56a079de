"""`python3 -m scripts.setup GOAL`: install what this machine lacks for `make GOAL`.

It prints what it installs, and nothing when all is there. System packages come from apt where that is possible: as
root, or with a sudo that asks for no password.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from scripts import rabbitmq

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
OLDEST_PYTHON = (3, 11)

# `make run` finds its own broker. A test that needs one of OPTIONAL is skipped without it, with the reason.
APT_PACKAGES = {
    "run": (),
    "check": (),
    "chaos": ("rabbitmq-server",),
    "bench": ("rabbitmq-server", "wrk"),
    "test": (
        *("rabbitmq-server", "chromium", "chromium-driver", "nginx-light", "haproxy"),
        *("nodejs", "gcc", "libc6-dev", "libcurl4-openssl-dev"),
    ),
}
OPTIONAL = {*APT_PACKAGES["test"]} - {"rabbitmq-server"}
# The program of a package, where its name differs from the package's.
PROGRAMS = {
    "chromium-driver": "chromedriver",
    "nginx-light": "nginx",
    "nodejs": "node",
    "libc6-dev": "gencat",
    "libcurl4-openssl-dev": "curl-config",
}

# A package must start no service, now (policy-rc.d: 101) or at the next boot: only its programs are wanted, and a
# broker on port 5672 would take the place of the private node, which has the messages.
_APT_INSTALL = """
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap "rm -f $policy" EXIT
  printf '#!/bin/sh\\nexit 101\\n' >$policy && chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 "$@"; }
install "$@" || { apt-get update && install "$@"; } || exit 1
case " $* " in *" rabbitmq-server "*)
  [ ! -d /run/systemd/system ] || systemctl disable rabbitmq-server.service epmd.socket || true ;;
esac
"""


def main(arguments: list[str]) -> str | None:
    """Return what is wrong as one line, or None."""
    if len(arguments) != 1 or arguments[0] not in APT_PACKAGES:
        return f"usage: python3 -m scripts.setup {'|'.join(APT_PACKAGES)}"
    goal = arguments[0]
    if sys.version_info < OLDEST_PYTHON:
        return f"Python {sys.version.split()[0]} is older than 3.11: make {goal} PYTHON=/usr/bin/python3.11"
    missing = [package for package in APT_PACKAGES[goal] if not is_installed(package)]
    if missing and not apt_install(*missing) and (required := set(missing) - OPTIONAL):
        return f"make {goal} needs {' and '.join(sorted(required))}: sudo apt-get install {' '.join(sorted(required))}"
    if goal == "run":
        return install_requirements("requirements.txt")
    trouble = install_requirements("requirements-dev.txt", "requirements.txt")
    if goal == "bench" and trouble is None and (optional := install_requirements("requirements-bench.txt")):
        print(f"{optional}; the benchmark continues without mq-bridge", flush=True)
    return trouble


def is_installed(package: str) -> bool:
    if package == "rabbitmq-server":
        return rabbitmq.is_installed()
    return shutil.which(PROGRAMS.get(package, package), path=os.environ["PATH"] + ":/usr/sbin") is not None


def install_requirements(name: str, *included: str) -> str | None:
    """Install the packages that the file pins into .venv, unless that was done with exactly these files.

    `included` are files whose pins are all in this one, so that they need no run of their own.
    """
    stamps = {VENV / f"{file}.installed": (ROOT / file).read_text() for file in (name, *included)}
    usable = runs(PYTHON, "-c", "")  # no longer after the system's Python was replaced
    if usable and all(stamp.exists() and stamp.read_text() == wanted for stamp, wanted in stamps.items()):
        return None
    print(f"Installing the packages of {name} into .venv (once)", flush=True)
    pip = [PYTHON, "-m", "pip"] if usable and runs(PYTHON, "-m", "pip", "--version") else create_venv()
    if pip is None:
        return "this Python cannot make virtual environments: sudo apt-get install python3-venv"
    command = [*pip, "install", "-qq", "--disable-pip-version-check", "--require-hashes", "--requirement", ROOT / name]
    if subprocess.run(command).returncode != 0:
        return f"pip could not install {name}: see above"
    for stamp, wanted in stamps.items():
        stamp.write_text(wanted)
    return None


def create_venv() -> list[str | Path] | None:
    """Make .venv; return the pip command for it, or None. In Debian, ensurepip is a package of its own."""
    if runs(sys.executable, "-c", "import ensurepip") or apt_install("python3-venv"):
        return [PYTHON, "-m", "pip"] if runs(sys.executable, "-m", "venv", "--clear", VENV) else None
    outer_pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", PYTHON]  # since pip 22.3
    usable = runs(sys.executable, "-m", "venv", "--clear", "--without-pip", VENV) and runs(*outer_pip, "--version")
    return outer_pip if usable else None


def apt_install(*packages: str) -> bool:
    """Install packages; return whether they are there now. False without apt, or without the right to use it."""
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or not runs(*prefix, "true"):
        return False
    print(f"Installing {' '.join(packages)} with apt (once)", flush=True)
    done = subprocess.run(
        [*prefix, "sh", "-c", _APT_INSTALL, "sh", *packages],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        print(*done.stdout.splitlines()[-5:], sep="\n", file=sys.stderr, flush=True)
    return done.returncode == 0


def runs(*command: str | Path) -> bool:
    """Return whether the command exists and exits with 0."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
