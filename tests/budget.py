"""What the tests of a family of models cost: CPU-seconds over those of a calibration loop, against a mark.

The tests of a file count where it says `pytestmark = pytest.mark.family("config")`; the names are those of the
parameters that are models. The terminal is told always; over the mark by `SLACK` a run fails where CI is set.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

CONFIGURATION, FAMILY = 2.0, 10.0  # seconds that all tests of a model, and all of a family, may take
SLACK = 3
LOOP = 0.45  # CPU-seconds of the loop on the machine whose seconds the marks are


def calibrate() -> float:
    """CPU-seconds of a fixed piece of work, as tests of models do it: small products, one after another."""
    x, w = torch.ones(64, 64), torch.full((64, 64), 1 / 64)
    begun = time.process_time()
    with torch.no_grad():
        for _ in range(40_000):
            x = torch.tanh(x @ w) + 1
    return time.process_time() - begun


def used() -> float:
    """CPU-seconds so far of this process and of all that it started, ended or not."""
    spent = 0.0
    for process in [(this := psutil.Process()), *this.children(recursive=True)]:
        try:
            spent += sum(process.cpu_times()[:4])  # user and system, its own and of its ended children
        except psutil.Error:  # it has just ended: whoever waits for it has its seconds
            continue
    return spent


class Budget:
    """The plugin: measures where tests run, adds up where they are reported."""

    def __init__(self) -> None:
        self._loop = 0.0
        self.costs: dict[tuple[str, str], float] = defaultdict(float)  # by file, and by model or "" for all of it

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        if model(item) is not None:
            self._loop = self._loop or calibrate()
            self._begun = used()
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        if call.when == "teardown" and (name := model(item)) is not None:
            cost = (used() - self._begun) * LOOP / self._loop
            item.user_properties.append(("cost", [name, round(cost, 3)]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name == "cost":
                file, (one, cost) = report.location[0], value
                for key in {one, ""}:
                    self.costs[file, key] += cost

    def over(self) -> list[str]:
        """What costs more than its mark by far."""
        return [
            f"{file}{f' [{name}]' if name else ''} costs {cost:.1f} s, more than {SLACK} times the {mark:g} s of a "
            f"{'model' if name else 'family'}. Make it smaller, or mark its trainings `long`."
            for (file, name), cost in sorted(self.costs.items())
            if cost > SLACK * (mark := CONFIGURATION if name else FAMILY)
        ]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over() and os.environ.get("CI") and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for file in sorted(file for file, name in self.costs if not name):
            models = {name: cost for (of, name), cost in self.costs.items() if of == file and name}
            dearest = max(models, key=lambda name: models[name], default="")
            each = f"; the dearest model, {dearest}: {models[dearest]:.1f} of {CONFIGURATION:g} s" if models else ""
            terminalreporter.write_line(f"{file}: {self.costs[file, '']:.1f} of {FAMILY:g} s{each}")
        for line in self.over():
            terminalreporter.write_line(f"OVER BUDGET: {line}", red=True)


def model(item: pytest.Item) -> str | None:
    """The model that a test is of, "" where it is of its whole family; None where it does not count."""
    family = item.get_closest_marker("family")
    if family is None or item.get_closest_marker("long") or item.get_closest_marker("faults"):
        return None
    callspec = getattr(item, "callspec", None)
    return next((str(callspec.params[name]) for name in family.args if callspec and name in callspec.params), "")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "family(names): of a family of models; names of the parameters that are models")
    config.pluginmanager.register(Budget(), "budget")
