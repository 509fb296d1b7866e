"""Align on a Ray cluster from Python, as ``realign-fast align --engine ray`` does.

    python examples/align_on_ray.py TEXT_DIR IMAGE_DIR OUT ray://HOST:10001

Without an address, Ray is started on this machine for the run. TEXT_DIR, IMAGE_DIR and OUT are
paths that this machine and every node can read. A run that stopped continues when it is started
again.
"""

import argparse

from realign_fast.pipeline import align
from realign_fast.pipeline.engines.ray_driver import RayTasks

parser = argparse.ArgumentParser(description=__doc__)
for name in ("text", "image", "out"):
    parser.add_argument(name)
parser.add_argument("address", nargs="?")
options = parser.parse_args()

with RayTasks(options.address, cpus_per_task=1, retries=3) as engine:
    report = align(options.text, options.image, options.out, engine=engine)
print(f"centroid gap {report['result']['centroid_gap']:.6f}; wrote {options.out}")
