"""Files of JSON lines: whatever ends the process, what it leaves is whole or can be gone on with to the same bytes."""

import json
import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import resumable_child
from resumable_child import CHUNK, PROVENANCE, ROWS, write

from fastpo.files import SaveError
from fastpo.resumable import ResumableJsonl, check_one_process, check_output_file, read_jsonl

processes = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """One process that imports, from which all writers are forked."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(here.parent), str(here))))
        forkserver.set_forkserver_preload(["resumable_child"])
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run leaves."""
    path = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert write(path) == 0
    return content(path.parent)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "out.jsonl"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ended(path: Path, **how: Any) -> int:
    process = processes.Process(target=resumable_child.run, args=(str(path),), kwargs=how)
    process.start()
    process.join()
    return process.exitcode


def begun(path: Path, chunks: int = 1) -> None:
    """As after a kill that left so many chunks."""
    with ResumableJsonl(path, PROVENANCE, chunk=CHUNK) as file:
        for first in range(0, chunks * CHUNK, CHUNK):
            file.append(ROWS[first : first + CHUNK])


def test_rows_come_back_as_they_were(path: Path, whole: dict[str, bytes]) -> None:
    write(path)
    assert list(read_jsonl(path)) == ROWS
    assert content(path.parent) == whole and set(whole) == {"out.jsonl", "out.jsonl.provenance.json"}
    assert json.loads(whole["out.jsonl.provenance.json"]) == {**PROVENANCE, "rows": 8}


# --- killed -----------------------------------------------------------------------------------------------------------


def test_killed_before_any_file_operation(tmp_path: Path, whole: dict[str, bytes]) -> None:
    operations = ended(tmp_path / "counted" / "out.jsonl")
    assert operations > 8
    for kill in range(operations):
        path = tmp_path / str(kill) / "out.jsonl"
        assert ended(path, kill_before=kill) == -signal.SIGKILL
        if path.exists():
            assert content(path.parent) == whole
        else:
            write(path)
            assert content(path.parent) == whole, kill


def test_killed_in_the_middle_of_a_write(tmp_path: Path, whole: dict[str, bytes]) -> None:
    size = len(whole["out.jsonl"])
    lines = [len(line) for line in whole["out.jsonl"].splitlines(keepends=True)]
    for budget in (0, 1, sum(lines[:2]), sum(lines[:3]) - 1, sum(lines[:3]), sum(lines[:6]) + 9, size - 1):
        path = tmp_path / str(budget) / "out.jsonl"
        assert ended(path, budget=budget) == -signal.SIGKILL
        assert write(path) == (3 if sum(lines[:3]) <= budget < sum(lines[:6]) else 6 if budget > sum(lines[:6]) else 0)
        assert content(path.parent) == whole


def test_killed_again_and_again(path: Path, whole: dict[str, bytes]) -> None:
    chance = random.Random(0)
    for _ in range(6):
        ended(path, budget=chance.randrange(400))
        if path.exists():
            break
        ended(path, kill_before=chance.randrange(8))
    if not path.exists():
        write(path)
    assert content(path.parent) == whole


# --- damaged ----------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Callable[[bytes], bytes], int]] = {
    # what becomes of a partial file of two chunks, and the lines that can be kept
    "nothing": (lambda data: data, 6),
    "half a line": (lambda data: data[:-5], 3),
    "zeros, as a machine that went down leaves": (lambda data: data[:-40] + bytes(40), 3),
    "zeros after the end": (lambda data: data + bytes(64), 6),
    "garbage in the middle": (lambda data: data.replace(b'"index": 4', b'"ind\xff\xfe": '), 3),
    "a line that is no row": (lambda data: data + b"17\n", 6),
    "another line end": (lambda data: data.replace(b'{"index": 1', b'\n{"index": 1'), 0),
    "all gone": (lambda data: b"", 0),
}


@pytest.mark.parametrize(("damage", "kept"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_written_again(
    path: Path, whole: dict[str, bytes], damage: Callable[[bytes], bytes], kept: int
) -> None:
    begun(path, chunks=2)
    partial = path.with_name("out.jsonl.partial")
    partial.write_bytes(damage(partial.read_bytes()))
    assert write(path) == kept
    assert content(path.parent) == whole


# --- refused ----------------------------------------------------------------------------------------------------------


def test_other_settings_are_named_and_nothing_is_lost(path: Path) -> None:
    begun(path)
    before = content(path.parent)
    for provenance, named in (
        ({**PROVENANCE, "settings": {"seed": 1, "beta": 0.1}}, "settings.seed"),
        ({**PROVENANCE, "settings": {"seed": 1, "beta": 0.2}, "new": None}, "new, settings.beta, settings.seed"),
        ({**PROVENANCE, "settings": 3}, "settings"),
    ):
        with pytest.raises(ValueError, match=f"was begun with another {named}: repeat its settings, or delete out"):
            ResumableJsonl(path, provenance, chunk=CHUNK)
    assert content(path.parent) == before


@pytest.mark.parametrize("text", [None, "", "{", "[]", '"\xff'])
def test_a_provenance_that_is_gone(path: Path, text: str | None) -> None:
    begun(path)
    provenance = path.with_name("out.jsonl.provenance.json")
    provenance.unlink()
    if text is not None:
        provenance.write_text(text, encoding="latin-1")
    before = content(path.parent)
    with pytest.raises(ValueError, match=r"was begun.*delete out.jsonl.partial to begin anew"):
        ResumableJsonl(path, PROVENANCE, chunk=CHUNK)
    assert content(path.parent) == before
    path.with_name("out.jsonl.partial").unlink()
    write(path)
    assert list(read_jsonl(path)) == ROWS


def test_a_file_that_is_there(path: Path) -> None:
    write(path)
    before = content(path.parent)
    for refused in (lambda: ResumableJsonl(path, PROVENANCE), lambda: check_output_file(path)):
        with pytest.raises(ValueError, match="output_file must not exist yet, got"):
            refused()
    assert content(path.parent) == before


def test_two_processes_do_not_write_one_file(path: Path, whole: dict[str, bytes]) -> None:
    second = ResumableJsonl(path, PROVENANCE, chunk=CHUNK)
    with ResumableJsonl(path, PROVENANCE, chunk=CHUNK) as first:
        first.append(ROWS[:3])
        with pytest.raises(ValueError, match="is being written by another process"), second:
            pass
        first.append(ROWS[3:6])
        first.append(ROWS[6:])
        first.finish({"rows": 8})
    with pytest.raises(ValueError, match="output_file must not exist yet"), second:  # which looked before it was there
        pass
    assert {name: content(path.parent)[name] for name in whole} == whole


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_one_process("fastpo sample")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="fastpo sample must be started as one process, got 2: split the dataset"):
        check_one_process("fastpo sample")


# --- a full disk, a folder that cannot be written ---------------------------------------------------------------------


def with_limit(size: int, work: Callable[[], Any]) -> None:
    """No file may be larger than so many bytes, as if the disk was full."""
    unlimited, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_what_is_written(path: Path, whole: dict[str, bytes]) -> None:
    begun(path, chunks=1)
    partial = path.with_name("out.jsonl.partial")
    before = partial.read_bytes()

    def work() -> None:
        with ResumableJsonl(path, PROVENANCE, chunk=CHUNK) as file:
            for _ in range(2):  # a second attempt leaves no half of a chunk either
                with pytest.raises(SaveError, match=r"cannot write .*out.jsonl: File too large"):
                    file.append(ROWS[3:6])
                assert partial.read_bytes() == before

    with_limit(len(before) + 20, work)
    assert write(path) == 3 and content(path.parent) == whole


def test_a_disk_that_is_full_from_the_start_or_at_the_end(path: Path, whole: dict[str, bytes]) -> None:
    def fails() -> None:
        with pytest.raises(SaveError, match=r"cannot write .*out.jsonl.*: File too large"):
            write(path)

    with_limit(10, fails)
    assert not path.exists()
    begun(path, chunks=2)
    limit = len(whole["out.jsonl.provenance.json"]) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumableJsonl, "append", lambda *_: None)  # so that finish alone writes
        with_limit(limit, fails)
    assert write(path) == 6 and content(path.parent) == whole


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file" / "out.jsonl", Path("/proc/nowhere/out.jsonl")):
        with pytest.raises(ValueError, match=f"output_file must be in a writable folder, got '{path}': "):
            check_output_file(path)
        with pytest.raises(SaveError, match=f"cannot write {path}: "):
            write(path)
    check_output_file(tmp_path / "new" / "out.jsonl")
    assert list((tmp_path / "new").iterdir()) == []


# --- reading ----------------------------------------------------------------------------------------------------------


def test_reading_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text, message in (
        (b'{"a": 1}\n{"a"\n', r"rows.jsonl line 2 must be JSON, got b'\{\"a\""),
        (b'{"a": 1}\n\n[2]\n', r"rows.jsonl line 3 must be a JSON object"),
        (b'{"a": "\xff"}\n', r"rows.jsonl line 1 must be JSON"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            list(read_jsonl(path))
    with pytest.raises(ValueError, match=r"dataset must be an existing JSONL file, got 'nowhere.jsonl'$"):
        list(read_jsonl("nowhere.jsonl"))
    begun(tmp_path / "late.jsonl")
    with pytest.raises(ValueError, match=r"late.jsonl.partial is not finished: run the command that makes it again"):
        list(read_jsonl(tmp_path / "late.jsonl"))
