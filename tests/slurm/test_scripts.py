"""The scripts themselves: what a shell would get wrong without saying so."""

import shutil
import subprocess

import pytest
from places import ROOT


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck(script):
    """Catches unquoted paths, unset variables and their kin."""
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    finished = subprocess.run(["shellcheck", script], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout
