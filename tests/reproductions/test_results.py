"""Files of JSON lines, whole and cut short."""

from reproductions.shared.results import add_line, read_lines, read_results


def test_lines_come_back_in_order_and_the_last_of_a_key_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_lines(path) == []
    lines = [{"key": "a", "P": 1.5}, {"key": "b", "P": None, "words": "g̃\u2028"}, {"key": "a", "P": 2}]
    for line in lines:
        add_line(path, line)
    assert read_lines(path) == lines
    assert read_results(path) == {"a": lines[2], "b": lines[1]}


def test_a_line_that_a_kill_cut_short_is_left_out_and_spoils_none_after_it(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "P": 1')
    assert read_lines(path) == [{"key": "a"}]
    add_line(path, {"key": "c"})
    assert path.read_text() == '{"key": "a"}\n{"key": "b", "P": 1\n{"key": "c"}\n'
    assert read_lines(path) == [{"key": "a"}, {"key": "c"}]
