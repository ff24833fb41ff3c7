"""CONTRIBUTING's diffs are real: they apply to this tree, and what they add passes the tests that they get for it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
TESTS = ["tests/test_links.py", "tests/test_losses.py", "tests/test_regularizers.py"]


def test_there_is_one_for_a_link_and_one_for_a_regulariser() -> None:
    assert ["fastpo/links.py" in diff for diff in DIFFS] == [True, False]
    assert ["fastpo/regularizers.py" in diff for diff in DIFFS] == [False, True]


@pytest.mark.parametrize("diff", DIFFS)
def test_each_is_short(diff: str) -> None:
    assert len(diff.splitlines()) < 25


def test_they_apply_and_their_rows_are_tested(tmp_path: Path) -> None:
    for name in ("fastpo", "kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    added = re.findall(r'^\+    "(\w+)": (?:Link|Regularizer)', "".join(DIFFS), re.MULTILINE)
    assert len(added) == 2
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, "-k", " or ".join([*added, "its_row"])]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 80
