"""What a trial found beside what is to be reached, and the table of it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """One line: what was looked at, what came out, what is to be reached, and whether it was."""

    what: str
    reached: str
    to_reach: str
    holds: bool


def most(what: str, value: float, limit: float, unit: str = "", form: str = ",.3g") -> Claim:
    """A value that must not be over a limit."""
    return Claim(what, f"{value:{form}}{unit}", f"at most {limit:{form}}{unit}", value <= limit)


def least(what: str, value: float, limit: float, unit: str = "", form: str = ",.3g") -> Claim:
    """A value that must not be under a limit."""
    return Claim(what, f"{value:{form}}{unit}", f"at least {limit:{form}}{unit}", value >= limit)


def none(what: str, found: int, of: int | None = None) -> Claim:
    """How often something happened that must not happen."""
    return Claim(what, f"{found}" if of is None else f"{found} of {of:,}", "0", found == 0)


def report(claims: Iterable[Claim]) -> int:
    """Print the table; the exit code, which is 1 where a claim does not hold."""
    claims = list(claims)
    print("| what | reached | to reach | |\n|---|---|---|---|")
    for claim in claims:
        print(f"| {claim.what} | **{claim.reached}** | {claim.to_reach} | {'yes' if claim.holds else 'NO'} |")
    return int(not all(claim.holds for claim in claims))
