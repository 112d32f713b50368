"""`report.html`: whole, parseable, and alone in the world."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from hasten.core.trial import Result
from hasten.reporting.html import report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, ids and whatever a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href", "srcset", "action"):
                (self.uses if (value or "").startswith("#") else self.loads).append(value or "")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def text(result: Result) -> str:
    return report(result)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_every_tag_is_closed_where_it_belongs(page: Page) -> None:
    assert page.open == []


def test_ids_are_unique_and_every_reference_has_its_target(page: Page, text: str) -> None:
    assert len(page.ids) == len(set(page.ids))
    clips = re.findall(r"url\(#([^)]+)\)", text)
    assert clips
    assert {*clips, *(use[1:] for use in page.uses)} <= set(page.ids)


def test_loads_nothing(page: Page, text: str) -> None:
    assert page.loads == ["data:,"]
    assert "@import" not in text
    assert "<script" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_gives_every_trial_with_its_reason_and_command(page: Page, result: Result) -> None:
    missing = [
        trial.number for trial in result.trials if trial.reason not in page.text or trial.rebuild not in page.text
    ]
    assert missing == []


def test_tells_what_each_step_gave_and_how_it_was_done(page: Page, text: str, result: Result) -> None:
    assert "What each step gave" in page.text
    assert "7 engine=openvino 1.83x 247 µs 352 kB 98.0 % 8 student=resnet distillation=soft_labels 3.33x" in page.text
    assert "the first and the last layer &lt;stay&gt; float" in text
    assert "What each step gave" not in Page(report(replace(result, best=result.baseline))).text


def test_states_ratios_certificate_machine_and_limits(page: Page, result: Result) -> None:
    for claim in (
        "digits runs 42.1 times as fast as in eager PyTorch",
        "against eager PyTorch, 40.8x to 43.4x",
        "against the untouched model in onnxruntime, 17.2x to 18.2x",
        "smaller on disk, 4.39 MB → 118 kB",
        "accuracy 98.5 % 98.0 % 0.56 points 1.49 points 2.00 points",
        "confidence 95 %, one-sided",
        result.certificate.statement,
        "Example CPU 7000 16-Core Processor",
        "33.6 MB",
        result.warnings[0],
        "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db",
    ):
        assert claim in page.text


def test_text_of_others_stays_text(result: Result) -> None:
    hostile = "<script>alert(1)</script> & $x$ ${y}"
    trials = (*result.trials[:2], replace(result.trials[2], reason=hostile), *result.trials[3:])
    text = report(replace(result, trials=trials, experiment="<b>bold</b>"))
    assert "<script" not in text
    assert hostile in Page(text).text


def test_equal_results_give_equal_bytes(result: Result, text: str) -> None:
    assert report(result) == text


def test_stands_without_profiles_roofs_or_anything_accepted(result: Result) -> None:
    bare = replace(result.baseline, profile=None)
    page = Page(report(replace(result, baseline=bare, best=bare, trials=(bare,), front=(0,), speedup={}, binding="x")))
    assert "Nothing that was tried" in page.text
    assert "Where the time goes" not in page.text


def test_stands_with_only_failures_beside_the_baseline(result: Result) -> None:
    page = Page(report(replace(result, best=result.baseline, trials=(result.trials[0], result.trials[9]), front=(0,))))
    assert result.trials[9].reason in page.text


def test_says_when_test_rows_were_read_before(made_up: Callable[..., Result], result: Result) -> None:
    again = made_up(certificate=replace(result.certificate, reads=3))
    assert "3 different artefacts have been certified on these test rows" in Page(report(again)).text


def test_gives_every_constrained_metric_with_its_bound_and_what_is_allowed(forecast: Result) -> None:
    page = Page(report(forecast))
    assert page.open == []
    for claim in (
        "0.0126 squared_error on 310 test rows, 0.0125 before",
        "30.9 psnr on 310 test rows, 31.2 before",
        "psnr 31.4, drop at most 1.25, allowed 2",
        "squared_error 0.0123 0.01328 1.00 % of the baseline 1.50 % of the baseline 2.00 % of the baseline",
        "psnr 31.4 31.4 0.5 1.25 2",
        "psnr 31.2 30.9 0.3 0.75 2",
        "squared_error 0.0125 0.0126 0.80 % of the baseline 1.11 % of the baseline 2.00 % of the baseline",
    ):
        assert claim in page.text


def test_says_plainly_that_quality_is_unchecked(unchecked: Result) -> None:
    page = Page(report(unchecked))
    assert page.open == []
    assert "nothing has checked its quality" in page.text
    assert "Quality is unchecked: there is nothing to weigh the speed against." in page.text
    assert unchecked.certificate.statement in page.text
    assert "nan" not in page.text.split()


def test_tells_what_the_other_requests_of_the_target_take(served: Result, text: str) -> None:
    page = Page(report(served))
    assert "32 rows 21.6 [" in page.text
    assert "1 row of length 16" in page.text
    assert "12.0x [" in page.text
    assert "Other requests" not in Page(text).text
