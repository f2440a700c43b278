"""The package is found where Python is started beside a folder of its name, as a clone is."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


@pytest.mark.skipif(
    not Path(sysconfig.get_path("purelib"), "rescribe-source.pth").exists(), reason="was not installed by make install"
)
def test_a_folder_of_its_name_does_not_hide_the_package(tmp_path):
    (tmp_path / "rescribe").mkdir()
    found = subprocess.run(
        [sys.executable, "-c", "import rescribe; print(rescribe.load.__name__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.strip() == "load"
