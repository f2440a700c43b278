"""Audit the packages of a lock file: `python tests/audit.py requirements.lock`.

Known vulnerabilities are asked of PyPI by pip-audit. One that a newer version mends is a failure (exit code 1), unless
`audit.toml` beside this file lists it with a reason. Where nobody can be asked, that is said, and is no failure.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KNOWN = Path(__file__).with_name("audit.toml")
SECONDS = 300  # for all packages; a service that is there answers for each within a second


class UnansweredError(Exception):
    """Nobody could be asked."""


def ask(lock: str) -> list[dict[str, Any]]:
    """What pip-audit says of each package; UnansweredError where it is not there, or has nobody to ask."""
    beside = Path(sys.executable).with_name("pip-audit")
    program = shutil.which("pip-audit") or (str(beside) if beside.exists() else None)
    if program is None:
        raise UnansweredError("pip-audit is not installed")
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "10", "--format", "json"]
    try:
        told = subprocess.run(
            [program, "-r", lock, *options], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        packages = json.loads(told.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        raise UnansweredError(f"pip-audit had no answer after {SECONDS} s") from None
    except (ValueError, KeyError, TypeError):
        said = told.stderr.strip().splitlines() or [f"pip-audit ended with code {told.returncode} and without a word"]
        raise UnansweredError(said[-1][:300]) from None
    if not any("vulns" in package for package in packages):  # which pip-audit calls "No known vulnerabilities found"
        raise UnansweredError(f"the service knows none of {len(packages)} packages")
    return packages


def judge(packages: list[dict[str, Any]], known: dict[str, str]) -> Iterator[tuple[bool, str]]:
    """Whether it is a failure, and a line, for each thing to say; `known` has a reason for each that is let pass."""
    met: set[str] = set()
    for package in packages:
        if "vulns" not in package:
            yield False, f"not audited: {package['name']}: {package.get('skip_reason', 'no answer')}"
        for each in package.get("vulns", []):
            listed = {each["id"], *each.get("aliases", [])} & known.keys()
            met |= listed
            mended = ", ".join(each.get("fix_versions", []))
            line = f"{package['name']} {package['version']}: {each['id']}"
            if listed:
                yield False, f"{line} is let pass: {known[min(listed)]}"
            else:
                yield bool(mended), f"{line}, mended in {mended}" if mended else f"{line}, not mended yet"
    yield from ((False, f"{each} was not met: take it off {KNOWN.name}") for each in sorted(known.keys() - met))


def main(lock: str, known: dict[str, str]) -> int:
    """The exit code."""
    if unsaid := [each for each, reason in known.items() if not str(reason).strip()]:
        print(f"{KNOWN.name} gives no reason for {unsaid[0]}.")
        return 1
    try:
        packages = ask(lock)
    except UnansweredError as error:
        print(f"not audited: {error}")
        return 0
    verdicts = list(judge(packages, known))
    print(*(line for _, line in verdicts), f"{sum('vulns' in each for each in packages)} packages audited", sep="\n")
    return int(any(failure for failure, _ in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], tomllib.loads(KNOWN.read_text())))
