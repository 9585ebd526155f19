"""Search for the timesteps whose fitted table ends nearest to the teacher's images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tminus.model.timesteps import log_sigma_at, timestep_at
from tminus.model.tuning.fit import Fit, Fitter

SMALLEST_MOVE = 0.06
LONGEST_WAY = 2.0  # in log rho: that between the first timesteps may be longer
WORTHWHILE = 0.01  # a round that betters the error by less than this share makes the moves smaller


@dataclass(frozen=True, slots=True)
class Search:
    """How far a search has come: the best so far, the moves to try next, and their size."""

    best: Fit
    round: int = 0
    move: float = 0.5  # how far a timestep is moved, as a share of the way to its neighbour, in log rho
    evaluations: int = 0


def search_timesteps(
    fitter: Fitter,
    search: Search,
    settle: Callable[[Sequence[float]], tuple[float, ...]],
    log_sigmas: Sequence[float],
    on_round: Callable[[Search], None],
) -> Search:
    """Move the timesteps one by one, each way, while the error of the fitted table falls on held-out rows.

    `settle` makes timesteps what the network takes. After each round `on_round` gets the state, from which the search
    goes on. It ends when the moves are small.
    """
    while search.move >= SMALLEST_MOVE:
        begun, best, evaluations = search.best, search.best, search.evaluations
        for k in range(len(best.timesteps)):
            for sign in (1, -1):
                timesteps = settle(moved(best.timesteps, k, sign * search.move, log_sigmas))
                if timesteps == best.timesteps:
                    continue
                found, evaluations = fitter.fit(timesteps, like=best), evaluations + 1
                if found.held_out < best.held_out and found.fitted < best.fitted:
                    best = found
                    break
        smaller = best.held_out > begun.held_out * (1 - WORTHWHILE)
        search = Search(best, search.round + 1, search.move / 2 if smaller else search.move, evaluations)
        on_round(search)
    return search


def moved(timesteps: Sequence[float], k: int, share: float, log_sigmas: Sequence[float]) -> list[float]:
    """Move timestep k by a share of the way to its neighbour in log rho: up to the noisier, down to the cleaner."""
    levels = [log_sigma_at(t, log_sigmas) for t in timesteps]
    cleanest = log_sigmas[0] if k + 1 == len(timesteps) else levels[k + 1]
    noisiest = log_sigmas[-1] if k == 0 else levels[k - 1]
    way = noisiest - levels[k] if share > 0 else levels[k] - cleanest
    level = levels[k] + share * min(way, LONGEST_WAY)
    return [*timesteps[:k], timestep_at(level, log_sigmas), *timesteps[k + 1 :]]
