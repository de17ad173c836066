"""The time that a device waits for others is read from the order of a program's instructions."""

import dataclasses

import pytest

from mistral_jax.parallel.hardware import Hardware
from mistral_jax.planning.overlap import Overlap, read

# 8 devices send 100 bytes/s, and an instruction takes a second for each 10 cycles.
CHIP = Hardware("x", 1e9, bandwidth=1e9, flops=1e9, link=100, source="")
CLOCK = 10.0
WORK = '{} = f32[4]{{0}} fusion(%p), kind=kLoop, calls=%plain, {{"estimated_cycles":"{}"}}'
GATHER = "f32[200]{0} all-gather(%p), channel_id={}, replica_groups={}, dimensions={0}"  # 7 s
SUM = "f32[25]{0} reduce-scatter(%p), channel_id=2, replica_groups={}, to_apply=%add"  # 7 s


def work(name, seconds):
    return WORK.format(name, round(seconds * CLOCK))


def program(*lines, others=""):
    body = "\n".join(f"  {line}" for line in (*lines, "ROOT %out = f32[4]{0} copy(%p)"))
    return (
        "%plain (x: f32[4]) -> f32[4] {\n  ROOT %y = f32[4]{0} copy(%x)\n}\n\n"
        f"{others}\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"
    )


def times(*lines, others=""):
    found = read(program(*lines, others=others), 8, CHIP, CLOCK)
    return pytest.approx(dataclasses.astuple(found), abs=1e-3)


def test_a_device_waits_for_a_collective_that_nothing_overlaps():
    gather = f"%g = {GATHER}".replace("channel_id={}", "channel_id=1")
    assert times(work("%a", 3), gather, work("%b", 2)) == (5, 7, 7)


@pytest.mark.parametrize(("seconds", "exposed"), [(0, 7), (3, 4), (7, 0), (9, 0)])
def test_it_waits_for_what_is_left_of_one_that_has_started(seconds, exposed):
    start = "%s = (f32[25]{0}, f32[200]{0}) all-gather-start(%p), channel_id=1, replica_groups={}"
    done = "%d = f32[200]{0} all-gather-done(%s)"
    assert times(work("%a", 1), start, work("%b", seconds), done) == (1 + seconds, 7, exposed)


def test_collectives_share_the_links():
    starts = (
        f"%s{i} = (f32[25]{{0}}, f32[200]{{0}}) all-gather-start(%p), channel_id={i}, "
        "replica_groups={}"
        for i in (1, 2)
    )
    dones = (f"%d{i} = f32[200]{{0}} all-gather-done(%s{i})" for i in (1, 2))
    assert times(*starts, work("%a", 10), *dones) == (10, 14, 4)


def test_pieces_of_one_collective_inside_of_other_work_count_once():
    others = "".join(
        f"%piece.{i} (p: f32[4]) -> f32[4] {{\n  %r.{i} = {SUM}\n  ROOT %c = f32[4]{{0}} copy(%p)\n"
        "}\n\n"
        for i in range(3)
    )
    pieces = [work(f"%f{i}", i).replace("%plain", f"%piece.{i}") for i in range(3)]
    assert times(*pieces, others=others) == (3, 7, 4)


def test_loops_run_as_often_as_they_say_and_branches_once():
    gather = f"%g = {GATHER}".replace("channel_id={}", "channel_id=1")
    others = "".join(
        f"%{name} (p: f32[4]) -> f32[4] {{\n  {work('%w', seconds)}\n  {more}\n"
        "  ROOT %c = f32[4]{0} copy(%p)\n}\n\n"
        for name, seconds, more in (("body", 2, gather), ("cond", 0, ""), ("long", 5, ""))
    )
    loop = (
        "%l = f32[4]{0} while(%p), condition=%cond, body=%body, "
        'backend_config={"known_trip_count":{"n":"3"}}'
    )
    branches = "%b = f32[4]{0} conditional(%i, %p, %p), branch_computations={%cond, %long}"
    assert times(loop, branches, others=others) == (11, 21, 21)


def test_times_add_up():
    assert Overlap(1, 2, 3).plus(Overlap(1, 0, 2), 2) == Overlap(3, 2, 7)
