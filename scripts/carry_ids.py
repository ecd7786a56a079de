"""A step of changing PARTITIONS (docs/scaling.md): the new CSVs get the message ids that the old ones remember.

`python -m scripts.carry_ids --csv-file data/data.csv --from 1 --to 4`, while no consumer runs. A client that got no
answer before the change and retries after it meets another partition, which then knows that the event is stored.
Each new CSV gets all ids, since no journal knows which device an id came from. A second run changes nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain, islice, zip_longest

from common.config import LEAST_DEDUP_WINDOW
from common.consumer.partitions import csv_file
from common.errors import DiskTrouble, StartupError
from common.storage.journal import read_journal
from common.storage.lock import Lock
from common.storage.records import JournalCorrupt, Reading, split_ids
from common.storage.store import Store

log = logging.getLogger("carry_ids")


def carry_ids(path: str, before: int, after: int, dedup_window: int) -> int:
    """Return how many ids each new CSV now knows. Raise StartupError or DiskTrouble; then it can be run again."""
    old = [csv for csv in csv_files(path, before) if os.path.exists(f"{os.path.realpath(csv)}.journal")]
    if not old:
        raise StartupError(f"no consumer has written {path} with {before} partition(s): there is nothing to carry")
    new = csv_files(path, after)
    with ExitStack() as locks:
        for csv in dict.fromkeys([*old, *new]):
            lock = Lock(csv)
            if not lock.acquire():
                raise StartupError(f"a consumer of {csv} is running: stop all consumers first")
            locks.callback(lock.release)
        ids = latest([_ids(csv, dedup_window) for csv in old], dedup_window)
        for csv in new:
            store = Store.open(csv, dedup_window, 0, log)
            try:
                store.append(b"", [id for id in ids if not store.seen(id)])
            finally:
                store.close()
    return len(ids)


def csv_files(path: str, partitions: int) -> list[str]:
    return [path] if partitions == 1 else [csv_file(path, number) for number in range(partitions)]


def latest(lists: Sequence[Sequence[bytes]], count: int) -> list[bytes]:
    """Return the last `count` ids of lists in order of time, oldest first, with the same share of each list."""
    from_the_end = chain.from_iterable(zip_longest(*(reversed(ids) for ids in lists)))
    distinct = dict.fromkeys(id for id in from_the_end if id is not None)
    return list(islice(distinct, count))[::-1]


def _ids(csv: str, dedup_window: int) -> list[bytes]:
    reading = Reading(f"{os.path.realpath(csv)}.journal", dedup_window, 0)
    try:
        read_journal(reading)
        reading.last_commit()
    except JournalCorrupt as error:
        text = f"{reading.path}: {error}; start the consumer once, which repairs it, then stop it"
        raise StartupError(text) from error
    except OSError as error:
        raise StartupError(f"{reading.path}: {error.strerror}") from error
    return list(split_ids(reading.ids))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.carry_ids",
        description="Copy remembered message ids to the CSVs of a new number of partitions, while no consumer runs.",
    )
    parser.add_argument("--csv-file", default=os.environ.get("CSV_FILE") or "data/data.csv", metavar="PATH")
    parser.add_argument("--from", dest="before", type=int, required=True, metavar="N", help="the old PARTITIONS")
    parser.add_argument("--to", dest="after", type=int, required=True, metavar="N", help="the new PARTITIONS")
    window = int(os.environ.get("DEDUP_WINDOW") or 200_000)
    parser.add_argument("--dedup-window", type=int, default=window, metavar="N", help="ids (default %(default)s)")
    options = parser.parse_args(arguments)
    if not 1 <= options.before <= 1024 or not 1 <= options.after <= 1024:
        parser.error("--from and --to are 1 to 1024")
    try:
        window = max(options.dedup_window, LEAST_DEDUP_WINDOW)
        count = carry_ids(options.csv_file, options.before, options.after, window)
    except (StartupError, DiskTrouble) as error:
        print(f"carry_ids: {error}", file=sys.stderr)
        return 1
    print(f"{options.after} CSV(s) of {options.csv_file} now know {count:,} messages that are already stored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
