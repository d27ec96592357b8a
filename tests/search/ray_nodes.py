"""A search by one worker of two processes in a Ray cluster of two nodes, one process on each; one of the nodes leaves.

    python -m tests.search.ray_nodes OUT longrope-arguments…

A third node comes before the first leaves. All nodes are of this machine, with one CPU each.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster


def main(out: Path, arguments: list[str]) -> int:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        first, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
        shared = ["--ray-address", cluster.address, "--workers", "1", "--context-parallel", "2", "-o", str(out)]
        search = subprocess.Popen([sys.executable, "-m", "longrope", *arguments, *shared])
        log = out / "search.jsonl"
        while not log.exists() or len(log.read_text("utf-8").splitlines()) < 9:
            assert search.poll() is None
            time.sleep(0.1)
        cluster.add_node(num_cpus=1)
        cluster.remove_node(first, allow_graceful=False)
        assert search.poll() is None, "the search was over before the node left"
        return search.wait()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
