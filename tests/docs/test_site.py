"""The built site: a reader finds the answer to a question, from its front page and by its search."""

import html
import json
import re
from typing import Any, NamedTuple

import pytest

from support.docs import ROOT

SITE = ROOT / "build" / "site" / "html"
TOP = 3
"""The results that a reader looks at."""

pytestmark = pytest.mark.docs


class Question(NamedTuple):
    asked: str
    page: str
    """Where the answer is, with its section."""
    answer: str
    """What that section says."""


QUESTIONS = [
    Question("serve Qwen2.5-7B on 24 GB", "sizing/#qwen25-7b-on-24-gb", "forebay plan --gpu-memory 24GiB"),
    Question("two models", "two-models/", "forebay inference"),
    Question("why 503", "troubleshooting/", "queue_full"),
    Question("TLS", "security/#tls", "A proxy or an ingress in front of it ends TLS"),
    Question("three GPUs on Kubernetes", "kubernetes/#three-gpus", "maxReplicaCount: 3"),
    Question("which of my teams used what", "usage/", "group_by=key"),
]


def searched(text: str) -> list[str]:
    """The places with all words of `text`; those that have more of them in their titles come first."""
    words = set(re.findall(r"[\w.-]+", text.lower()))
    found = []
    for item in json.loads((SITE / "search.json").read_text())["items"]:
        title, content = item["title"].lower(), f"{item['title']} {item['text']}".lower()
        if all(word in content for word in words):
            found.append((-sum(word in title for word in words), item["level"], item["location"]))
    return [location for *_, location in sorted(found)]


def text_of(location: str) -> str:
    """What a page says from a section on."""
    page, _, anchor = location.partition("#")
    text = (SITE / page / "index.html").read_text()
    return html.unescape(re.sub(r"<[^>]*>", "", text[text.index(f'id="{anchor}"') if anchor else 0 :]))


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.asked)
def test_the_front_page_and_the_search_lead_to_the_answer(question: Question) -> None:
    front = (SITE / "index.html").read_text()
    answers = front[front.index('id="find-it-in-a-minute"') : front.index('id="pages-by-task"')]
    assert f'href="{question.page}"' in answers
    assert question.answer in text_of(question.page)
    assert {question.page, "#find-it-in-a-minute"} & set(searched(question.asked)[:TOP])


def test_each_page_is_one_click_away() -> None:
    front = (SITE / "index.html").read_text()
    pages = {str(page.parent.relative_to(SITE)) for page in SITE.rglob("index.html")} - {"."}
    assert {page for page in pages if f'href="{page}/"' not in front} == set()


def test_a_page_asks_nobody_else_for_anything() -> None:
    front = (SITE / "index.html").read_text()
    loaded: list[Any] = re.findall(r'<(?:script|link|img|source)\b[^>]*(?:src|href)="(https?:[^"]*)"', front)
    assert loaded == []
