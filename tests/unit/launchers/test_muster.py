"""Leaders and followers in one process: threads stand for machines, the folder is real."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.spec import Command, Gathering
from dtrain.errors import RunError
from dtrain.launchers import muster, supervise
from dtrain.launchers.muster import Follower, Go, Leader, Over, enter
from dtrain.launchers.supervise import _Job
from dtrain.launchers.verdict import NodeEnd
from dtrain.runs import RunDir
from dtrain.runs.files import read_json, write_json
from dtrain.runs.lock import Holder
from dtrain.verbs import _nodes
from dtrain.verbs._told import Wish

PATIENT = Gathering(timeout_s=100)
GOOD, BAD = NodeEnd("other", 0), NodeEnd("other", 1)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "r")


@pytest.fixture
def other() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def lead(run: RunDir, nodes: int = 2, gathering: Gathering = PATIENT, digest: str = "d") -> Any:
    return enter(run, gathering, nodes, digest, lambda line: None)


def follow(run: RunDir, ready: threading.Event | None = None, end: NodeEnd = GOOD, digest: str = "d") -> Any:
    """As a machine that comes later: the leader's word, and its last one."""
    if ready is not None:
        ready.wait(60)
    with enter(run, PATIENT, 2, digest, lambda line: None) as team:
        assert isinstance(team, Follower)
        word = team.wait()
        return word, told(team, end) if isinstance(word, Go) else None


def told(follower: Follower, end: NodeEnd) -> Over | None:
    """The leader's last word, once it is told how it ended here."""
    follower.report(end)
    return follower.last_word()


def test_the_first_leads_and_the_others_do_as_it_says(run: RunDir, other: Any) -> None:
    ready = threading.Event()
    followers = [other(follow, run, ready) for _ in range(2)]
    with lead(run, 3) as leader:
        assert isinstance(leader, Leader)
        ready.set()
        leader.wait()
        meeting = leader.meet(4, time.time() + 123)
        assert meeting.is_host
        assert [end.host for end in leader.reports(failed=False)] == ["other"] * 2
        leader.dismiss(75, "stopped")
        words = [one.result(60) for one in followers]
    assert sorted(go.node for go, _ in words) == [1, 2]
    assert {(go.attempt, go.port, go.id) for go, _ in words} == {(4, meeting.port, meeting.id)}
    assert [go.left_s for go, _ in words] == pytest.approx([123] * 2, abs=5), "no clock of one is another's"
    assert [over for _, over in words] == [Over(75, "stopped")] * 2
    assert list(run.nodes.iterdir()) == []


def test_a_failure_elsewhere_is_heard_on_both_sides(run: RunDir, other: Any) -> None:
    ready, heard = threading.Event(), threading.Event()

    def fails() -> None:
        ready.wait(60)
        with lead(run) as team:
            assert isinstance(team.wait(), Go)
            while team.trouble() is None:
                time.sleep(0.02)
            heard.set()
            told(team, BAD)

    follower = other(fails)
    with lead(run) as leader:
        ready.set()
        leader.wait()
        leader.meet(0, None)
        assert leader.trouble() is None
        assert leader.reports(failed=True) == [BAD]
        assert heard.is_set()
        assert "node 1 on" in (leader.trouble() or "")
        leader.dismiss(3)
        follower.result(60)


def test_a_machine_that_falls_silent_is_named(run: RunDir, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muster, "SILENT_S", 0.3)
    monkeypatch.setattr(muster, "LATE_S", 2.0)
    with lead(run) as leader:
        silent = Follower(run, "d", PATIENT)
        leader.wait()
        leader.meet(0, None)
        deadline = time.monotonic() + 60
        while leader.trouble() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "has not been heard of" in (leader.trouble() or "")
        assert leader.reports(failed=True) == []
        silent.leave()


def test_what_a_killed_machine_has_left_is_not_counted(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muster, "SILENT_S", 1.0)
    left = run.nodes / "abc"
    write_json(left / "here.json", {"host": "gone", "digest": "d"})
    alone = lead(run, gathering=Gathering(timeout_s=1.5))
    with pytest.raises(RunError, match=r"launcher.nodes=2: only 1 came within 2 s"), alone as leader:
        leader.wait()
    assert not left.exists()


def test_one_that_waited_before_the_leader_came_is_counted(run: RunDir, other: Any) -> None:
    early = Follower(run, "d", Gathering(leads=False, timeout_s=100))
    waiting = other(early.wait)
    with lead(run) as leader:
        leader.wait()
        leader.meet(0, None)
        assert isinstance(waiting.result(60), Go)
    early.leave()


def test_one_that_waited_before_a_leader_came_that_ends_at_once_is_told(run: RunDir) -> None:
    early = Follower(run, "d", Gathering(leads=False, timeout_s=60))
    with pytest.raises(SystemExit), lead(run):
        raise SystemExit(75)
    word = early.wait()
    assert isinstance(word, Over)
    assert word.exit_code == 75
    early.leave()
    assert list(run.nodes.iterdir()) == []


def test_the_last_word_is_heard_that_comes_between_two_looks(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever waited would lead next, and wait for machines that have gone."""
    monkeypatch.setattr(muster, "TOUCH_S", 0.0)
    leading = contextlib.ExitStack()
    leader = leading.enter_context(lead(run))
    early = Follower(run, "d", PATIENT)
    look = early._over

    def look_before_it_ends() -> Over | None:
        said = look()
        leader.dismiss(2, "refused")
        leading.close()
        return said

    monkeypatch.setattr(early, "_over", look_before_it_ends)
    assert early.wait() == Over(2, "refused")
    early.leave()


def test_one_that_has_not_seen_its_word_to_go_is_sent_back_all_the_same(run: RunDir) -> None:
    with lead(run) as leader:
        slow = Follower(run, "d", PATIENT)
        leader.wait()
        leader.meet(0, None)
        leader.send_back()
        proposal: Any = None  # nothing is started
        assert _nodes._follow(run, proposal, slow, Wish()) is None
        slow.leave()


def test_a_leader_makes_no_new_names_for_others_to_miss(run: RunDir) -> None:
    """A client of a network file system may believe for a minute that there is no such file."""
    with lead(run) as leader:
        follower = Follower(run, "d", PATIENT)
        names = sorted(path.name for path in (run.nodes / follower.token).iterdir())
        leader.wait()
        leader.meet(0, None)
        follower.report(GOOD)
        assert leader.reports(failed=True) == [GOOD]
        assert follower.trouble() == "another node has failed"
        leader.dismiss(3)
        assert sorted(path.name for path in (run.nodes / follower.token).iterdir()) == names
        assert follower.last_word() == Over(3)
        follower.leave()
    assert list(run.nodes.iterdir()) == []


def test_one_that_leaves_before_the_start_is_missed_at_once_and_leaves_nothing(run: RunDir) -> None:
    with lead(run) as leader:
        follower = Follower(run, "d", PATIENT)
        leader.wait()
        follower.leave()
        leader.meet(0, None)
        assert "node 1 on" in (said := leader.trouble() or "")
        assert said.endswith("has left")
        began = time.monotonic()
        assert leader.reports(failed=True) == []
        assert time.monotonic() - began < muster.GONE_S
        leader.dismiss(3)
    assert list(run.nodes.iterdir()) == []


def test_one_that_is_told_to_end_before_the_last_word_has_reported(run: RunDir) -> None:
    with lead(run) as leader:
        follower = Follower(run, "d", PATIENT)
        leader.wait()
        leader.meet(0, None)
        follower.report(BAD)
        follower.leave()
        assert leader.reports(failed=True) == [BAD]
        assert leader.lost() is None
        leader.dismiss(3)
    assert list(run.nodes.iterdir()) == []


class Clock:
    """Of this machine, which can be suspended."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.slept_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def test_a_job_that_was_suspended_goes_on(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its processes were: who looks first finds the others silent for as long."""
    clock = Clock()
    monkeypatch.setattr(muster, "time", clock)
    with lead(run) as leader:
        follower = Follower(run, "d", PATIENT)
        leader.wait()
        leader.meet(0, None)
        assert isinstance(follower.wait(), Go)
        assert leader.trouble() is None
        clock.slept_s += 600
        assert leader.trouble() is None
        holder = RunDir.holder
        monkeypatch.setattr(RunDir, "holder", lambda run: None)  # as from another machine: not touched for ten minutes
        assert follower.trouble() is None
        clock.slept_s += 4  # not suspended
        monkeypatch.setattr(RunDir, "holder", holder)  # it has been touched
        assert follower.trouble() is None
        monkeypatch.setattr(RunDir, "holder", lambda run: None)
        for _ in range(15):
            clock.slept_s += 4
            leader.trouble()
            follower.trouble()
        assert follower.trouble() == "the node that leads is gone"
        assert "has not been heard of" in (leader.trouble() or "")
        follower.leave()


def test_what_a_leader_left_that_was_killed_opens_no_run_that_waits_for_nobody(run: RunDir) -> None:
    killed = dataclasses.replace(Holder.me(), pid=1)
    write_json(run.nodes / "open", dataclasses.asdict(killed))
    with run.lock(), pytest.raises(RunError, match="in use by"), lead(run):
        pass


def test_one_that_slipped_in_as_the_others_began_does_not_wait_for_the_runs_end(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muster, "TOUCH_S", 0.0)
    monkeypatch.setattr(muster, "CLOSED_S", 0.3)
    with lead(run, 1) as leader:
        leader.wait()
        leader.meet(0, None)
        late = Follower(run, "d", PATIENT)  # it had seen that the run was open
        with pytest.raises(RunError, match="has begun without this machine"):
            late.wait()
        late.leave()


def started(name: str | None, *, leads: bool = False) -> Gathering:
    return Gathering(leads=leads, timeout_s=100, start=name)


def test_a_machine_of_another_start_takes_nobodys_place(run: RunDir) -> None:
    lines: list[str] = []
    with enter(run, started("7.0", leads=True), 2, "d", lines.append) as leader:
        assert isinstance(leader, Leader)
        strangers = [Follower(run, "d", started(name)) for name in ("8.0", None)]
        mine = Follower(run, "d", started("7.0"))
        assert leader.wait() == 2
        leader.meet(0, None)
        for stranger in strangers:
            assert isinstance(word := stranger.wait(), Over)
            assert (word.exit_code, "started twice" in word.message) == (2, True)
        assert isinstance(mine.wait(), Go)
    assert len([line for line in lines if "started twice" in line]) == 2
    for one in (*strangers, mine):
        one.leave()


def test_one_that_comes_when_its_start_is_over_is_told(run: RunDir) -> None:
    """Else it would hold its GPUs, waiting for a leader that does not come."""
    with pytest.raises(RunError), lead(run, gathering=started("7.0", leads=True)):
        raise RunError("this run is done")
    late = Follower(run, "d", started("7.0"))
    assert late.wait() == Over(2, "this run is done")
    late.leave()
    again = Follower(run, "d", dataclasses.replace(started("7.1"), timeout_s=0.3))
    with pytest.raises(RunError, match="no machine leads"):
        again.wait()
    again.leave()


def test_a_hang_is_written_down_by_all_before_any_ends_its_ranks(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else those of a machine that is slow to look would have failed by then."""
    with lead(run) as leader:
        follower = Follower(run, "d", PATIENT)
        leader.wait()
        leader.meet(0, None)
        assert isinstance(follower.wait(), Go)
        for node, team in enumerate((leader, follower)):
            job = _Job(Command([], {}), run, 0, lambda line: None, "off", team)
            assert not job._is_written_down()
            job._hung_at = time.monotonic()
            write_json(run.hang_dir(0) / f"node-{node}.json", {})
            assert job._is_written_down() == (node == 1)
            job.clean_up()
        (run.hang_dir(0) / "node-1.json").unlink()
        assert not job._is_written_down()
        monkeypatch.setattr(supervise, "OTHERS_LOOK_S", 0.0)
        assert job._is_written_down()
        follower.leave()


def test_another_configuration_is_refused_on_all(run: RunDir, other: Any) -> None:
    ready = threading.Event()
    follower = other(follow, run, ready, GOOD, "another")
    with pytest.raises(RunError, match="another configuration"), lead(run) as leader:  # noqa: PT012
        ready.set()
        leader.wait()
    word, _ = follower.result(60)
    assert word.exit_code == 2
    assert "another configuration" in word.message


def test_a_leader_that_is_told_to_end_has_all_end_so(run: RunDir, other: Any) -> None:
    ready = threading.Event()
    follower = other(follow, run, ready)
    with pytest.raises(SystemExit), lead(run, 3) as leader:  # noqa: PT012
        ready.set()
        while not leader.come():
            time.sleep(0.02)
        raise SystemExit(75)
    assert follower.result(60)[0].exit_code == 75


def test_one_too_many_is_sent_home(run: RunDir, other: Any) -> None:
    first, second = Follower(run, "d", PATIENT), Follower(run, "d", PATIENT)
    waiting = [other(first.wait), other(second.wait)]
    with lead(run) as leader:
        leader.wait()
        leader.meet(0, None)
        words = [one.result(60) for one in waiting]
    assert {type(word) for word in words} == {Go, Over}
    for one in (first, second):
        one.leave()


SOME = Gathering(timeout_s=100, least=1, last_call_s=0.3)


def test_enough_are_enough_and_one_that_comes_later_is_seen(run: RunDir) -> None:
    with lead(run, 3, SOME) as leader:
        assert leader.wait() == 1
        leader.meet(0, None)
        assert leader.come() is None
        later, other = Follower(run, "d", SOME), Follower(run, "e", SOME)
        assert leader.come() is not None
        assert isinstance(sent_away := other.wait(), Over)
        assert (sent_away.exit_code, "another configuration" in sent_away.message) == (2, True)
        leader.send_back()
        later.leave()
        other.leave()
    with lead(run, 2, SOME) as leader:
        again = Follower(run, "d", SOME)
        assert leader.wait() == 2
        leader.meet(1, None)
        word = again.wait()
        assert isinstance(word, Go)
        assert (word.nodes, leader.come()) == (2, None)
        too_many = Follower(run, "d", SOME)
        assert leader.come() is None  # as many as there may be
        too_many.leave()
        again.leave()


def test_one_that_comes_to_a_full_disk_waits(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with lead(run, 3, SOME) as leader:
        leader.wait()
        leader.meet(0, None)
        later, said = Follower(run, "d", SOME), list[str]()
        job = _Job(Command([], {}), run, 0, said.append, "off", leader)
        run.joined.symlink_to(run.nodes / "nowhere" / "x")  # as good as no room for it
        job._look_at_team(leader, 0)
        assert said == []
        run.joined.unlink()
        job._look_at_team(leader, 0)
        assert run.joined.exists()
        assert len(said) == 1
        later.leave()
    job.clean_up()


def test_another_configuration_ends_no_run_that_may_do_without_it(run: RunDir) -> None:
    lines: list[str] = []
    with enter(run, SOME, 3, "d", lines.append) as leader:
        assert isinstance(leader, Leader)
        stray, welcome = Follower(run, "e", SOME), Follower(run, "d", SOME)
        assert leader.wait() == 2
        assert isinstance(sent_away := stray.wait(), Over)
        assert (sent_away.exit_code, "another configuration" in sent_away.message) == (2, True)
        leader.meet(0, None)
        assert isinstance(welcome.wait(), Go)
    assert [line for line in lines if "another configuration" in line and line.endswith("it is sent away")]
    stray.leave()
    welcome.leave()


def test_where_names_say_nothing_the_leader_goes_by_its_own(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods know each other's names by a service, which is in the one of the leader alone."""
    monkeypatch.setattr(muster, "towards", lambda host: None)
    pods = Gathering(leads=True, host="first-node-0-0.first", port=29400, timeout_s=100)
    with lead(run, gathering=pods) as leader:
        follower = Follower(run, "d", PATIENT)
        leader.wait()
        meeting = leader.meet(0, None)
        assert (meeting.host, meeting.local) == (pods.host, pods.host)
        follower.leave()


def namesake(run: RunDir, gathering: Gathering) -> Follower:
    """A machine that has this one's name, and a network of its own."""
    made = Follower(run, "d", gathering)
    here = run.nodes / made.token / "here.json"
    said = read_json(here)
    assert said is not None
    write_json(here, {**said, "network": "another boot net:[1]"})
    return made


def test_a_machine_of_the_leaders_name_is_refused_where_nothing_says_the_leaders_address(run: RunDir) -> None:
    with pytest.raises(RunError, match=r"the machine that leads has the same name.* launcher.host=ADDRESS"), lead(run) as leader:  # noqa: PT012  # fmt: skip
        two = namesake(run, PATIENT)
        leader.wait()
    assert isinstance(word := two.wait(), Over)
    assert (word.exit_code, "launcher.host=ADDRESS" in word.message) == (2, True)
    two.leave()
    lines: list[str] = []
    with enter(run, SOME, 3, "d", lines.append) as leader:
        assert isinstance(leader, Leader)
        two, welcome = namesake(run, SOME), Follower(run, "d", SOME)
        assert leader.wait() == 2
        assert isinstance(word := two.wait(), Over)
        assert word.exit_code == 2
        leader.meet(0, None)
        late = namesake(run, SOME)
        assert leader.come() is None
        assert isinstance(late.wait(), Over)
    assert len([line for line in lines if "has the same name" in line and line.endswith("it is sent away")]) == 2
    for one in (two, welcome, late):
        one.leave()


def test_the_name_that_two_have_says_no_address(run: RunDir) -> None:
    told = Gathering(leads=True, host="10.9.8.7", timeout_s=100)
    with lead(run, gathering=told) as leader:
        two = namesake(run, told)
        assert leader.wait() == 2
        meeting = leader.meet(0, None)
        assert (meeting.host, meeting.local) == ("10.9.8.7", "10.9.8.7")
        assert isinstance(two.wait(), Go)
        two.leave()


def test_one_that_is_gone_is_lost_sooner_than_it_would_be_missed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with lead(run) as leader:
        gone = Follower(run, "d", PATIENT)
        leader.wait()
        leader.meet(0, None)
        assert leader.lost() is None
        monkeypatch.setattr(muster, "GONE_S", 0.2)
        assert leader.reports(failed=True) == []
        assert "node 1 on" in leader.lost()
        assert leader.trouble() is None  # that takes longer while all is well
        gone.leave()


def test_a_follower_leads_where_the_leader_has_gone(run: RunDir) -> None:
    follower = Follower(run, "d", Gathering(timeout_s=100))
    assert follower.wait() is None
    follower.leave()


def test_whoever_follows_one_that_is_gone_follows_no_other(
    run: RunDir, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one may lead before the machines of the last one have seen that it is gone."""
    monkeypatch.setattr(muster, "TOUCH_S", 0.0)
    with lead(run) as leader:
        left = Follower(run, "d", PATIENT)
        leader.wait()
        leader.meet(0, None)
        assert isinstance(left.wait(), Go)
        assert left.trouble() is None
    me = Holder.me()
    monkeypatch.setattr(Holder, "me", lambda: dataclasses.replace(me, since="later"))
    with lead(run, 2, Gathering(timeout_s=100, least=1, last_call_s=0.7)) as leader:
        assert left.trouble() == "the node that leads is gone"
        reported = other(told, left, BAD)
        assert leader.wait() == 1
        leader.meet(1, None)
        assert leader.trouble() is None
        assert reported.result(60) is None
    left.leave()


def test_a_leader_that_never_comes_is_told(run: RunDir) -> None:
    follower = Follower(run, "d", Gathering(leads=False, host="n1", timeout_s=1.2))
    with pytest.raises(RunError, match="no machine leads; it waited 1 s for n1"):
        follower.wait()
    follower.leave()


def test_a_run_that_waits_for_nobody_is_not_joined(run: RunDir) -> None:
    with run.lock(), pytest.raises(RunError, match="in use by"), lead(run):
        pass


def test_a_leader_that_dies_leaves_no_follower_waiting(run: RunDir, other: Any) -> None:
    ready = threading.Event()
    follower = other(follow, run, ready)
    with lead(run) as leader:
        ready.set()
        leader.wait()
        leader.meet(0, None)
    assert follower.result(60)[1] is None
