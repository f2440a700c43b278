"""The audit fails for what could be mended, and for nothing else; above all it does not call silence an answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).with_name("audit.py")
SOUND = {"name": "sound", "version": "1.0", "vulns": []}
SKIPPED = {"name": "odd", "skip_reason": "Dependency not found on PyPI and could not be audited: odd (1.0)"}


def weak(mended=("1.1",), name="weak"):
    found = {"id": "PYSEC-2026-1", "fix_versions": list(mended), "aliases": ["CVE-2026-1"], "description": "bad"}
    return {"name": name, "version": "1.0", "vulns": [found]}


@pytest.fixture
def audit(tmp_path):
    """Runs the command with a pip-audit that gives an answer; also what it was asked."""

    def run(answer, code=0, error="", known=""):
        (tmp_path / "audit.py").write_bytes(AUDIT.read_bytes())
        (tmp_path / "audit.toml").write_text(known)
        (tmp_path / "answer").write_text(answer if isinstance(answer, str) else json.dumps({"dependencies": answer}))
        if answer != "absent":
            fake = tmp_path / "pip-audit"
            fake.write_text(
                f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/answer\necho "{error}" >&2\nexit {code}\n'
            )
            fake.chmod(0o755)
        # An interpreter that has nothing beside it.
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").symlink_to(Path(sys.executable).resolve())
        environment = {"PATH": f"{tmp_path}:{os.defpath}"}
        command = [str(tmp_path / "bin" / "python"), str(tmp_path / "audit.py"), "requirements.lock"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)

    return run


def test_sound_packages_pass(audit, tmp_path):
    told = audit([SOUND, SOUND])
    assert (told.returncode, told.stdout) == (0, "2 packages audited\n")
    assert (tmp_path / "asked").read_text().startswith("-r requirements.lock --no-deps --disable-pip")


def test_what_a_newer_version_mends_fails(audit):
    told = audit([SOUND, weak()], code=1)
    assert told.returncode == 1
    assert "weak 1.0: PYSEC-2026-1, mended in 1.1" in told.stdout


def test_what_nobody_can_mend_is_said(audit):
    told = audit([weak(mended=())], code=1)
    assert told.returncode == 0
    assert "PYSEC-2026-1, not mended yet" in told.stdout


@pytest.mark.parametrize("by", ["PYSEC-2026-1", "CVE-2026-1"])
def test_what_is_listed_passes_with_its_reason(audit, by):
    told = audit([weak()], code=1, known=f'{by} = "not in our paths"\n')
    assert told.returncode == 0
    assert "is let pass: not in our paths" in told.stdout


def test_another_one_listed_lets_nothing_pass(audit):
    told = audit([weak()], code=1, known='CVE-2025-9 = "gone"\n')
    assert told.returncode == 1
    assert "CVE-2025-9 was not met" in told.stdout


def test_a_listing_without_a_reason_fails(audit):
    assert audit([SOUND], known='CVE-2026-1 = " "\n').returncode == 1


@pytest.mark.parametrize(
    ("answer", "code", "error", "said"),
    [
        ("absent", 0, "", "pip-audit is not installed"),
        ("", 1, "ConnectionError: no route to pypi.org", "no route to pypi.org"),
        ("", 1, "", "ended with code 1"),
        ("not json", 0, "", "ended with code 0"),
        ("[]", 0, "", "ended with code 0"),
        ([SKIPPED, SKIPPED], 0, "No known vulnerabilities found", "the service knows none of 2 packages"),
    ],
)
def test_where_nobody_answers_that_is_said(audit, answer, code, error, said):
    told = audit(answer, code, error)
    assert told.returncode == 0
    assert told.stdout.startswith("not audited: ")
    assert said in told.stdout
    assert told.stderr == ""


def test_a_package_that_is_not_known_is_named_beside_the_others(audit):
    told = audit([SOUND, SKIPPED, weak()], code=1)
    assert told.returncode == 1
    assert "not audited: odd: Dependency not found" in told.stdout
    assert "2 packages audited" in told.stdout
