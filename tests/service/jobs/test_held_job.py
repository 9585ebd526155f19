import asyncio

import pytest

from tests.service.fakes import INFO, LIMITS, make_spec
from tminus.service.jobs.held_job import LAST_STATES, TRANSITIONS, HeldJob, HeldState, ModelOfJobs
from tminus.service.jobs.store.records import JobRecord
from tminus.service.preview import Mailbox, Pace, Watch


def test_from_every_state_a_job_comes_to_an_end_and_from_the_last_ones_to_nothing_else() -> None:
    assert set(TRANSITIONS) == set(HeldState)
    assert {HeldState.ENDED, HeldState.LOST} == LAST_STATES
    reached = {state: set(following) for state, following in TRANSITIONS.items()}
    for _ in HeldState:
        for following in reached.values():
            following |= {later for each in following for later in TRANSITIONS[each]}
    assert all(HeldState.ENDED in following for state, following in reached.items() if state not in LAST_STATES)
    assert not any(state in following for state, following in reached.items()), "none comes twice"


@pytest.mark.parametrize("way", [[HeldState.LEFT], [HeldState.ENDING, HeldState.ENDED], [HeldState.LOST]])
def test_viewers_are_told_when_nothing_more_is_made_of_a_job_here(way: list[HeldState]) -> None:
    async def follow() -> None:
        mailbox = Mailbox(asyncio.get_running_loop(), lambda: None)
        job = HeldJob(JobRecord("a", make_spec(), 1), ModelOfJobs(0, INFO, LIMITS))
        job.viewers[Watch(Pace(every=1), (), mailbox.put)] = mailbox
        for state in way:
            job.become(state)
        assert await mailbox.take() is None
        assert job.over.is_set() == (job.state in LAST_STATES)

    asyncio.run(follow())
