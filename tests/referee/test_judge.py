"""The referee itself: what it calls a failure."""

import unittest

import pytest

FAILED = "Traceback: no"


class Sample(unittest.TestCase):
    __test__ = False  # not for pytest, which would collect it

    def test_pass(self):
        pass

    def test_fail(self):
        self.fail("no such luck")

    def test_skip(self):
        self.skipTest("not today")

    def test_parts(self):
        for part in range(3):
            with self.subTest(part):
                self.assertNotEqual(part, 1)

    def test_skipped_part(self):
        with self.subTest("a"):
            self.skipTest("not this one")


def test_outcomes(run_suite):
    outcomes = run_suite(Sample)
    assert "no such luck" in outcomes.pop("test_fail")
    assert "AssertionError" in outcomes.pop("test_parts")
    assert outcomes == {"test_pass": "passed", "test_skip": "skipped", "test_skipped_part": "skipped"}


def test_a_class_that_cannot_be_set_up(run_suite):
    class Broken(Sample):
        @classmethod
        def setUpClass(cls):
            raise OSError("no folder")

    with pytest.raises(AssertionError, match="Broken can't be set up:[^@]*no folder"):
        run_suite(Broken)


@pytest.mark.parametrize(
    ("ours", "theirs", "reasons", "message"),
    [
        (FAILED, "passed", {}, "test_a fails for our class only"),
        (FAILED, "skipped", {}, "test_a fails for our class only"),
        ("passed", "passed", {"test_a": "why"}, "take it off the list"),
        ("skipped", "passed", {"test_a": "why"}, "take it off the list"),
        (FAILED, FAILED, {"test_a": "why"}, "take it off the list"),
        ("passed", "passed", {"test_b": "why"}, "test_b is listed, and there is no such test"),
    ],
)
def test_what_is_refused(judge, ours, theirs, reasons, message):
    with pytest.raises(AssertionError, match=message):
        judge({"test_a": ours}, {"test_a": theirs}, reasons)


def test_what_is_accepted(judge):
    judge({"test_a": FAILED, "test_b": "passed"}, {"test_a": "passed", "test_b": FAILED}, {"test_a": "why"})
    judge({"test_a": FAILED, "test_b": "skipped"}, {"test_a": FAILED, "test_b": "passed"}, {})
