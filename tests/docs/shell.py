"""Runs the lines of a page as its reader would, in one folder; `rescribe` in this process, where Ray is up already."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from tests.docs.pages import ROOT

SECONDS = 240  # of one line that is a process of its own


@dataclass(frozen=True)
class Ended:
    """What came of a line."""

    code: int
    out: str
    err: str


class Shell:
    """`own`: the folder holds a copy of the project, and `rescribe` is that one, in a process of its own."""

    def __init__(self, folder: Path, own: bool = False) -> None:
        self.folder, self._own = folder, own
        programs = folder / ".bin"
        programs.mkdir(parents=True)
        for name, what in (("python", ""), ("rescribe", " -m workflows")):  # no links: python would leave its venv
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{what} "$@"\n')
            (programs / name).chmod(0o755)
        self._exported: dict[str, str] = {}
        self._environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder if own else ROOT),
            "PYTHONWARNINGS": "ignore",
        }

    def __call__(self, line: str) -> Ended:
        if line.startswith("export "):
            done = self._process(f"{line} && env -0")
            after = dict(each.split("=", 1) for each in done.out.split("\0") if "=" in each)
            self._exported |= {name: value for name, value in after.items() if self._environment.get(name) != value}
            self._environment = after
            return Ended(done.code, "", done.err)
        if line.startswith("rescribe ") and not self._own:
            return self._rescribe(line)
        return self._process(line)

    def python(self, program: str) -> Ended:
        """A block of Python on the page."""
        return self._process(f"python -c {shlex.quote(program)}")

    def _process(self, line: str) -> Ended:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self._environment, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    def _rescribe(self, line: str) -> Ended:
        from workflows.__main__ import main

        line, _, target = line.partition(" > ")
        words = self._process(f"printf '%s\\0' {line}").out.split("\0")[1:-1]  # bash's own quotes, braces and stars
        out, err, code, before = io.StringIO(), io.StringIO(), 0, os.getcwd()
        os.chdir(self.folder)
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                patch.dict(os.environ, self._exported),
            ):
                main(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception:
            code = -1
            err.write(traceback.format_exc())
        finally:
            os.chdir(before)
        if target:
            (self.folder / target).write_text(out.getvalue())
        return Ended(code, out.getvalue(), err.getvalue())


def filled(text: str, instead: dict[str, str], places: dict[str, str]) -> str:
    """A line or a program with what stands for what cannot be had."""
    for word, other in instead.items():
        text = text.replace(word, places.get(other, other))
    return text


def without_settings(line: str) -> str:
    """A line without the variables that are set before its program."""
    return re.sub(r"^(\w+=\S* +)+(?=\S)", "", line)
