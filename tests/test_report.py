"""report.html: what is on the page, that it needs nothing beside it, and that a browser opens it."""
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import main as pretraining
import main_lincls
from conftest import SMALL
from utils import log, report
from utils.run import PAGE_SECONDS, RUNNING, RunWriter

BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The elements and words of a page, and whether its tags are balanced."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(Path(path).read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def assert_self_contained(page):
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object"), tag
        for name in ("src", "href", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes[name][:80])
    assert "@import" not in page.text and "url(" not in page.text


def test_the_page_of_a_run(finished_run):
    page = Page(os.path.join(finished_run, "report.html"))
    assert_self_contained(page)
    last = log.read(finished_run)[-1]
    for words in ("Finished.", f"{last['loss']:.4f}".replace("-", "−"), f"{last['knn200']:.2f}", "batch_size", "python main_lincls.py --arch resnet18"):
        assert words in page.text, words
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 6 and all(len(image["alt"]) > 20 and len(image["src"]) > 5000 for image in images)
    assert not any(attributes.get("http-equiv") == "refresh" for _, attributes in page.elements)


def test_the_page_of_a_linear_evaluation(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = "--dataset shapes --train_size 256 --test_size 100 --features cached --epochs 3 --trial eval".split()
    assert main_lincls.main([*settings, "--pretrained", os.path.join(finished_run, "backbone.pt")]) == 0
    assert {"confusion.png", "confusion.svg", "top1-acc.png", "report.html"} <= set(os.listdir("experiments/eval"))
    page = Page("experiments/eval/report.html")
    assert_self_contained(page)
    results = log.read_json("experiments/eval/results.json")
    assert f"top-1, last epoch (3) {results['test_top1']:.2f}" in page.text and "chosen on the test pictures" in page.text
    for name, value in results["class_top1"].items():
        assert f"{name} {'–' if value is None else f'{value:.1f}'}" in page.text
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 4  # loss, accuracy, rate, confusion


def test_a_running_page_loads_itself_again_and_a_stopped_one_says_how_to_go_on(finished_run, tmp_path):
    folder = str(tmp_path / "a <b> & 'c'")
    shutil.copytree(finished_run, folder)
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    config["settings"] |= {"epochs": 5, "trial": "</td><script>alert(1)</script>"}
    log.write_json(os.path.join(folder, "config.json"), config)
    report.write_report(folder, RUNNING)
    page = Page(os.path.join(folder, "report.html"))
    assert ("meta", {"http-equiv": "refresh", "content": str(PAGE_SECONDS)}) in page.elements
    assert "Running: 2 of 5 epochs done" in page.text and "</td><script>alert(1)</script>" in page.text
    assert_self_contained(page)
    report.write_report(folder)
    page = Page(os.path.join(folder, "report.html"))
    assert "Stopped: 2 of 5 epochs done. To go on: python main.py --resume" in page.text
    os.remove(os.path.join(folder, "log.jsonl"))
    Path(folder, "log.jsonl").touch()
    report.write_report(folder, RUNNING)
    assert "No epoch is done yet" in Path(folder, "report.html").read_text()


def test_a_run_shows_itself_from_its_start(tmp_path, monkeypatch):
    """In the first epoch there is a page already, and after each one, where there is time, a new one."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def show_progress(writer, draw_run, write_report, usual=RunWriter.show_progress):
        writer.drawing_seconds = 0.0  # there is time
        usual(writer, draw_run, write_report)
        page = Page(writer.path("report.html"))
        assert any(attributes.get("http-equiv") == "refresh" for _, attributes in page.elements)
        seen.append(re.search(r"Running: \d of 3", page.text).group())

    monkeypatch.setattr(RunWriter, "show_progress", show_progress)
    assert pretraining.main([*SMALL, "--epochs", "3", "--trial", "run"]) == 0
    assert seen == ["Running: 0 of 3", "Running: 1 of 3", "Running: 2 of 3"]
    assert "Finished." in Page("experiments/run/report.html").text


def test_the_page_of_a_run_that_diverged_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretraining.main([*SMALL, "--epochs", "3", "--learning_rate", "1e30", "--trial", "run"]) == 1
    page = Page("experiments/run/report.html")
    assert "Ended in epoch 1, step 2 of 8: the loss is nan" in page.text and "To go on" not in page.text and "lower --learning_rate" in page.text


def test_the_page_of_a_tested_classifier_has_no_epochs(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["--dataset", "shapes", "--train_size", "256", "--test_size", "100", "--pretrained", os.path.join(finished_run, "backbone.pt")]
    assert main_lincls.main([*settings, "--features", "cached", "--epochs", "2", "--trial", "trained"]) == 0
    assert main_lincls.main([*settings, "--evaluate", "experiments/trained/classifier.pt", "--trial", "tested"]) == 0
    page = Page("experiments/tested/report.html")
    assert "Finished." in page.text and "top-1 " in page.text and "To go on" not in page.text and "last epoch" not in page.text and "best epoch" not in page.text


def test_the_command_on_the_page_makes_a_new_run():
    argv = ["/some/where/main.py", "--trial", "a b", "--epochs", "3", "--resume", "auto", "--max_minutes=5", "--quiet", "--gpu", "0", "--exp_dir", "x y"]
    assert report.typed_again(argv) == "python main.py --epochs 3 --exp_dir 'x y'"


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_opens_the_page_without_errors_and_without_network(finished_run, tmp_path):
    path = os.path.join(finished_run, "report.html")
    net_log = tmp_path / "net.json"
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={net_log}", "--enable-logging=stderr",
         "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=120,
    )
    assert result.returncode == 0
    assert "CONSOLE" not in result.stderr
    assert result.stdout.count("<img") == 6 and "Finished." in result.stdout
    requests = set(re.findall(r'"url":"([a-z]+:[^"]{0,60})', net_log.read_text()))
    browsers_own = r"https?://([\w-]+\.)*(google|googleapis|gstatic|gvt1)\.com/"  # its updates and clock; the page has no such address
    assert all(url.startswith(("file:", "data:", "chrome")) or re.match(browsers_own, url) for url in requests), requests
