"""One row of the paper's tables in two processes, killed and taken up, is that of one process."""

import pytest
import torch

from tests.distributed import paper_rows


@pytest.fixture(scope="module")
def wanted(folder):
    """The row in this process, without a stop."""
    return paper_rows.row(folder / "rows", "copies", 1)


@pytest.mark.parametrize("form", paper_rows.FORMS)
def test_a_row_in_two_processes_is_that_of_one(form, found, wanted):
    for actual in found(f"row, {form}"):
        assert actual["status"] == "done"
        assert actual["files"] == wanted["files"]
        assert [line["step"] for line in actual["log"]] == [line["step"] for line in wanted["log"]]
        for line, other in zip(actual["log"], wanted["log"], strict=True):
            for name in ("loss", "grad_norm", "learning_rate"):
                assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
        torch.testing.assert_close(actual["weights"], wanted["weights"], rtol=1e-4, atol=1e-5)
        for task, result in wanted["evaluation"].items():
            assert {**actual["evaluation"][task], "effective_rank": None} == {**result, "effective_rank": None}
            assert actual["evaluation"][task]["effective_rank"] == pytest.approx(result["effective_rank"], rel=1e-3)
