"""Whose turn it is: one short job whole between two steps of a long one."""

from collections import deque
from dataclasses import dataclass

from comi_jax.serving.turns import Turns


@dataclass(eq=False)
class Work:
    name: str
    steps: int
    long: bool = False


def order(*jobs, may_begin=lambda job: True):
    """The names in the order in which steps are given, until all are prepared."""
    waiting, got = deque(jobs), []
    turns = Turns(waiting)
    while (job := turns.next(may_begin)) is not None:
        got.append(job.name)
        job.steps -= 1
        if job.steps == 0:
            turns.end(job)
    assert not len(turns)
    return "".join(got), [job.name for job in waiting]


def test_between_two_steps_of_a_long_job_one_short_one_is_prepared_whole():
    long, short = Work("L", 4, True), [Work(name, 2) for name in "abc"]
    assert order(long, *short) == ("aaLbbLccLL", [])
    assert order(*[Work(name, 2) for name in "ab"], Work("L", 4, True), Work("M", 2, True)) == ("aaLbbLLLMM", [])


def test_what_may_not_begin_waits_and_stops_only_its_like():
    jobs = [Work("a", 1), Work("b", 1), Work("L", 2, True)]
    assert order(*jobs, may_begin=lambda job: job.name != "a") == ("LL", ["a", "b"])
    assert order(Work("L", 2, True), Work("a", 1), may_begin=lambda job: job.name != "L") == ("a", ["L"])
