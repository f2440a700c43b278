"""What actors do for the steps, done in this process: for tests of what steps decide, and not of who does the work."""

import sys

from infra.artifact import Step
from infra.data.ledger import Ledger, commit, pending, total
from infra.data.run import run_here


def shards_here(work, names, out, **_):
    """As `run_shards`, without Ray."""
    left, ledger = pending(out, names), Ledger(out)
    if left:
        work.setup()
    for name in left:
        ledger.add(name, commit(out, name, work(name)))
    return total(ledger.close().values())


def stages_here(stages, inputs, out, *, batch_size, actors, report):
    """As `run_stages`, without Ray."""
    return run_here(stages, inputs, out, batch_size=batch_size, report=report)


def work_here(monkeypatch, *steps):
    """What these steps, or what is in these modules, would have actors do is done here."""
    for each in steps:
        module = sys.modules[each.work.__module__] if isinstance(each, Step) else each
        monkeypatch.setattr(module, "connect", lambda cluster: None)
        for name, work in {"run_shards": shards_here, "run_stages": stages_here}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, work)
