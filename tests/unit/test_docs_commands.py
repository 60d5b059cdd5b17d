"""Each `forebay` command of the docs: the command line takes its options, and the settings before it can hold."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forebay_cli.main import app
from forebay_cli.main import load as load_command
from forebay_contracts.settings import ApiSettings, InferenceSettings, Settings, load
from support.docs import PAGES, ROOT, commands, inline, programs, words

SERVICES: dict[str, tuple[type[Settings], ...]] = {
    "up": (ApiSettings, InferenceSettings),
    "api": (ApiSettings,),
    "inference": (InferenceSettings,),
    "fetch": (InferenceSettings,),
}


PLACEHOLDERS = ("MissingParameter", "BadParameter", "BadOptionUsage", "NoArgsIsHelpError")
"""What is wrong with `forebay up --engine` and `forebay up --workers N`."""


def taken(name: str, arguments: list[str], *, whole: bool) -> None:
    """Parse as the command line does; raises if it would refuse. Else arguments may be missing or placeholders."""
    command = load_command(name)
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments.pop(0)]
    try:
        command.make_context(name, arguments)
    except Exception as exc:
        if whole or type(exc).__name__ not in PLACEHOLDERS:
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_line_takes_each_command(page: Path) -> None:
    shown = [(command, True) for command in commands(page)] + [(command, False) for command in inline(page)]
    for command, whole in shown:
        found = words(command)
        while found and re.match(r"[A-Z_]+=", found[0]):
            found.pop(0)
        if not found or not found[0].endswith("forebay") or {"…", "...", "COMMAND"} & set(found) or "[" in command:
            continue
        if len(found) > 1 and not found[1].startswith("-"):
            taken(found[1], found[2:], whole=whole)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_settings_before_a_service_can_hold(page: Path) -> None:
    for command in commands(page):
        found = words(command)
        given = dict(word.split("=", 1) for word in found if re.match(r"[A-Z_]+=", word))
        given = {name: "some" if value == "…" else value for name, value in given.items()}
        rest = found[len(given) :]
        if rest[:1] == ["forebay"] and (classes := SERVICES.get("".join(rest[1:2]))):
            if "--engine" in rest:
                given["INFERENCE_ENGINE"] = rest[rest.index("--engine") + 1]
            known = {name.upper() for kind in (ApiSettings, InferenceSettings) for name in kind.model_fields}
            assert given.keys() <= known, command
            for kind in classes:
                load(kind, _env_file=None, **{name.lower(): value for name, value in given.items()})


def test_the_settings_for_24_gb_are_those_that_the_plan_prints() -> None:
    page = ROOT / "docs" / "sizing.md"
    (written,) = programs(page, "sh")
    assert written == printed("forebay plan --gpu-memory 24GiB --model 7.6B --layers 28 --kv-heads 4 --head-dim 128")
    for_vllm = printed(
        "forebay plan --gpu-memory 24GiB --model 7.6B --layers 28 --kv-heads 4 --head-dim 128 --engine vllm"
    )
    start = next(command for command in commands(page) if command.startswith("INFERENCE_ENGINE=vllm"))
    assert set(for_vllm.split()) <= set(start.split())


def printed(command: str) -> str:
    """The settings that a plan of sizing.md prints."""
    assert command in commands(ROOT / "docs" / "sizing.md")
    lines = CliRunner().invoke(app, words(command)[1:]).output.splitlines(keepends=True)
    return "".join(line for line in lines if re.match(r"[A-Z_]+=", line))


def test_three_gpus_have_three_times_the_slots_and_the_queue_of_the_plan() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    overlay = ROOT / "deploy" / "kubernetes" / "overlays" / "production"
    slots = re.search(r"WORKER_SLOTS=(\d+)", (overlay / "inference.env").read_text())
    queue = re.search(r"by the plan of inference.env: (\d+) x", (overlay / "queue-config.env").read_text())
    assert slots is not None
    assert queue is not None
    assert f"{slots[1]} = {3 * int(slots[1])})" in page
    assert f"{queue[1]} = {3 * int(queue[1])})" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_in_a_list_is_fenced_and_four_spaces_in(page: Path) -> None:
    """What git hosts and the site both show as code."""
    assert re.findall(r"^(?:\d+\.|-) .*\n\n {5,7}\S.*", page.read_text(), re.MULTILINE) == []


def test_every_page_is_in_the_table_of_the_front_page_once() -> None:
    docs = ROOT / "docs"
    table = (docs / "README.md").read_text().partition("## Pages by task")[2]
    named = [link for link in re.findall(r"\]\((.+?)\)", table) if not link.startswith("../")]
    assert sorted(named) == sorted(
        str(page.relative_to(docs)) for page in docs.rglob("*.md") if page.name != "README.md"
    )
