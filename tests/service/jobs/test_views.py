from tests.service.fakes import INFO, FakeEngine, make_spec
from tminus.service.jobs.views import passing_view
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.scheduling.sharing import Sharing
from tminus.service.work import Outlook, work_of
from tminus.service.worker.loaded_models import LoadedModel
from tminus.service.worker.running_job import RunningJob


def test_the_time_at_which_a_job_was_accepted_is_the_same_however_late_one_looks() -> None:
    spec = make_spec()
    model = LoadedModel(0, FakeEngine(), Scheduler(Sharing.of(8)))
    job = RunningJob("a" * 32, model, spec, work_of(spec, INFO), submitted_s=10.0, deadline_s=None)
    views = [passing_view(job.status(Outlook(0, 1.0), now_s)) for now_s in (10.0, 10.0007, 25.0)]
    assert {view.record.created_us for view in views} == {job.created_us}
