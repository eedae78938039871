"""A Ray cluster of two machines of one core each, all on this one, beside a head without any. Run as a process:

    python ray_cluster.py FOLDER      prints HOST:PORT; `kill` on its input ends a machine at once, `add` begins one

FOLDER is where Ray keeps its logs; its path must be short, as sockets lie in it.
"""

import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 80 << 20


def main(folder: str) -> None:
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    machine = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    machines = [cluster.add_node(wait=False, **machine) for _ in range(2)]
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line == "kill\n":
            cluster.remove_node(machines.pop(), allow_graceful=False)
        elif line == "add\n":
            machines.append(cluster.add_node(**machine))
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
