from tests.service.scheduling.test_forecast import SAME, SRPT, pendings, plain
from tminus.service.scheduling.fluid import Fluid


def test_it_stops_at_a_time() -> None:
    fluid = Fluid(pendings(plain(8, 10)), SRPT, SAME)
    assert fluid.step(until_s=2.5) == []
    assert (fluid.now_s, fluid.places_left, fluid.tick_end_s) == (2.5, 60.0, 3.0)
    assert fluid.step() == ["job0"]
    assert (fluid.jobs, fluid.rows, fluid.places_left, fluid.now_s) == (0, 0, 0, 10.0)
    assert fluid.step(until_s=25.0) == []
    assert fluid.now_s == 25.0
