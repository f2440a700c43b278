"""On loopback a store listens there alone, and is a store; elsewhere torch has its way."""

import multiprocessing
import os
import socket
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from infra.train.meeting import keep_to_loopback


def meet(rank, host, port, queue):
    keep_to_loopback()
    keep_to_loopback()  # a process may be told again
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    listening = {
        each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN
    }
    queue.put((rank, total.item(), listening))
    dist.barrier()
    dist.destroy_process_group()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(("host", "alone"), [("127.0.0.1", True), ("localhost", False)])
def test_workers_meet(host, alone):
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    workers = [context.Process(target=meet, args=(rank, host, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = sorted(queue.get(timeout=50) for _ in workers)
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [total for _, total, _ in found] == [3, 3]
    assert (set().union(*(listening for _, _, listening in found)) == {"127.0.0.1"}) == alone
