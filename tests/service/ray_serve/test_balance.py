from tminus.service.ray_serve.balance import Balance, Standing


def test_the_replica_with_the_least_predicted_work_is_first() -> None:
    told = {"a": Standing(8.0, 1), "b": Standing(0.5, 20), "c": Standing(3.0, 2)}
    assert Balance(0.75).order(told, now_s=0.0) == ["b", "c", "a"]


def test_idle_replicas_take_turns() -> None:
    balance, told = Balance(0.75), {"a": Standing(), "b": Standing(), "c": Standing()}
    chosen = []
    for now_s in range(6):
        chosen.append(balance.order(told, float(now_s))[0])
        balance.sent(chosen[-1], float(now_s))
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_a_burst_between_two_tellings_is_shared() -> None:
    """Two replicas with jobs of 2 s each: what is sent counts as such a job, until the replica has told of it."""
    balance, told = Balance(0.75), {"a": Standing(4.0, 2), "b": Standing(8.0, 4)}
    chosen = []
    for k in range(8):
        chosen.append(balance.order(told, k / 100)[0])
        balance.sent(chosen[-1], k / 100)
    assert chosen.count("a") == 5
    assert chosen.count("b") == 3


def test_what_was_sent_counts_no_longer_than_it_takes_to_be_told() -> None:
    balance, told = Balance(0.75), {"a": Standing(1.0, 1), "b": Standing(2.5, 1)}
    for _ in range(3):
        balance.sent("a", 10.0)
    assert balance.order(told, 10.7) == ["b", "a"]
    assert balance.order(told, 10.8) == ["a", "b"]


def test_what_is_answered_counts_no_longer() -> None:
    """Small requests beside a large job: that each were as large would send the next one to the busy replica."""
    balance, told = Balance(0.75), {"busy": Standing(8.0, 1), "idle": Standing()}
    for k in range(5):
        assert balance.order(told, k / 100)[0] == "idle"
        balance.sent("idle", k / 100)
        balance.accepted("idle", f"request {k}")
        balance.answered("idle", f"request {k}")
    balance.sent("idle", 0.1)
    balance.sent("idle", 0.1)
    balance.accepted("idle", "later")
    balance.answered("idle", "of before")
    assert balance.order(told, 0.1)[0] == "busy"


def test_one_that_takes_no_work_comes_last() -> None:
    told = {"crashed": Standing(0.0, 0, ready=False), "busy": Standing(60.0, 9), "idle": Standing()}
    assert Balance(0.75).order(told, now_s=0.0) == ["idle", "busy", "crashed"]


def test_replicas_that_are_gone_are_forgotten() -> None:
    balance = Balance(0.75)
    balance.sent("a", 1.0)
    assert balance.order({"b": Standing()}, 1.1) == ["b"]
    assert not balance._sent.keys() - {"b"}
    assert not balance._last_s.keys() - {"b"}


def test_a_standing_is_read_as_it_was_told_and_one_that_has_told_nothing_is_idle() -> None:
    for standing in (Standing(2.5, 3), Standing(2.5, 3, ready=False)):
        assert Standing.of(standing.told()) == standing
    assert Standing.of({}) == Standing()
