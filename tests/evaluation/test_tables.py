"""Tables of results beside published figures."""

import dataclasses
from html.parser import HTMLParser

import pytest

from mistral_jax.evaluation import suite, tables
from mistral_jax.evaluation.results import Column, Results


@pytest.fixture(scope="module")
def paper():
    return suite.read("paper")


@pytest.fixture(scope="module")
def found():
    whole = Column(61.25, 0.44, 14042, "mmlu", "acc", 5, None, 1.0)
    some = Column(30.0, None, 10, "piqa", "acc_norm", 2, 10, 1.0)
    other = dataclasses.replace(whole, shots=0)
    columns = {"MMLU": whole, "PIQA": some, "BoolQ": other}
    return [
        Results("paper", "mistral-7b-v0.1", "a", 1, columns, {"MBPP": "needs a | <flag>"}),
        Results("paper", "Llama-2-7B-hf", "b", 1, {"MMLU": dataclasses.replace(whole, value=44.4)}),
    ]


def cells(table, name):
    return next(row[1:] for row in table.rows if row[0].split()[0] == name)


def test_each_result_is_beside_the_figure_of_its_model(paper, found):
    table = tables.compare(paper, found)
    assert table.header[2:] == [
        *("mistral-7b-v0.1", "published: Mistral 7B", "difference"),
        *("Llama-2-7B-hf", "published: Llama 2 7B", "difference"),
    ]
    assert cells(table, "MMLU") == ["5", "61.2 ± 0.4", "60.1", "+1.1", "44.4 ± 0.4", "44.4", "+0.0"]
    assert cells(table, "GSM8K")[1:4] == ["not run", "52.2", ""]
    assert cells(table, "BoolQ")[1:4] == ["61.2 ± 0.4", "", ""]
    assert len(table.rows) == 13  # Columns that the paper's table does not have appear if they ran.


def test_notes_say_what_differs(paper, found):
    table = tables.compare(paper, found)

    def noted(cell):
        return [table.notes[int(part.rstrip("]")) - 1] for part in cell.split(" [")[1:]]

    assert noted(cells(table, "MBPP")[1]) == ["needs a | <flag>"]
    limit, shots = noted(cells(table, "PIQA")[1])
    assert "at most 10 of each" in limit
    assert "With 2 examples instead of 0" in shots
    assert len(set(table.notes)) == len(table.notes)
    heads = [row[0] for row in table.rows]
    assert any("sanitized" in note for head in heads for note in noted(head))


def test_a_model_is_compared_with_the_figures_that_its_name_begins_with(paper):
    for name, expected in (
        ("mistral-7b-v0.3+adapter", "Mistral 7B"),
        ("Llama-2-13b", "Llama 2 13B"),
        ("llama-2-70b", "Mistral 7B"),  # no scores are published
        ("CodeLlama-7b-hf", "CodeLlama 7B"),
        ("nano", "Mistral 7B"),
    ):
        assert tables.reference(paper, name).model == expected


def test_markdown_has_a_line_a_row_and_as_many_cells(paper, found):
    both = [tables.compare(paper, found), tables.published(paper)]
    text = tables.markdown(both)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == sum(2 + len(table.rows) for table in both)
    counts = [line.replace(r"\|", "").count("|") for line in lines]
    assert counts == [9] * 15 + [14] * (2 + len(both[1].rows))
    assert r"needs a \| \<flag\>" in text


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.notes = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "li":
            self.notes.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open) and "sup" not in self.open:
            self.cells[-1] += data
        if "li" in self.open:
            self.notes[-1] += data


def test_html_has_the_same_cells(paper, found):
    both = [tables.compare(paper, found), tables.published(paper)]
    page = Page()
    page.feed(tables.to_html(both))
    assert page.open == []
    expected = [cell for table in both for row in (table.header, *table.rows) for cell in row]
    assert page.cells == [cell.split(" [")[0] for cell in expected]
    assert page.notes == [note for table in both for note in table.notes]
