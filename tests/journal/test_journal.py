"""A journal as the engine and the tools use it."""

import stat
from dataclasses import replace

import pytest

from zo_offload.errors import JournalError
from zo_offload.journal import Flags, Journal, Probe, Record, Term


def test_a_run_is_continued(path, header, make_record):
    with Journal.open(path, header) as journal:
        assert journal.last is None
        journal.append(make_record(0))
    with Journal.open(path, header) as journal:
        assert journal.next_step == 1
        assert journal.last == make_record(0)
        journal.append(make_record(1, num_probes=3))
    assert list(Journal.read(path).records) == [make_record(0), make_record(1, num_probes=3)]


def test_create_refuses_what_exists(small, header):
    before = small.read_bytes()
    with pytest.raises(JournalError, match="exists already"):
        Journal.create(small, header)
    assert small.read_bytes() == before


def test_read_refuses_what_is_missing(path):
    with pytest.raises(JournalError, match=r"cannot read the journal: No such file"):
        Journal.read(path)


def test_only_the_owner_may_look(tmp_path, header):
    path = tmp_path / "new" / "deeper" / "run.journal"
    Journal.create(path, header).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(p.stat().st_mode) for p in path.parents[:2]] == [0o700, 0o700]
    assert [p.name for p in path.parent.iterdir()] == ["run.journal"]


def test_header_difference_names_key_and_both_values(small, header):
    other = header | {"seed": 8, "direction_scale": {"head": 0.03, "norm": 1.0}, "lag": 2}
    with pytest.raises(JournalError) as caught:
        Journal.open(small, other)
    message = str(caught.value)
    assert f"{small}: belongs to another run" in message
    assert "header.direction_scale.head: journal has 0.02, this run has 0.03" in message
    assert "header.seed: journal has 7, this run has 8" in message
    assert "header.lag: journal has nothing, this run has 2" in message
    assert "norm" not in message


def test_header_difference_of_kilobytes_is_shown_short(small, header):
    with pytest.raises(JournalError) as caught:
        Journal.open(small, header | {"seed": list(range(10_000))})
    assert len(str(caught.value)) < 500


def test_true_is_not_one(path):
    Journal.create(path, {"seed": 1}).close()
    with pytest.raises(JournalError, match="journal has 1, this run has true"):
        Journal.open(path, {"seed": True})


def test_header_may_hold_tuples_and_numbered_keys(path):
    fields = {"units": (1, 2), "scales": {10: 0.5, 9: 0.25}}
    Journal.create(path, fields).close()
    Journal.open(path, fields).close()
    stored = {"units": [1, 2], "scales": {"10": 0.5, "9": 0.25}}
    assert Journal.read(path).header.fields == stored


def test_kernel_contract_must_agree(path, header):
    Journal.create(path, header, contract=1).close()
    with pytest.raises(
        JournalError, match="kernel contract 1, this zo_offload computes contract 2"
    ):
        Journal.open(path, header, contract=2)


@pytest.mark.parametrize(("step", "branch"), [(0, 0), (2, 0), (1, 1)])
def test_append_refuses_any_but_the_next_step(path, header, make_record, step, branch):
    with Journal.open(path, header) as journal:
        journal.append(make_record(0))
        with pytest.raises(JournalError, match=r"cannot follow: \(0, 1\) is next"):
            journal.append(make_record(step, branch=branch))
        journal.append(make_record(1))


def test_append_refuses_what_does_not_fit(path, header):
    with Journal.open(path, header) as journal:
        with pytest.raises(JournalError, match="step 0: a value does not fit"):
            journal.append(Record(0, (), (), 1e-3, 1e-6, loader_position=-1))
        with pytest.raises(JournalError, match="65537 probes and 0 losses do not fit"):
            journal.append(Record(0, (Probe(0, 0.0, 0.0),) * 65_537, (), 1e-3, 1e-6))
        assert journal.next_step == 0


def test_a_journal_for_reading_is_not_written(small, make_record):
    with Journal.read(small) as journal, pytest.raises(JournalError, match="not open for writing"):
        journal.append(make_record(3))


def test_a_closed_journal_is_not_written(path, header, make_record):
    journal = Journal.create(path, header)
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="not open for writing"):
        journal.append(make_record(0))


def test_records_are_a_sequence_of_steps(small, make_record):
    records = Journal.read(small).records
    assert len(records) == 3
    assert records[1] == make_record(1, num_probes=2)
    assert records[-1].step == 2
    assert [r.step for r in records[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        records[3]


def test_coefficients_are_terms_in_order(small):
    records = Journal.read(small).records
    assert records.coefficients(0, 3) == [Term(0, 0, 1e-6), Term(1, 0, 2e-6), Term(1, 1, 3e-6)]
    assert records.coefficients(1, 1) == []


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (2, 1), (-1, 2), (4, 4)])
def test_coefficients_of_missing_steps_are_refused(small, start, stop):
    with pytest.raises(IndexError, match="holds 0 to 3"):
        Journal.read(small).records.coefficients(start, stop)


def test_skipped_steps_have_no_terms(path, header):
    with Journal.open(path, header) as journal:
        probe = Probe(0, float("nan"), 0.0)
        journal.append(Record(0, (probe,), (float("inf"), 0.7), 1e-3, 1e-6, flags=Flags.SKIPPED))
        assert journal.records.coefficients(0, 1) == []
        assert journal.records[0].flags is Flags.SKIPPED


def test_records_are_seen_as_they_are_appended(path, header, make_record):
    with Journal.open(path, header) as journal:
        records = journal.records
        journal.append(make_record(0))
        assert records[0] == make_record(0)
        assert records.coefficients(0, 1) == [Term(0, 0, 1e-6)]


def test_steps_at_another_rate_are_other_steps(make_record):
    """With momentum a rate acts on the steps before, even where a step's own slope is zero."""
    ours, theirs = (Journal.memory({}) for _ in range(2))
    for journal, lr in ((ours, 1e-6), (theirs, 2e-6)):
        journal.append(make_record(0))
        journal.append(replace(make_record(1), probes=(Probe(0, 0.0, 0.0),), lr=lr))
    assert ours.records.shared_steps(theirs.records) == 1
    assert ours.records.shared_steps(ours.records) == 2


def test_a_header_that_no_reader_takes_is_not_written(path, header, monkeypatch):
    monkeypatch.setattr("zo_offload.journal.header.MAX_JSON_BYTES", 10)
    with pytest.raises(JournalError, match=r"^a header of \d+ bytes; at most 10 fit$"):
        Journal.create(path, header)
