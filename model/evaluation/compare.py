"""Compare two reports on the same samples: does another way of running a network make worse images?"""

import dataclasses
from dataclasses import dataclass

from tminus.model.evaluation.report import EvaluationReport

MAX_FRECHET_RATIO = 1.02
MAX_ACCURACY_LOSS = 0.01  # between samples drawn from the same noise, which share most of the luck
MAY_DIFFER = ("precision", "executor", "batch_size")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The verdict on a candidate, compared with its reference. A figure is None where a report lacks it."""

    frechet_ratio: float | None  # candidate / reference: above 1 is worse
    accuracy_difference: float | None  # candidate - reference: below 0 is worse
    ok: bool
    reason: str


def compare_reports(reference: EvaluationReport, candidate: EvaluationReport) -> Comparison:
    """Call a candidate ok if its Fréchet distance is at most 2 % above and its class accuracy at most 0.01 below.

    An unconditional model is judged by the distance alone; with neither figure nothing is ok. Raises ValueError, naming
    what differs, unless both reports are of the same weights, samples, data and classifier.
    """
    _check_same(reference, candidate)
    ratio = difference = None
    one, other = reference.classifier_frechet_distance, candidate.classifier_frechet_distance
    if one is not None and other is not None:
        ratio = other.samples / max(one.samples, 1e-12)
    was, now = reference.class_accuracy, candidate.class_accuracy
    if was is not None and now is not None:
        difference = now.samples - was.samples
    if ratio is None and difference is None:
        return Comparison(None, None, ok=False, reason="no classifier judged the samples")
    faults = []
    if ratio is not None and not ratio <= MAX_FRECHET_RATIO:  # not >, so that NaN is a fault
        faults.append(f"the Fréchet distance is {ratio:.3f} times the reference's, over {MAX_FRECHET_RATIO}")
    if difference is not None and not difference >= -MAX_ACCURACY_LOSS:
        faults.append(f"class accuracy moves by {difference:+.3f}, more than {-MAX_ACCURACY_LOSS}")
    return Comparison(ratio, difference, ok=not faults, reason="; ".join(faults) or "no worse than the reference")


def _check_same(one: EvaluationReport, other: EvaluationReport) -> None:
    def what(report: EvaluationReport) -> dict[str, object]:
        options = dataclasses.asdict(report.options)
        judge = report.classifier.weights_hash if report.classifier is not None else None
        data = {"train_data": report.train_data, "test_data": report.test_data, "classifier": judge}
        kept = {key: value for key, value in options.items() if key not in MAY_DIFFER}
        return {"weights_hash": report.weights_hash, **data, **kept}

    mine, theirs = what(one), what(other)
    for key, value in mine.items():
        if theirs[key] != value:
            raise ValueError(
                f"the reports cannot be compared: {key} is {value!r} in one and {theirs[key]!r} in the other"
            )
