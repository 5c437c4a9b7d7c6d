import pytest

from benchmarks import report


def test_the_readmes_tables_are_those_of_the_results():
    readme = (report.ROOT / "README.md").read_text()
    assert report.render(readme) == readme


def test_a_changed_result_changes_the_readme(monkeypatch):
    readme = (report.ROOT / "README.md").read_text()
    result = report.load("quickstart")
    changed = result | {"test_accuracy": 0.1234}
    original = report.load
    monkeypatch.setattr(report, "load", lambda name: changed if name == "quickstart" else original(name))
    assert "12.34 % of 360 test images" in report.render(readme)
    with pytest.raises(ValueError, match="no place for quickstart"):
        report.render("# README")
