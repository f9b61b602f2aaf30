"""What benchmarks of learning share: seeds beside one another, figures that are kept, and what is printed of claims."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_a_change_is_within_a_seed():
    from trials import changes, spreads  # pyright: ignore[reportMissingImports]

    before, after = spreads([{"x": 0.5}, {"x": 0.7}]), spreads([{"x": 0.6, "y": 1}, {"x": 0.6, "y": 1}])
    found = changes(before, after)
    assert set(found) == {"x"}
    assert found["x"]["values"] == pytest.approx([0.1, -0.1])


def test_a_spread_is_mean_and_sample_deviation():
    from trials import spread, spreads  # pyright: ignore[reportMissingImports]

    assert spread([1.0, 2.0, 6.0]) == {"values": [1.0, 2.0, 6.0], "mean": 3.0, "standard_deviation": 7**0.5}
    assert spread([1.0])["standard_deviation"] is None
    assert set(spreads([{"x": 1, "y": 1}, {"x": 2}])) == {"x"}


@pytest.mark.parametrize("jobs", ["1", "5"])
def test_what_is_found_belongs_to_its_arm_and_seed(tmp_path, jobs):
    import trials  # pyright: ignore[reportMissingImports]

    words = ["--seeds", "3", "1", "--jobs", jobs, "compute.threads=1", "store.root=here"]
    arguments = trials.parser(None, tmp_path / "result.json").parse_args(words)
    found = trials.of_arms(lambda seed, arm, overrides: (seed, arm, tuple(overrides)), ["a", "b"], arguments)
    typed = ("compute.threads=1", "store.root=here")
    assert found == {arm: [(3, arm, typed), (1, arm, typed)] for arm in ("a", "b")}
    about = trials.conditions(arguments)
    assert (about["seeds"], about["overrides"]) == ([3, 1], ["compute.threads=1"])


def test_curves_of_seeds_become_their_mean():
    from trials import mean_curve  # pyright: ignore[reportMissingImports]

    found = mean_curve([[(0, 6.0), (100, 4.0)], [(0, 7.0), (100, 5.0)]])
    assert found == {"tokens": [0, 100], "curve": [6.5, 4.5]}


def test_held_out_losses_are_read_from_the_journal(tmp_path):
    from trials import validation_curve  # pyright: ignore[reportMissingImports]

    lines = [{"step": 0, "tokens": 0, "validation/loss": 7.0}, {"step": 1, "tokens": 8, "loss": 6.9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert validation_curve(tmp_path) == [(0, 7.0)]
    assert validation_curve(tmp_path / "nothing") == []


def test_a_part_is_measured_and_the_others_stay(tmp_path, capsys):
    import claims  # pyright: ignore[reportMissingImports]
    import trials  # pyright: ignore[reportMissingImports]

    path, drawn = tmp_path / "results" / "x.json", []
    claims.write(path, {"old": {"claims": []}, "new": {"claims": [], "figure": 1}})

    def measure(part, arguments):
        return {"claims": [claims.worst("It rises", [0.2, -0.1], above=0.0)], "figure": len(arguments.seeds)}

    arguments = trials.parser(None, path, parts=["old", "new"]).parse_args(["--parts", "new", "--seeds", "0", "1"])
    with pytest.raises(SystemExit) as end:
        trials.publish_parts(
            arguments,
            path,
            measure,
            lambda part, found: [f"{part} {found['figure']}"],
            lambda *each: drawn.append(each),
        )
    assert end.value.code == 1
    result = json.loads(path.read_text())
    assert list(result) == ["old", "new"]
    assert result["new"]["figure"] == 2
    assert result["new"]["seeds"] == [0, 1]
    assert drawn == [("new", result)]
    assert capsys.readouterr().out == "new 2\nFAILS  It rises, worst seed: -0.1\n"


def test_a_result_elsewhere_leaves_the_picture_alone(tmp_path, monkeypatch, capsys):
    import claims  # pyright: ignore[reportMissingImports]
    import trials  # pyright: ignore[reportMissingImports]

    kept, other = tmp_path / "kept.json", tmp_path / "other.json"
    monkeypatch.setattr("sys.argv", ["script", "--result", str(other)])

    def measure(arguments):
        return {"claims": [claims.mean("It rises", [0.2, 0.4], above=0.0)], "figure": 3}

    def draw(result):
        raise AssertionError("a picture is drawn of the result that is kept")

    with pytest.raises(SystemExit) as end:
        trials.publish("About it", kept, measure, lambda result: [str(result["figure"])], draw, seeds=[4])
    assert not end.value.code
    assert json.loads(other.read_text())["seeds"] == [4]
    assert not kept.exists()
    assert capsys.readouterr().out == "3\nholds  It rises, mean over seeds: 0.3\n"


def test_pictures_of_the_same_figures_are_the_same(tmp_path):
    import figures  # pyright: ignore[reportMissingImports]

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with figures.drawing(tmp_path / name / "x.svg", columns=2, size=(4, 2)) as [left, right]:
            figures.dots(left, 1, [0.1, 0.2])
            figures.dots(right, [0.1, 0.2], 3)
            right.fill_between([0, 1], [0, 1], [1, 2])
    assert (tmp_path / "one" / "x.svg").read_text() == (tmp_path / "two" / "x.svg").read_text()


def test_figures_in_tables():
    import figures  # pyright: ignore[reportMissingImports]
    from trials import spread  # pyright: ignore[reportMissingImports]

    assert figures.shown(spread([0.1, 0.3])) == "0.200 ± 0.141"
    assert figures.shown(spread([0.1]), 1, signed=True) == "+0.1"
    assert figures.shown(None) == "-"
    assert figures.by_seed(spread([0.1, -0.3]), "+.1f", ", ") == "+0.1, -0.3"
    assert figures.lines_of_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
