"""List the locks of a run in a bucket, and remove those that gave no sign of life for long.

    python examples/stale_locks.py s3://bucket/aligned                        # list them
    python examples/stale_locks.py s3://bucket/aligned --minutes 15 --remove  # remove stale ones

A process that holds OUT rewrites its lock every minute. One that was killed cannot delete it, and
no other machine can see that it is dead. A lock without a sign of life for --minutes is called
stale. Make sure that its process is gone (`squeue`, `kubectl get pods`) before you give --remove: a
process that was only cut off from the network would return. The clocks of the machines must agree.

The status is 0 if no stale lock is left, 1 if one is left, and 2 if the store refuses a request.
"""

import argparse
import json
import sys
import time

import fsspec


def read(files, path):
    """Return what a lock says of its holder, or None if its run ended meanwhile."""
    try:
        return json.loads(files.cat_file(path))
    except FileNotFoundError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="URL of the output")
    parser.add_argument("--minutes", type=float, default=15, help="silence of a stale lock")
    parser.add_argument("--remove", action="store_true", help="remove stale locks")
    options = parser.parse_args()
    if "://" not in options.out:
        parser.error(f"{options.out}: locks of a directory end with their process; give a URL")
    try:
        return int(stale_locks_left(options) > 0)
    except Exception as error:  # the packages of the stores have classes of their own
        advice = "check the name, the connection, and whether the credentials have expired"
        print(f"{options.out}: {type(error).__name__}: {error}; {advice}", file=sys.stderr)
        return 2


def stale_locks_left(options):
    """List the locks of an output, remove stale ones if asked to, and count those that stay."""
    files, folder = fsspec.core.url_to_fs(options.out)
    left = 0
    for path in sorted(files.glob(f"{folder.rstrip('/')}/__realign__/_stats/lock*")):
        if (lock := read(files, path)) is None:
            continue
        minutes = (time.time() - lock["alive"]) / 60
        line = f"{path}: process {lock['pid']} on {lock['host']}, since {lock['since']}, "
        line += f"last sign of life {minutes:.0f} minutes ago"
        if minutes < options.minutes:
            print(f"{line}: alive")
        elif options.remove and read(files, path) == lock:  # nobody has written it meanwhile
            files.rm_file(path)
            print(f"{line}: removed")
        else:
            print(f"{line}: stale")
            left += 1
    return left


if __name__ == "__main__":
    raise SystemExit(main())
