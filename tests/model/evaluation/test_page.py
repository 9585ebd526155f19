"""The report's files: a page that opens in a parser and needs no other, in which no text is taken for HTML."""

import dataclasses
import io
import json
import sys
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.model.evaluation.toys import CPU, OPTIONS, toy_checkpoint, toy_images
from tminus.model.evaluation.classifier import Classifier
from tminus.model.evaluation.evaluate import evaluate
from tminus.model.evaluation.figures import Bound, Term
from tminus.model.evaluation.page import MAX_STRIPS, check_installed, plot_terms, report_files
from tminus.model.evaluation.report import Report
from tminus.model.evaluation.samples import EvaluateError, Point, draw_samples, strip_length

pytestmark = pytest.mark.slow

TRAIN, TEST = toy_images(96, 0), toy_images(60, 1)
POINTS = tuple(Point(name, steps) for name in ("ddim", "dpmpp_2m") for steps in (2, 3, 4, 5, 6, 7))
HOSTILE = "<script>alert(1)</script>\"&'<img src=x>"
COMMAND = "tminus evaluate --sampler ddim,dpmpp_2m --checkpoint 'a <b>'"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page as its elements, which must be closed in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == ["html"] or self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[tuple[str, bytes]]:
        """Media type and bytes of each picture."""
        found = []
        for tag, name, value in self.attributes:
            if (tag, name) == ("img", "src"):
                head, _, data = value.partition(";base64,")
                found.append((head.removeprefix("data:"), b64decode(data, validate=True)))
        return found


def measured(classifier: Classifier, **changes: object) -> Report:
    options = dataclasses.replace(OPTIONS, guidance=1.0)
    given = {"points": POINTS, "seeds": (5, 6), "references": (Point("ddpm", 20),)} | changes
    return evaluate(toy_checkpoint(), TRAIN, TEST, classifier, options, device=CPU, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report(toy_classifier: Classifier) -> Report:
    return measured(toy_classifier)


def page(report: Report) -> Page:
    return Page(report_files(report, COMMAND)["report.html"].decode())


def test_the_page_has_every_section_and_plot_and_needs_nothing_from_elsewhere(report: Report) -> None:
    opened, files = page(report), report_files(report, COMMAND)
    assert opened.tags.count("h2") == 5
    for text in (
        *("Evaluation of toy", "Quality over passes", "Samples", "Variational bound", "Settings"),
        *("is not FID", "10 images of 2 seeds", "linear, T = 20", "epsilon", "bright, dark, striped", "seeds 5, 6"),
        *(report.weights_hash, COMMAND),
    ):
        assert text in opened.text
    assert not {"script", "link", "iframe", "object"} & {*opened.tags}
    for tag, name, value in opened.attributes:
        assert name not in ("src", "href") or value.startswith("data:"), (tag, value)
        assert not name.startswith("on")
    assert files.keys() == {"report.html", "figures.json", "distances.svg", "terms.svg"}
    inlined = [data for kind, data in opened.images() if kind == "image/svg+xml"]
    assert inlined == [files["distances.svg"], files["terms.svg"]]
    for plot in inlined:
        assert ElementTree.fromstring(plot).tag.endswith("svg")


def test_sheets_are_the_first_samples_of_the_first_seed(report: Report) -> None:
    checkpoint = toy_checkpoint()
    strips = [data for kind, data in page(report).images() if kind == "image/png"]
    assert len(strips) == 2 * MAX_STRIPS + 1
    shown = [(name, steps) for name in ("ddim", "dpmpp_2m") for steps in (2, 4, 5, 7)] + [("ddpm", 20)]
    for (sampler, steps), data in zip(shown, strips, strict=True):
        options = dataclasses.replace(OPTIONS, guidance=1.0, sampler=sampler, steps=steps, seed=5)
        samples = draw_samples(checkpoint.net, checkpoint, options, device=CPU)
        count = min(strip_length(checkpoint), len(samples))
        expected = np.concatenate([image[0].numpy() for image in samples[:count]], axis=1)
        with Image.open(io.BytesIO(data)) as opened:
            np.testing.assert_array_equal(np.asarray(opened), expected)


def test_the_json_has_every_value_by_seed(report: Report) -> None:
    values = json.loads(report_files(report, COMMAND)["figures.json"])
    assert values == json.loads(report.to_json())
    assert [(p["sampler"], p["steps"]) for p in values["points"]] == [(p.sampler, p.steps) for p in POINTS]
    for point in (*values["points"], *values["references"]):
        by_seed = [each["classifier_frechet_distance"]["samples"] for each in point["seeds"]]
        assert [each["seed"] for each in point["seeds"]] == [5, 6]
        assert point["classifier_frechet_distance"]["mean"] == pytest.approx(sum(by_seed) / 2)
        assert point["classifier_frechet_distance"]["maximum"] == max(by_seed)
    assert not {"sampler", "steps", "guidance", "seed"} & values["options"].keys()
    assert len(values["bound"]["terms"]) == 2


def test_no_text_is_taken_for_html(report: Report) -> None:
    model = dataclasses.replace(report.model, class_names=(HOSTILE, "b"))
    hostile = dataclasses.replace(
        report, checkpoint=HOSTILE, train_data=HOSTILE, test_data=HOSTILE, device=HOSTILE, model=model
    )
    text = report_files(hostile, HOSTILE)["report.html"].decode()
    opened = Page(text)
    assert "script" not in opened.tags
    assert opened.tags == page(report).tags
    assert opened.text.count(HOSTILE) >= 6
    assert HOSTILE not in text


def texts(svg: bytes | None) -> list[str]:
    assert svg is not None
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_curve_of_the_terms_is_drawn_from_l_0_to_the_last_timestep() -> None:
    terms = (Term(1, 1, 0.3), Term(2, 9, 0.01), Term(10, 999, 1e-5))
    found = texts(plot_terms(Bound(0.0, 0.4, 1.3, 1.7, 0.1, 5, 3, terms)))
    assert {"0", "1", "10", "100", "1000", "L_t, bits/dim"} <= {*found}
    assert plot_terms(Bound(0.0, 0.0, 1.3, 1.3, 0.1, 5, 0, ()))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EvaluateError, match=r"pip install '\.\[evaluate\]' in a checkout"):
        check_installed()
    with pytest.raises(EvaluateError, match="matplotlib"):
        plot_terms(Bound(0.0, 0.0, 1.3, 1.3, 0.1, 5, 0, ()))
