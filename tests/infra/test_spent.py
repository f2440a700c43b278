"""CPU-seconds of a process and all that it started, those that have gone, too."""

import os
import subprocess
import sys
import time

from infra.spent import CpuWatch

BURN = "import time\nb = bytearray(100_000_000)\nwhile time.process_time() < {}: sum(range(9999))\n"
NEST = "import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {!r}], check=True)\ntime.sleep(1.2)"


def test_children_and_theirs_are_counted_after_they_have_gone():
    before = os.times()
    with CpuWatch(every_seconds=0.05) as watch:
        for code in (BURN.format(0.8), NEST.format(BURN.format(0.8))):
            subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    wanted = sum(after[:4]) - sum(before[:4])  # the system's own account, once all are waited for
    assert wanted > 1.6
    assert abs(watch.seconds() - wanted) < 0.35
    assert 0.1 < watch.largest_gb < 1


def test_what_came_before_is_not_counted():
    end = time.process_time() + 0.3
    while time.process_time() < end:
        sum(range(9999))
    with CpuWatch() as watch:
        pass
    assert watch.seconds() < 0.2
    assert watch.largest_gb < 1000
