"""The command line refuses what it cannot run before it runs anything."""

import pytest
from typer.testing import CliRunner

from reproductions.mini.commands import app


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["study", "--systems", "mdgd,stepp"], "stepp"),
        (["study", "--seeds", "0;1"], "0;1"),
        (["study", "--seeds", "0,100"], "100"),
        (["study", "--stages", "tune,costs"], "costs"),
        (["study", "--target", "digit"], "digit"),
        (["study", "--optimizer", "adam"], "adam"),
        (["demo", "--seeds", "x"], "'x'"),
        (["demo", "--seeds", "101"], "101"),
        (["demo", "--methods", "mdgd,ancor"], "ancor"),
        (["strength", "--cells", "digits-sgd"], "digits-sgd"),
        (["strength", "--strengths", "3,7"], "7"),
        (["strength", "--factors", "1,3"], "3"),
        (["strength", "--seeds", "0"], "0"),
        (["tune", "--methods", "adamw"], "adamw"),
        (["figures", "--target", "digit"], "digit"),
    ],
)
def test_arguments_are_refused_by_name_before_anything_runs(tmp_path, arguments, told):
    output = tmp_path / "out"
    called = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert called.exit_code == 2
    assert "Invalid value" in called.output
    assert told in called.output
    assert not output.exists()
