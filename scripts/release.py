"""`python3 -m scripts.release [TAG]`: check that every place names the same version, then build what is published.

Without TAG, as `make release` runs it: before the tag exists. With TAG, as the release workflow runs it: for that tag,
without the image, which the workflow builds for two architectures.
"""

import re
import shutil
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path

from common import __version__

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"

# The places that name the version, besides common/__init__.py. Every match of a pattern is compared.
PLACES = {
    "pyproject.toml": r'^version = "(.*)"',
    "Dockerfile": r'org\.opencontainers\.image\.version="(.*)"',
    "compose.yaml": r"^ +image: predlog(?:-tests)?(?::(.*))?$",
    "deploy/compose/compose.cluster.yaml": r"^ +image: predlog(?::(.*))?$",
    "deploy/kubernetes/kustomization.yaml": r"^ +newTag: (.*)$",
}
EMPTY_UNRELEASED = re.compile(r"^## \[Unreleased\]\s+(?=## )", re.MULTILINE)
HEADING = re.compile(r"^## \[(.+?)\](?: - (\S+))?$", re.MULTILINE)


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        print("usage: python3 -m scripts.release [TAG]", file=sys.stderr)
        return 2
    changelog = (ROOT / "CHANGELOG.md").read_text()
    wrong = wrong_places(ROOT, __version__) + wrong_changelog(changelog, __version__, datetime.now(UTC).date())
    tag = f"v{__version__}"
    if arguments and arguments != [tag]:
        wrong.append(f"the tag is {arguments[0]}, and the version is {__version__}")
    if not arguments:
        wrong += wrong_repository(tag)
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        return 1

    DIST.mkdir(exist_ok=True)
    archive = DIST / f"predlog-{__version__}.tar.gz"
    git("archive", f"--prefix=predlog-{__version__}/", f"--output={archive}", "HEAD")
    notes = DIST / "notes.md"
    notes.write_text(section(changelog, __version__))
    print(f"{archive.relative_to(ROOT)}, {notes.relative_to(ROOT)}")
    if arguments:
        return 0

    build = ["docker", "buildx", "build", "--load", "--tag", f"predlog:{__version__}", "."]
    if works("docker", "buildx", "inspect"):
        subprocess.run(build, cwd=ROOT, check=True)
    else:
        print(f"The image was not built, because Docker's buildx does not work here: {' '.join(build)}")
    print(f"When `make test` passes: git tag -a {tag} -m 'predlog {__version__}' && git push origin {tag}")
    return 0


def wrong_places(root: Path, version: str) -> list[str]:
    """One line for each place that names another version, or none."""
    wrong = []
    for name, pattern in PLACES.items():
        found = re.findall(pattern, (root / name).read_text(), re.MULTILINE) or [""]
        wrong += [f"{name} has version {each or '(none)'} instead of {version}" for each in found if each != version]
    return wrong


def wrong_changelog(changelog: str, version: str, today: date) -> list[str]:
    """One line if the newest section is not that of the version, or has no date up to today."""
    newest = HEADING.search(EMPTY_UNRELEASED.sub("", changelog))
    name, day = newest.groups() if newest else (None, None)
    if name != version:
        return [f"CHANGELOG.md begins with [{name}] instead of [{version}]"]
    try:
        if date.fromisoformat(day or "") <= today:
            return []
    except ValueError:
        pass
    return [f"CHANGELOG.md dates {version} {day} instead of a day up to {today}"]


def wrong_repository(tag: str) -> list[str]:
    wrong = [f"not committed: {line[3:]}" for line in git("status", "--porcelain").splitlines()]
    return wrong + ([f"the tag {tag} exists"] if git("tag", "--list", tag) else [])


def section(changelog: str, version: str) -> str:
    """The text below the heading of a version, up to the next one."""
    _, *parts = HEADING.split(changelog)  # name, date, text, name, …
    return parts[parts.index(version) + 2].strip() + "\n"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def works(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
