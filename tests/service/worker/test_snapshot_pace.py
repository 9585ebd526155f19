from tminus.service.worker.snapshot_pace import LEAST_S, SHARE, SnapshotPace


def test_the_first_round_is_due_at_once_and_no_other_while_it_is_under_way() -> None:
    pace = SnapshotPace()
    assert pace.due(0)
    pace.begun()
    assert not pace.due(1000)


def test_cheap_rounds_come_at_the_least_interval() -> None:
    pace = SnapshotPace()
    pace.begun()
    pace.ended(began_s=10, cost_s=0.001)
    assert not pace.due(10 + LEAST_S - 0.01)
    assert pace.due(10 + LEAST_S)


def test_costly_rounds_are_spaced_so_that_they_cost_their_share() -> None:
    pace, now_s, cost_s = SnapshotPace(), 0.0, 0.3
    rounds = 0
    while now_s < 1000:
        if pace.due(now_s):
            pace.begun()
            pace.ended(now_s, cost_s)
            rounds += 1
        now_s += 0.5
    assert rounds * cost_s <= SHARE * 1000 + cost_s
