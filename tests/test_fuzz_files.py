"""A short run of the fuzzer of files finds no fault, and the fuzzer detects the faults that it is made for."""

import dataclasses

import pytest

from tests import fuzz, fuzz_files
from tests.fuzz_judge import Fault


def test_a_few_seconds_without_a_fault():
    faults, files = fuzz.fuzz(2.5, 0, worker_run=fuzz_files.run)
    assert not faults, "\n".join(faults)
    assert files["refused"] > 10


def wrong(form, error):
    """A reader that does not catch an error, or ignores a checksum."""

    def read(path):
        try:
            return form.read(path)
        except ValueError:
            if error is None:
                return []
            raise error from None

    return dataclasses.replace(form, read=read)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("wrong"), None], ids=["raw", "no sentence", "no checksum"])
def test_a_wrong_reader_is_detected(tmp_path, monkeypatch, error):
    monkeypatch.setattr(fuzz_files, "FORMS", {"index": fuzz_files.FORMS["index"]})
    held = fuzz_files.Files(tmp_path)
    monkeypatch.setitem(fuzz_files.FORMS, "index", wrong(fuzz_files.FORMS["index"], error))
    faults = 0
    for number in range(20):
        try:
            held.run_case(0, number)
        except (Fault, KeyError):
            faults += 1
    assert faults > 5
