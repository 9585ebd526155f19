from html.parser import HTMLParser

from tminus.model.evaluation.tables import Table

HOSTILE = "<script>alert(1)</script>|\"&'\n\n# b"


def test_a_markdown_table_has_a_line_a_row_whatever_its_cells_hold() -> None:
    lines = Table(("a", "b"), ((HOSTILE, "1"), ("2", HOSTILE))).to_markdown().splitlines()
    assert lines[:2] == ["| a | b |", "| --- | --- |"]
    assert len(lines) == 4
    assert [line.replace("\\|", "").count("|") for line in lines] == [3] * 4


def test_an_html_table_holds_its_cells_as_text() -> None:
    tags: list[str] = []
    texts: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.handle_data = texts.append  # type: ignore[method-assign]
    parser.feed(Table((HOSTILE, "b"), ((HOSTILE, HOSTILE), ("2", "3"))).to_html())
    parser.close()
    assert tags == ["table", "thead", "tr", "th", "th", "tbody", *["tr", "th", "td"] * 2]
    assert "".join(texts).count(HOSTILE) == 3
