"""Files on this machine and at URLs: paths, atomic writes, locks, reading ahead."""
