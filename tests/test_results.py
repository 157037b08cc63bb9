"""The tables of results, against logs written here, and those of the README against the committed ones."""
import glob
import json
import os
import shutil
import statistics

import pytest

import hubconf
import main as pretraining
import main_lincls
from conftest import REPO
from utils import log, plot, results

TOP1 = (91.7, 91.9, 92.3)


def write(folder, settings, records, device="a GPU"):
    os.makedirs(folder)
    log.write_json(os.path.join(folder, "config.json"), {"argv": [], "commit": None, "date": "2026-11-25", "device": device, "versions": {"torch": "2.11.0+cu130"}, "settings": settings})
    for record in records:
        log.append(folder, record)


def defaults(parser, **settings):
    return {**vars(parser.parse_args([])), "precision": "bf16", **settings}


def write_pair(name, seed=0, top1=91.0, wall=True, linear=(), **settings):
    """The logs of a run of two epochs, of which the settings say how many, and of its evaluation."""
    run = defaults(pretraining.make_parser(), **{"learning_rate": 0.06, "seed": seed, "trial": name, **settings})
    epochs = run["epochs"]
    times = {"seconds": 60.0, **({"wall_seconds": 90.0} if wall else {})}
    write(name, run, [
        {"epoch": 0, "knn1": 20.0 + seed, "knn200": 30.0 + seed}, {"epoch": 1, "loss": -0.5, **times},
        {"epoch": epochs, "loss": -0.9, "knn1": 88.0 + seed, "knn200": 90.0 + seed, **times},
    ])
    evaluation = defaults(main_lincls.make_parser(), **{"lr": 30.0, "pretrained": f"experiments/{name}/backbone.pt", **dict(linear)})
    write(f"{name}-linear", evaluation, [{"epoch": 50, "test_top1": top1 + 1}, {"epoch": evaluation["epochs"], "test_top1": top1}])
    return name


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_defaults_are_the_papers_recipe_and_protocol():
    """What the tables leave unsaid is what the scripts do by default."""
    run, linear = defaults(pretraining.make_parser(), learning_rate=0.06), defaults(main_lincls.make_parser(), lr=30.0)
    assert results.recipe_of(run) == "ResNet-18" and results.is_the_papers(run) and not list(results.differences(linear, results.PROTOCOL))
    assert {name: run[name] for name in results.RECIPE if name != "learning_rate"} == {name: value for name, value in results.RECIPE.items() if name != "learning_rate"}
    assert hasattr(hubconf, results.PAPER_WEIGHTS)


def test_three_seeds_are_a_line_with_mean_and_standard_deviation():
    names = [write_pair(f"paper-seed{seed}", seed, top1) for seed, top1 in enumerate(TOP1)]
    groups = results.read_groups(names)
    lines = results.full_table(groups)
    assert cells(lines[2]) == [
        "ResNet-18", "800", "3", "89.00 ± 1.00", "91.00 ± 1.00", f"{statistics.fmean(TOP1):.2f} ± {statistics.stdev(TOP1):.2f}",
        f"{statistics.fmean(TOP1) + 1:.2f} ± {statistics.stdev(TOP1):.2f}", "3.0 min, a GPU, bf16, torch 2.11.0, 2026-11-25",
    ]
    assert cells(lines[3]) == ["the same, untrained", "0", "3", "21.00 ± 1.00", "31.00 ± 1.00", "–", "–", "–"]
    assert len(lines) == 4
    lines = results.brief_table(groups)
    top1 = f"{statistics.fmean(TOP1):.2f} ± {statistics.stdev(TOP1):.2f}"
    assert cells(lines[2]) == ["ResNet-18", "800", "3", "91.00 ± 1.00; untrained 31.00 ± 1.00", top1, "3.0 min, a GPU, bf16"]
    assert cells(lines[3]) == ["published: paper", "800", "–", "about 90", "91.8", "–"]
    assert not any("paper's own run" in line for line in lines)
    assert "is not among these yet" in results.brief_table([])[-1] and "has 2 seeds so far" in results.brief_table(results.read_groups(names[:2]))[-1]


def test_what_differs_from_the_recipe_and_the_protocol_is_said():
    write_pair("small", wall=False, epochs=12, width=16, batch_size=128, blur=0.5, linear={"features": "cached", "lr": 3.0})
    write_pair("proportional", epochs=12, batch_size=100, learning_rate=0.03 * 100 / 256, train_size=5000, linear={"train_size": 5000})
    groups = results.read_groups(["small", "proportional"])
    lines = results.full_table(groups)
    assert cells(lines[2])[0] == "ResNet-18, 5,000 training pictures, batch 100"  # the wider one first
    assert cells(lines[2])[5] == "91.00"
    assert cells(lines[4])[0] == "ResNet-18, width 16, batch 128, rate 0.06, `--blur 0.5`"
    assert list(results.differences({"train_size": 500, "crop_scale": [0.9, 1.0], "seeds": 3, "fraction": 0.1}, results.PROTOCOL)) == [
        "500 training pictures", "`--seeds 3`", "`--crop_scale [0.9, 1.0]`", "0.1 of the labels",
    ]
    assert cells(lines[4])[5] == "91.00 (cached features, rate 3)" and cells(lines[4])[7] == "2.0 min (steps alone), a GPU, bf16, torch 2.11.0, 2026-11-25"
    assert cells(results.brief_table(groups)[3])[5] == "2.0 min (steps alone), a GPU, bf16"


def test_what_is_no_result_is_refused(capsys):
    write_pair("a")
    shutil.copytree("a-linear", "b-linear")
    write_pair("half", epochs=20)
    with open("half/log.jsonl") as file:
        lines = file.readlines()
    with open("half/log.jsonl", "w") as file:
        file.writelines(lines[:-1])
    write("b", defaults(pretraining.make_parser(), trial="b", learning_rate=0.06), [{"epoch": 800, "loss": -0.9, "knn1": 1.0, "knn200": 1.0, "seconds": 1.0}])
    write_pair("c", 1, linear={"features": "cached"})
    write_pair("again")
    write_pair("elsewhere", exp_dir="other")
    open("marks.md", "w").close()
    for args, words in (
        (["b"], "an evaluation of experiments/a/backbone.pt, not of b"), (["half"], "not a finished run"), (["a-linear"], "not a finished run"),
        (["a", "c"], "different protocols"), (["a", "again"], "same recipe and seed"),
        (["elsewhere"], "not of elsewhere"), (["none"], "none"), (["a", "--update", "none.md"], "none.md"), (["a", "--update", "marks.md"], "no marks of a table"),
    ):
        with pytest.raises(SystemExit) as stop:
            results.main(args)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and words in said and said.count("\n") == 1, said


def test_without_folders_it_is_the_runs_on_all_of_cifar10_in_logs(capsys, monkeypatch):
    os.mkdir("logs")
    monkeypatch.chdir("logs")
    for name, settings in (
        ("whole", {}), ("some", {"train_size": 500}), ("shapes", {"dataset": "shapes"}), ("alone", {"epochs": 700}), ("half", {"epochs": 600}), ("other", {"epochs": 400}),
    ):
        write_pair(name, exp_dir="experiments", **settings)
    shutil.rmtree("alone-linear")
    with open("half/log.jsonl") as file:
        lines = file.readlines()
    with open("half/log.jsonl", "w") as file:
        file.writelines(lines[:-1])
    monkeypatch.chdir("..")
    results.main([])
    full = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [cells(line)[1] for line in full[2:]] == ["800", "0", "400", "0"]
    results.main(["--figures", "imgs"])
    assert sorted(os.listdir("imgs")) == ["loss-plot.png", "top1-acc.png"]
    plot.main(["logs/whole", "--output", "drawn", "--format", "png"])  # of the first line
    for name in os.listdir("imgs"):
        with open(f"imgs/{name}", "rb") as own, open(f"drawn/{name}", "rb") as reference:
            assert own.read() == reference.read()
    results.main(["logs/whole", "logs/whole/"])  # once
    assert "± 0.00" not in capsys.readouterr().out


def test_a_document_gets_its_tables_and_keeps_the_rest():
    text = "before\n<!-- results: how -->\nold\n<!-- end of results -->\nbetween\n<!-- weights -->\n<!-- end of weights -->\nafter\n"
    with open("a.md", "w") as file:
        file.write(text)
    for _ in range(2):  # again: the same
        results.update("a.md", {"results": ["one", "two\\1"], "weights": ["three"]})
        with open("a.md") as file:
            assert file.read() == (
                "before\n<!-- results: how -->\n\none\ntwo\\1\n\n<!-- end of results -->\nbetween\n<!-- weights -->\n\nthree\n\n<!-- end of weights -->\nafter\n"
            )


def test_the_documents_tables_are_those_of_the_logs_and_weights(monkeypatch, tmp_path):
    names = ("README.md", os.path.join("logs", "README.md"))
    os.mkdir("logs")
    for name in names:
        text = (REPO / name).read_text()
        assert text.count("-->\n\n| ") == text.count("<!-- end of ") > 0
        (tmp_path / name).write_text(text.replace("\n\n| ", "\n\n| other "))
    monkeypatch.chdir(REPO)
    results.main(["--update", *(str(tmp_path / name) for name in names)])
    for name in names:
        assert (tmp_path / name).read_text() == (REPO / name).read_text().replace("\n\n| ", "\n\n| other ").replace("-->\n\n| other ", "-->\n\n| ")


def test_the_runs_of_the_table_are_those_on_all_pictures(monkeypatch):
    """And each of their numbers is the last of a log."""
    monkeypatch.chdir(REPO)
    chosen = [folder for folder in sorted(glob.glob("logs/*")) if results.is_a_result(folder)]
    assert {"logs/cifar10-w16-12ep", "logs/cifar10-w16-24ep"} <= set(chosen)
    groups = results.read_groups(chosen)
    full, brief = ("\n".join(table(groups)) for table in (results.full_table, results.brief_table))
    for folder in ("logs/cifar10-w16-24ep", "logs/cifar10-w16-24ep-linear"):
        with open(os.path.join(folder, "log.jsonl")) as file:
            last = json.loads(file.readlines()[-1])
        for name in ("knn1", "knn200", "test_top1"):
            if name in last:
                assert f"| {last[name]:.2f} " in full and (name == "knn1" or f"| {last[name]:.2f}" in brief)
