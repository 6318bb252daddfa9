from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from prefect_rollout.text import markdown, one_line


def test_chinese_stays_as_it_is() -> None:
    assert one_line("配额不足，请联系管理员") == "配额不足，请联系管理员"


@given(st.text())
def test_no_text_steers_a_terminal_or_breaks_a_line(text: str) -> None:
    assert all(char.isprintable() for char in one_line(text))


@given(st.text(max_size=3000), st.integers(2, 400))
def test_no_text_grows_beyond_its_limit(text: str, limit: int) -> None:
    assert len(one_line(text, limit)) <= limit


def test_a_cut_shows() -> None:
    assert one_line("x" * 400, 10) == "xxxxxxxxx…"
    assert one_line("a" * 10 + " " * 5000, 10).startswith("aaaaaaaaa")


def test_escape_sequences_and_direction_marks_are_taken_out() -> None:
    assert one_line("a\x1b[31mb\u202ec\x00") == "a�[31mb�c�"


@given(st.text(alphabet="<>&*_`[]()#|\\!~+-. \nahtps:/", max_size=60))
def test_no_text_becomes_markup_in_a_table_cell(text: str) -> None:
    table = f"| head |\n| --- |\n| x{markdown(text)} |\n"
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(table)
    body = html.split("<tbody>")[1]
    assert body.count("<") == len(["<tr>", "<td>", "</td>", "</tr>", "</tbody>", "</table>"])
