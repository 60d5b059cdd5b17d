"""The workflow of a release, the Makefile that it calls, and the page that describes it."""

import re
import runpy
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
JOBS = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
RELEASES = (ROOT / "docs" / "upgrading.md").read_text().partition("## Releases")[2].partition("\n## ")[0]


def test_each_make_target_exists_and_is_described() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {found for step in STEPS for found in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))}
    assert targets >= {"check", "test", "dist", "images", "sbom"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert f"`make {target}" in RELEASES, target


def test_actions_are_pinned_and_rights_are_least() -> None:
    for step in STEPS:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40))
    assert WORKFLOW["permissions"] == {"contents": "read"}
    may_write = {
        name: {right for right, kind in job.get("permissions", {}).items() if kind == "write"}
        for name, job in JOBS.items()
    }
    assert may_write == {
        "checks": set(),
        "packages": set(),
        "images": {"packages"},
        "index": {"id-token"},
        "release": {"contents", "packages"},
    }


def test_no_expression_of_the_workflow_is_a_part_of_a_script() -> None:
    """The name of a tag or a branch could be a command; a variable of the environment is a text."""
    assert not [step["run"] for step in STEPS if "${{" in step.get("run", "")]
    # A token is in the environment of the one step that needs it.
    assert not [name for name, job in JOBS.items() if "github.token" in str(job.get("env"))]


def test_packages_are_published_when_all_is_made() -> None:
    assert all(JOBS[name]["needs"] == "checks" for name in ("packages", "images"))
    assert all(set(JOBS[name]["needs"]) == {"packages", "images"} for name in ("index", "release"))


def test_every_image_is_released() -> None:
    built = re.search(r"\((.*)\)\" >&2; exit 2", (ROOT / "deploy" / "images" / "build.sh").read_text())
    assert built is not None
    assert JOBS["images"]["strategy"]["matrix"]["image"] == built[1].split(", ")


def test_the_readme_of_an_index_leads_to_the_repository() -> None:
    absolute = runpy.run_path(str(ROOT / "scripts" / "readme.py"))["absolute"]
    readme = absolute((ROOT / "README.md").read_text(), "https://example.org/forebay", "v1.2.3")
    assert "(https://example.org/forebay/blob/v1.2.3/docs/README.md)" in readme
    assert 'src="https://example.org/forebay/raw/v1.2.3/docs/images/page-light.png"' in readme
    assert not re.findall(r"\]\((?!https?:|#)|(?:src|srcset)=\"(?!https?:)", readme)


def test_a_change_is_tested_by_the_commands_of_the_readme() -> None:
    named = set(re.findall(r"^    make (\S+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"run", "test", "check"} <= named
    assert named - {"run"} <= set(re.findall(r"^make (\S+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
