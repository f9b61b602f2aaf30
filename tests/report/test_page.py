"""The page of a real run, in a real browser: it draws, fetches nothing, and says what is missing."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from lightning_llm.report import report
from lightning_llm.report.record import read_run
from lightning_llm.settings import UserError

STAGES = ("pretrain", "long_context", "sft", "dpo", "reward_model", "online_dpo")


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; where there is none the tests skip, but never silently in CI."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        reason = "no chromium and no google-chrome: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root needs that
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """`opened(path)` -> the page with all figures drawn; errors and requests fail the test at its end."""
    errors, requests, contexts = [], [], []

    def open_page(path, *, width=1200, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    fetched = [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    assert fetched == []


@pytest.fixture(scope="session")
def page_path(run_folder, tmp_path_factory):
    return report([run_folder], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def copied(run_folder, tmp_path):
    """A copy of the run that a test may spoil."""
    return shutil.copytree(run_folder, tmp_path / run_folder.name, symlinks=False)


def text(html):
    """What a reader without scripts sees."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL))


def test_the_page_draws_everything_and_fetches_nothing(run_folder, page_path, opened):
    page = opened(page_path)
    plan = json.loads((run_folder / "plan.json").read_text())
    assert page.locator(".graph.wide svg a.node").count() == len(plan["stages"])
    figures = page.locator(".figure")
    assert figures.count() >= 6
    assert page.locator(".figure .main-svg").count() >= figures.count()
    assert page.locator(".figure.is-waiting").count() == 0
    for stage in STAGES:
        assert page.locator("#stages").get_by_text(stage, exact=True).first.is_visible()
    for title in ("Training", "Mixture consumed", "Evaluation", "Preference training", "Samples", "Settings"):
        assert page.get_by_role("heading", name=title, exact=True).is_visible()


def test_boxes_lead_to_rows(page_path, opened):
    page = opened(page_path)
    page.locator('.graph.wide a[href="#stage-dpo"]').click()
    assert page.evaluate("document.querySelector('tr:target th').innerText").strip() == "dpo"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(page_path, opened, scheme):
    page = opened(page_path, width=390, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".graph.narrow").is_visible()
    assert not page.locator(".graph.wide").is_visible()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness < 80) == (scheme == "dark")


def test_the_page_is_small_and_complete_without_scripts(page_path):
    html = page_path.read_text(encoding="utf-8")
    assert len(html) < 3_000_000
    assert not re.search(r"""(src|href)=["'](https?:)?//""", html)
    for figure in ("tasks/exact_match", "preference/accuracy", "judge/both_wrong", "perplexity/"):
        assert figure in text(html)


def test_figures_are_what_plotly_knows(page_path):
    """Every property of every figure is one that Plotly documents: a misspelt one would be ignored silently."""
    from plotly.graph_objects import Figure

    found = re.findall(r'<script type="application/json">(.*?)</script>', page_path.read_text(encoding="utf-8"))
    assert found
    for figure in found:
        Figure(json.loads(figure))


def test_words_of_models_and_data_stay_words(copied, tmp_path, opened):
    """A sample, a metric and a recipe that try to be HTML, also inside the JSON of a figure and in Markdown."""
    attack = "<script>document.title = 'taken'</script></script><img src=x onerror=\"document.title='taken'\">"
    samples = copied / "artifacts" / "online_dpo.evaluate" / "samples.json"
    controls = "a\x00b\x1bc"
    changed = [sample | {"response": attack, "prompt": attack + controls} for sample in json.loads(samples.read_text())]
    samples.write_text(json.dumps(changed))
    curves = copied / "artifacts" / "sft" / "metrics.jsonl"
    lines = [json.loads(line) for line in curves.read_text().splitlines()]
    for line in lines:
        if "consumed" in line:
            line["consumed"][attack] = 7
    curves.write_text("\n".join(map(json.dumps, lines)))
    recipe = json.loads((copied / "recipe.json").read_text())
    (copied / "recipe.json").write_text(json.dumps(recipe | {"name": attack}))
    facts = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(facts | {"recipe": attack}))

    path = report([copied], tmp_path / "page.html")
    page = opened(path)
    assert page.title() != "taken"
    assert page.locator("img").count() == 0
    assert attack in page.locator("#samples").inner_text()
    for written in (path, path.with_suffix(".md")):
        text = written.read_text()
        assert "a\u2400b\u241bc" in text
        assert not set(text) & set(map(chr, range(9)))
    outside_code = re.sub(r"^(`{3,}).*?^\1$", "", path.with_suffix(".md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_code


def test_a_run_that_was_cut_says_what_is_missing(copied, tmp_path, opened):
    missing = ["sft.evaluate", *("dpo", "dpo.evaluate"), *("reward_model", "reward_model.evaluate")]
    missing += ["online_dpo", "online_dpo.evaluate"]
    for name in missing:
        shutil.rmtree(copied / "artifacts" / name)
    curves = copied / "artifacts" / "sft" / "metrics.jsonl"
    curves.write_text(curves.read_text()[:-20])  # cut in the middle of a line
    page = opened(report([copied], tmp_path / "page.html"))
    notice = page.locator(".notice").inner_text()
    assert "not made" in notice
    assert all(name in notice for name in (*missing, "sft/metrics.jsonl:"))
    assert page.locator("#preference").count() == 0
    assert page.locator(".graph.wide a.node.is-missing").count() == len(missing)
    assert "Incomplete" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("name", ["run.json", "plan.json", "recipe.json", "artifacts"])
def test_any_part_may_be_missing(copied, tmp_path, name):
    part = copied / name
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    html = report([copied], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Incomplete" in text(html)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        report([tmp_path], tmp_path / "page.html")
    with pytest.raises(UserError, match="no run is named"):
        report([], tmp_path / "page.html")


def test_several_runs_share_their_figures(run_folder, copied, tmp_path, opened):
    other = copied.rename(copied.with_name("other"))
    recipe = json.loads((other / "recipe.json").read_text())
    recipe["stages"]["dpo"]["objective"]["beta"] = 0.4321
    (other / "recipe.json").write_text(json.dumps(recipe))
    path = report([run_folder, other], tmp_path / "page.html")
    page = opened(path)
    assert page.get_by_role("heading", level=1).inner_text().startswith("2 runs of ")
    row = page.locator("main > .table tr", has_text="stages.dpo.objective.beta").inner_text()
    assert "0.4321" in row
    assert page.locator("main > .table tr", has_text="stages.dpo.lr").count() == 0  # the same in both
    names = page.locator("#training .legendtext").all_text_contents()
    assert sorted(names) == ["beta 0.1", "beta 0.4321"]  # the one setting in which they differ
    assert "other" in page.locator("main > .table tr", has_text="folder").inner_text()
    assert "0.4321" in path.with_suffix(".md").read_text()


def test_runs_that_differ_in_nothing_keep_their_names(run_folder, copied, tmp_path):
    other = copied.rename(copied.with_name("other"))
    html = report([run_folder, other, other], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "3 runs of" in text(html)
    assert run_folder.name in text(html)


def test_edges_are_found_without_a_plan(copied):
    """The keys in stage.json tell where an input came from."""
    planned = read_run(copied)
    (copied / "plan.json").unlink()
    found = read_run(copied)
    assert {node.name for node in found.nodes} == {node.name for node in planned.nodes}

    def keys(run, name):  # two nodes may share an artifact, as the data of pretrain and long_context do
        return {role: run.by_name[source].record["key"] for role, source in run.by_name[name].inputs.items()}

    for node in planned.nodes:
        assert keys(found, node.name) == keys(planned, node.name)
