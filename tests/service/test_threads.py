import threading

from tminus.service.threads import started_pool


def test_a_pool_starts_no_thread_when_it_gets_a_task() -> None:
    pool = started_pool(3, "tminus-test")
    running = {thread for thread in threading.enumerate() if thread.name.startswith("tminus-test")}
    assert len(running) == 3
    together = threading.Barrier(3)
    users = [pool.submit(lambda: (together.wait(5), threading.current_thread())[1]) for _ in range(3)]
    assert {user.result() for user in users} == running
    pool.shutdown()
