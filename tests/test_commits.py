"""A completing commit is whole or not there, wherever its process dies: a sample of the evaluation."""

from argparse import Namespace

import pytest

from evals import commits

pytestmark = pytest.mark.slow


def test_all_or_nothing_at_every_death() -> None:
    report = commits.run(Namespace(stride=100))
    assert [case for case in report.cases if not case.passed] == []
    assert len(report.cases) == len(commits.KINDS) * len(commits.WAYS)
    assert report.summary["else"] == 0
    assert min(report.summary["all"], report.summary["none"]) > 0
