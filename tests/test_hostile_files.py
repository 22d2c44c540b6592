"""A cut of `benchmarks.hostile_files`: damaged files are refused in one line, or rightly read."""

import pytest

from tests.support import damage, hostile_files

EACH = 6
SKIPPED = {"index", "orbax", "run"}  # whose whole files take seconds to make
READ = sorted(hostile_files.FORMATS.keys() - SKIPPED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    hostile_files.make_whole(folder, ())
    return folder


@pytest.mark.parametrize("name", READ)
def test_damaged_files_are_refused_in_one_line_or_rightly_read(name, whole, tmp_path):
    format = hostile_files.FORMATS[name]
    strategy = format.cases(whole / format.whole)
    cases = [damage.Case(name, "the whole file", {}, False), *damage.drawn(strategy, EACH, 1)]
    found = {}
    for i, case in enumerate(cases):
        folder = hostile_files.lay(case, whole, tmp_path / str(i))
        found[case.what] = hostile_files.outcome(case, folder, whole)
    assert found["the whole file"][0] == "accepted", found["the whole file"]
    wrong = {what: got for what, got in found.items() if got[0] not in ("refused", "accepted")}
    assert not wrong
