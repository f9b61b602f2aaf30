"""What the page on distillation is to show, from figures written by hand, and that it shows those of the results."""

import json
from pathlib import Path


def spread(*values):
    return {"values": list(values), "mean": sum(values) / len(values), "standard_deviation": 0.1}


def test_a_row_for_each_weight_and_dots_for_each_seed(benchmarks, tmp_path, monkeypatch):
    import distillation  # pyright: ignore[reportMissingImports]

    students = {
        targets: {str(w): {"nats": spread(4 - w, 4.2 - w), "right": spread(0.2, 0.3)} for w in distillation.WEIGHTS}
        for targets in distillation.TARGETS
    }
    found = {
        "students": students,
        "teacher": {"nats": spread(2.5), "right": spread(0.5)},
        "kept": {
            "whole": 0.5,
            "kept": {"64 uint8": {"mass": 0.9, "kl": 0.45, "missing_share": 0.1, "error_per_token": 0.01}},
        },
    }
    lines = distillation.table("students", found)
    assert lines[2] == "| 0 | 4.100 ± 0.100 | 0.250 ± 0.100 | 4.100 ± 0.100 | 0.250 ± 0.100 |"
    assert lines[-2] == "| 64 uint8 | 0.900 | 0.4500 | 10.0% | 0.0100 |"
    monkeypatch.setattr(distillation, "PICTURE", tmp_path / "distillation.svg")
    distillation.draw("students", {"students": found})
    drawn = distillation.PICTURE.read_text()
    assert all(f"<!-- {says} -->" in drawn for says in (*distillation.TARGETS.values(), "the teacher itself"))
    assert distillation.differences(spread(1.0, 2.0), spread(0.75, 2.5)) == [0.25, -0.5]


def test_a_result_says_what_its_teachers_were(benchmarks, tmp_path):
    import distillation  # pyright: ignore[reportMissingImports]

    elsewhere, artifact = tmp_path / "elsewhere", tmp_path / "artifact"
    (artifact / "model").mkdir(parents=True)
    elsewhere.mkdir()
    (artifact / "stage.json").write_text(json.dumps({"key": "4be1", "metrics": {"tokens": 750_000, "loss": 4.0}}))
    for named in (artifact, artifact / "model"):
        assert distillation.origin(named) == {"key": "4be1", "tokens": 750_000}
    assert distillation.origin(elsewhere) == {"key": None, "tokens": None}


def test_the_page_has_the_figures_of_the_results(benchmarks):
    import distillation  # pyright: ignore[reportMissingImports]
    import trials  # pyright: ignore[reportMissingImports]

    page = (Path(__file__).resolve().parents[2] / "docs" / "methods" / "distillation.md").read_text("utf-8")
    result = trials.read(distillation.RESULT)
    for table in (distillation.student_table, distillation.kept_table):
        assert "\n".join(table(result["students"])) in page
    assert len(result["students"]["seeds"]) >= 3
    assert "\n".join(distillation.memory_table(result["memory"])) in page
    assert f"{result['speed']['kept']['64']['ratio']['median']:.3f}" in page
