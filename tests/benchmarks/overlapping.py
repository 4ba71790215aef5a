"""What chunks of a split MLP gain where messages really travel: two ranks on two network namespaces of this machine, as
two hosts, with a link of 200 Mbit/s between them. (On loopback a message is processor work, and hides behind nothing.)

Needs root, `ip` and `tc`; elsewhere it says so and gives no rows.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import torch.distributed as dist
import torch.distributed.nn  # noqa: F401 - lets the group end before Python does

from .paired import paired_ratio
from .tensor_parallel import CHUNKS, chunked, row

MBIT = 200
SWEEP = [(1024, 64), (512, 128), (512, 256), (512, 512), (256, 1024), (128, 2048)]  # tokens, width


def rows(pairs=30):
    """As tensor_parallel.rows: the ratio of a step in 2 or 4 chunks to the step in one."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        print("overlapping: needs root, ip and tc (iproute2); left out")
        return
    for tokens, width, times, share in on_two_hosts(pairs):
        name = f"MLP of {width} on {tokens} tokens, {MBIT} Mbit/s, {share:.0%} of the step in messages"
        for chunks in CHUNKS:
            ratio = paired_ratio(times[str(chunks)], times["1"])
            yield row(f"{name}: {chunks} chunks / 1", 2, *ratio, "×", "least where shares are equal")


def on_two_hosts(pairs):
    """[(tokens, width, {chunks: seconds}, share)], from rank 0 of two torchruns in namespaces of their own."""
    hosts = [f"pardist-{i}" for i in range(2)]
    links = [f"pardist{i}" for i in range(2)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (host, link) in enumerate(zip(hosts, links, strict=True)):
            ip("link", "set", link, "netns", host)
            ip("-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", link)
            for up in (link, "lo"):
                ip("-n", host, "link", "set", up, "up")
            shape = ["root", "tbf", "rate", f"{MBIT}mbit", "burst", "256kb", "latency", "50ms"]
            ip("netns", "exec", host, "tc", "qdisc", "add", "dev", link, *shape)
        with tempfile.TemporaryFile("w+") as said:
            started = []
            for i in (1, 0):
                command = ["ip", "netns", "exec", hosts[i], sys.executable, "-m", "torch.distributed.run"]
                command += ["--nnodes=2", f"--node-rank={i}", "--nproc-per-node=1", "--master-addr=10.77.0.1"]
                command += ["--master-port=29511", "-m", __name__, str(pairs)]
                env, out = settings | {"GLOO_SOCKET_IFNAME": links[i]}, said if i == 0 else subprocess.DEVNULL
                started.append(subprocess.Popen(command, env=env, stdout=out))
            if any(process.wait(600) for process in started):
                raise RuntimeError("a rank failed: its message is above")
            said.seek(0)
            return [json.loads(line) for line in said if line.startswith("[")]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], stderr=subprocess.DEVNULL)  # its link goes with it


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def main(pairs):
    dist.init_process_group("gloo")
    for tokens, width in SWEEP:
        times, share = chunked(tokens, width, pairs)
        if dist.get_rank() == 0:
            print(json.dumps([tokens, width, times, share]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
